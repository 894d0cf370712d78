"""The adapter of SkyReels-V2: transformer, umT5 text encoder and Wan's autoencoder.

Neighbours: `skyreels_components`, `t5` and `wan_vae_components` make the graphs; `families` lists
this adapter.
"""

__all__ = ["SKYREELS_FAMILY"]

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mc_engines.model_sizes import describe_video
from mc_engines.published import FAMILY_DEFAULTS, PUBLISHED, WAN21_VAE
from mc_export.checkpoint import ACCEPTED_FORMS, Checkpoint, Part, load_checkpoint
from mc_export.component import ComponentSource
from mc_export.family import Family, Table, VideoSizes
from mc_export.fetch import fetch_checkpoint
from mc_export.size_plan import plan_sizes
from mc_export.size_table import render_plan
from mc_export.skyreels_components import (
    describe_transformer,
    transformer_components,
    transformer_tensors,
)
from mc_export.t5 import (
    describe_text_encoder,
    text_embedding_table,
    text_encoder_components,
    text_encoder_tensors,
)
from mc_export.tensor_source import Shape
from mc_export.wan_vae_components import describe_vae, vae_components, vae_tensors

CHUNK_FRAMES = 5
TOKEN_TABLE = "weights/text_embed.safetensors"
MAX_TEXT_TOKENS = 512  # that the transformer was trained with (SkyReels-V2, text_len)
_CONSEQUENCES = {
    "text_encoder": "prompts cannot be encoded; generate from --prompt-embeds",
    "tokenizer": "prompts cannot be encoded; generate from --prompt-embeds",
    "vae": "latents cannot be decoded; generate with --save-latents",
}


def _tensors(checkpoint: Checkpoint) -> dict[str, dict[str, Shape]]:
    expected = {"transformer": transformer_tensors(checkpoint.transformer.config)}
    if checkpoint.text_encoder is not None:
        config = checkpoint.text_encoder.config
        names = checkpoint.text_encoder.tensors.names()
        expected["text_encoder"] = text_encoder_tensors(config, names)
    if checkpoint.vae is not None:
        expected["vae"] = vae_tensors(checkpoint.vae.config)
    return expected


def _components(checkpoint: Checkpoint) -> Iterator[tuple[Part, ComponentSource]]:
    """Every component of every part there is, one at a time in memory."""
    makers = {
        "transformer": transformer_components,
        "text_encoder": text_encoder_components,
        "vae": vae_components,
    }
    for name, make in makers.items():
        part: Part | None = getattr(checkpoint, name)
        if part is not None:
            for source in make(part.config, part.tensors):
                yield part, source


def _tables(checkpoint: Checkpoint) -> list[Table]:
    """The token table: rows are looked up by the host, so it is a file and no graph."""
    part = checkpoint.text_encoder
    if part is None:
        return []
    return [Table("text_embed", TOKEN_TABLE, text_embedding_table(part.tensors))]


def _layers(checkpoint: Checkpoint) -> tuple[int, int]:
    layers, components = 2 * int(checkpoint.transformer.config["num_layers"]), 8
    if checkpoint.text_encoder is not None:
        norm = 1
        layers += int(checkpoint.text_encoder.config["num_layers"]) + norm
        components += 2
    return layers, components + (4 if checkpoint.vae is not None else 0)


def _describe(checkpoint: Checkpoint, name: str | None) -> dict[str, Any]:
    config: dict[str, Any] = {"transformer": describe_transformer(checkpoint.transformer.config)}
    if checkpoint.text_encoder is not None:
        encoder = describe_text_encoder(checkpoint.text_encoder.config)
        config["text_encoder"] = encoder | {"max_tokens": _max_tokens(checkpoint.tokenizer)}
    if checkpoint.vae is not None:
        config["vae"] = describe_vae(checkpoint.vae.config)
    if name is not None:
        config["video"] = describe_video(PUBLISHED[name])
    return config


def _missing(checkpoint: Checkpoint) -> dict[str, str]:
    return {
        part: words for part, words in _CONSEQUENCES.items() if getattr(checkpoint, part) is None
    }


def _max_tokens(tokenizer: Path | None) -> int:
    """Return to how many tokens prompts are padded: as many as the tokenizer takes, 512 at most.

    The transformer attends to the padding, so that it has to be as long as in training.
    """
    path = None if tokenizer is None else tokenizer / "tokenizer_config.json"
    if path is None or not path.is_file():
        return MAX_TEXT_TOKENS
    length = json.loads(path.read_text()).get("model_max_length", MAX_TEXT_TOKENS)
    return int(min(length, MAX_TEXT_TOKENS))


def _plan(checkpoint: Checkpoint, dtype: torch.dtype, model: str, video: VideoSizes) -> str:
    published = PUBLISHED[FAMILY_DEFAULTS.get(model, model)]
    sizes: dict[str, Any] = {
        name: getattr(published, name) if value is None else value for name, value in video.items()
    }
    vae = WAN21_VAE if checkpoint.vae is None else checkpoint.vae.config
    plan = plan_sizes(
        checkpoint.transformer.config,
        _tensors(checkpoint),
        dtype=dtype,
        chunk=CHUNK_FRAMES,
        spatial_factor=describe_vae(vae)["spatial_factor"],
        **sizes,
    )
    return render_plan(plan)


SKYREELS_FAMILY = Family(
    accepted=ACCEPTED_FORMS,
    load=load_checkpoint,
    fetch=fetch_checkpoint,
    tensors=_tensors,
    components=_components,
    tables=_tables,
    layers=_layers,
    describe=_describe,
    missing=_missing,
    plan=_plan,
)
