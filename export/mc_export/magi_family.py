"""The adapter of MAGI-1: its transformer, its special tokens, T5 and its autoencoder.

Neighbours: `magi_checkpoint` opens a checkpoint, `magi_components`, `t5` and `magi_vae_components`
make the graphs; `families` lists this adapter.
"""

__all__ = ["MAGI_FAMILY"]

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from mc_engines.model_sizes import MAGI_DURATIONS, describe_magi_schedule
from mc_export.checkpoint import Checkpoint, Part
from mc_export.component import ComponentSource
from mc_export.family import Family, Table, VideoSizes
from mc_export.magi_checkpoint import (
    ACCEPTED_LAYOUT,
    SPECIAL_TOKENS_FILE,
    TEXT_ENCODER_FOLDER,
    TILES_PER_SECOND,
    VAE_FOLDER,
    load_magi_checkpoint,
    load_special_tokens,
)
from mc_export.magi_components import null_caption, transformer_components
from mc_export.magi_config import describe_transformer, transformer_tensors
from mc_export.magi_size_plan import plan_magi, render_magi
from mc_export.magi_vae_components import (
    describe_vae,
    vae_components,
    vae_positions,
    vae_tensors,
)
from mc_export.size_plan import plan_components
from mc_export.t5 import (
    describe_text_encoder,
    text_embedding_table,
    text_encoder_components,
    text_encoder_tensors,
)
from mc_export.t5_tokenizer import write_t5_tokenizer
from mc_export.tensor_source import Shape

NULL_TEXT = "weights/null_text.safetensors"
SPECIAL_TOKENS = "weights/special_tokens.safetensors"
TOKEN_TABLE = "weights/text_embed.safetensors"
POSITIONS = "weights/vae_positions.safetensors"
_CONSEQUENCES = {
    "text_encoder": f"no {TEXT_ENCODER_FOLDER}/config.json; generate from --prompt-embeds",
    "tokenizer": f"{TEXT_ENCODER_FOLDER} has none; generate from --prompt-embeds",
    "vae": f"no {VAE_FOLDER}/config.json; generate with --save-latents",
    SPECIAL_TOKENS_FILE: "prompts go without what asks for quality and says how much video is left",
}
_PARTS = "text_encoder", "tokenizer", "vae"


def _tensors(checkpoint: Checkpoint) -> dict[str, dict[str, Shape]]:
    expected = {"transformer": transformer_tensors(checkpoint.transformer.config)}
    if (text := checkpoint.text_encoder) is not None:
        expected["text_encoder"] = text_encoder_tensors(text.config, text.tensors.names())
    if checkpoint.vae is not None:
        expected["vae"] = vae_tensors(checkpoint.vae.config)
    return expected


def _components(checkpoint: Checkpoint) -> Iterator[tuple[Part, ComponentSource]]:
    makers = (
        (checkpoint.transformer, transformer_components),
        (checkpoint.text_encoder, text_encoder_components),
        (checkpoint.vae, vae_components),
    )
    for part, make in makers:
        if part is not None:
            for source in make(part.config, part.tensors):
                yield part, source


def _tables(checkpoint: Checkpoint) -> list[Table]:
    config, tensors = checkpoint.transformer.config, checkpoint.transformer.tensors
    tables = [Table("null_text", NULL_TEXT, partial(null_caption, config, tensors))]
    file = checkpoint.path / SPECIAL_TOKENS_FILE
    if file.is_file():
        load = partial(load_special_tokens, file, config["caption_channels"])
        tables.append(Table("special_tokens", SPECIAL_TOKENS, load))
    if (text := checkpoint.text_encoder) is not None:
        tables.append(Table("text_embed", TOKEN_TABLE, text_embedding_table(text.tensors)))
    if (vae := checkpoint.vae) is not None:
        tables.append(Table("vae_positions", POSITIONS, partial(vae_positions, vae.tensors)))
    return tables


def _layers(checkpoint: Checkpoint) -> tuple[int, int]:
    layers, components = 2 * int(checkpoint.transformer.config["num_layers"]), 7
    if checkpoint.text_encoder is not None:
        layers += int(checkpoint.text_encoder.config["num_layers"]) + 1  # the norm
        components += 2
    if checkpoint.vae is not None:
        layers += 2 * describe_vae(checkpoint.vae.config, 1.0, 0)["layers"]
        components += 6
    return layers, components


def _describe(checkpoint: Checkpoint, name: str | None) -> dict[str, Any]:
    part, settings = checkpoint.transformer, checkpoint.scheduler or {}
    config = {
        "transformer": describe_transformer(part.config, part.tensors),
        "schedule": describe_magi_schedule(settings),
        "video": {
            "height": settings["video_size_h"],
            "width": settings["video_size_w"],
            "num_frames": settings["num_frames"],
        },
    }
    if (text := checkpoint.text_encoder) is not None:
        limit = {"max_tokens": part.config["caption_max_length"]}
        config["text_encoder"] = describe_text_encoder(text.config) | limit
    if (vae := checkpoint.vae) is not None:
        frames = settings["fps"] // TILES_PER_SECOND
        config["vae"] = describe_vae(vae.config, settings["scale_factor"], frames)
    return config


def _missing(checkpoint: Checkpoint) -> dict[str, str]:
    there = [name for name in _PARTS if getattr(checkpoint, name) is not None]
    if (checkpoint.path / SPECIAL_TOKENS_FILE).is_file():
        there.append(SPECIAL_TOKENS_FILE)
    return {name: words for name, words in _CONSEQUENCES.items() if name not in there}


def _plan(checkpoint: Checkpoint, dtype: torch.dtype, model: str, video: VideoSizes) -> str:
    settings, sizes = checkpoint.scheduler or {}, dict(video)
    if (frames := sizes.pop("base_num_frames", None)) is not None:
        raise ValueError(
            "base_num_frames: expected none, as a video of MAGI-1 is one window, got "
            f"{frames}. Leave it out."
        )
    height, width = (sizes[name] or settings[f"video_size_{name[0]}"] for name in sizes)
    special = checkpoint.path / SPECIAL_TOKENS_FILE
    plan = plan_magi(
        checkpoint.transformer.config,
        settings,
        height=height,
        width=width,
        captions=MAGI_DURATIONS if special.is_file() else 1,
    )
    sources = (source for _, source in _components(checkpoint))
    tables = {table.name: table.load() for table in _tables(checkpoint)}
    components = plan_components(sources, tables, dtype)
    size = f"{height} x {width} pixels, {settings['num_frames']} frames"
    return render_magi(size, plan, components, dtype)


MAGI_FAMILY = Family(
    accepted=ACCEPTED_LAYOUT,
    load=load_magi_checkpoint,
    fetch=None,
    tensors=_tensors,
    components=_components,
    tables=_tables,
    layers=_layers,
    describe=_describe,
    missing=_missing,
    plan=_plan,
    write_tokenizer=write_t5_tokenizer,
)
