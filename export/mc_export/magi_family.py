"""The adapter of MAGI-1: its transformer and its special tokens.

Text encoder and autoencoder are not exported yet. Neighbours: `magi_checkpoint` opens a checkpoint,
`magi_components` makes the graphs; `families` lists this adapter.
"""

__all__ = ["MAGI_FAMILY"]

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from mc_export.checkpoint import Checkpoint, Part
from mc_export.component import ComponentSource
from mc_export.family import Family, Table, VideoSizes
from mc_export.magi_checkpoint import (
    ACCEPTED_LAYOUT,
    SPECIAL_TOKENS_FILE,
    load_magi_checkpoint,
    load_special_tokens,
)
from mc_export.magi_components import null_caption, transformer_components
from mc_export.magi_config import describe_transformer, transformer_tensors
from mc_export.size_plan import plan_components, render_components
from mc_export.tensor_source import Shape

NULL_TEXT = "weights/null_text.safetensors"
SPECIAL_TOKENS = "weights/special_tokens.safetensors"
_CONSEQUENCES = {
    "text_encoder": "the T5 of this family is not exported yet; generate from --prompt-embeds",
    "tokenizer": "prompts cannot be encoded; generate from --prompt-embeds",
    "vae": "the autoencoder of this family is not exported yet; generate with --save-latents",
    SPECIAL_TOKENS_FILE: "prompts go without what asks for quality and says how much video is left",
}
# By name in the manifest, the key of the official configuration.
_SCHEDULE = {
    "num_inference_steps": "num_steps",
    "chunk_frames": "chunk_width",
    "window_chunks": "window_size",
    "kv_ranges": "noise2clean_kvrange",
    "clean_timestep": "clean_t",
    "guidance_passes": "cfg_number",
    "guidance_timesteps": "cfg_t_range",
    "history_guidance_scales": "prev_chunk_scales",
    "text_guidance_scales": "text_scales",
    "nearly_clean_timestep": "distill_nearly_clean_chunk_threshold",
    "shortcut_mode": "shortcut_mode",
    "fps": "fps",
    "temporal_factor": "temporal_downsample_factor",
}


def _tensors(checkpoint: Checkpoint) -> dict[str, dict[str, Shape]]:
    return {"transformer": transformer_tensors(checkpoint.transformer.config)}


def _components(checkpoint: Checkpoint) -> Iterator[tuple[Part, ComponentSource]]:
    part = checkpoint.transformer
    for source in transformer_components(part.config, part.tensors):
        yield part, source


def _tables(checkpoint: Checkpoint) -> list[Table]:
    config, tensors = checkpoint.transformer.config, checkpoint.transformer.tensors
    tables = [Table("null_text", NULL_TEXT, partial(null_caption, config, tensors))]
    file = checkpoint.path / SPECIAL_TOKENS_FILE
    if file.is_file():
        load = partial(load_special_tokens, file, config["caption_channels"])
        tables.append(Table("special_tokens", SPECIAL_TOKENS, load))
    return tables


def _layers(checkpoint: Checkpoint) -> tuple[int, int]:
    return 2 * int(checkpoint.transformer.config["num_layers"]), 7


def _describe(checkpoint: Checkpoint, name: str | None) -> dict[str, Any]:
    part, settings = checkpoint.transformer, checkpoint.scheduler or {}
    return {
        "transformer": describe_transformer(part.config, part.tensors),
        "schedule": _describe_schedule(settings),
        "video": {
            "height": settings["video_size_h"],
            "width": settings["video_size_w"],
            "num_frames": settings["num_frames"],
        },
    }


def _describe_schedule(settings: Mapping[str, Any]) -> dict[str, Any]:
    schedule = {name: settings[key] for name, key in _SCHEDULE.items()}
    clean = settings["clean_chunk_kvrange"]
    ranges = settings["noise2clean_kvrange"]
    last = ranges[-1] if ranges else None
    return schedule | {"clean_kv_range": last if clean == -1 else clean}


def _missing(checkpoint: Checkpoint) -> dict[str, str]:
    """All but the transformer: `load_magi_checkpoint` opens nothing else."""
    missing = dict(_CONSEQUENCES)
    if (checkpoint.path / SPECIAL_TOKENS_FILE).is_file():
        del missing[SPECIAL_TOKENS_FILE]
    return missing


def _plan(checkpoint: Checkpoint, dtype: torch.dtype, model: str, video: VideoSizes) -> str:
    sources = (source for _, source in _components(checkpoint))
    tables = {table.name: table.load() for table in _tables(checkpoint)}
    components = plan_components(sources, tables, dtype)
    lines = render_components(components, dtype)
    return "\n".join([*lines, "", "What a run takes is not planned yet for this family."])


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
)
