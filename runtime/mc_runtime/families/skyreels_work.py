"""What a run of SkyReels-V2 computes and keeps, known before it: for those who predict.

Neighbours: `skyreels` runs it; `mc_runtime.bench.predict` walks over the passes.
"""

__all__ = [
    "count_prompt_tokens",
    "describe_published",
    "list_passes",
    "list_savings",
    "list_slots",
]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.model_sizes import describe_skyreels, describe_video
from mc_engines.published import Published
from mc_engines.run_sizes import TEXT_TOKENS
from mc_runtime.families.family import Saving
from mc_runtime.options import GenerationOptions
from mc_runtime.run_plan import RunPlan
from mc_runtime.schedule import WAN_GRID, LatentGrid, validate_options
from motioncache import Mode


def describe_published(published: Published) -> dict[str, Any]:
    """Describe a published model as its manifest would; see `Family.published`."""
    return {
        "transformer": describe_skyreels(published.transformer),
        "video": describe_video(published),
        "vae": {
            "temporal_factor": WAN_GRID.temporal_factor,
            "spatial_factor": published.spatial_factor,
        },
    }


def count_prompt_tokens(config: Mapping[str, Any]) -> tuple[int, int]:
    """Count the tokens of both prompts, which are padded; see `Family.prompt_tokens`."""
    tokens = config.get("text_encoder", {}).get("max_tokens", TEXT_TOKENS)
    return tokens, tokens


def list_passes(
    config: Mapping[str, Any], options: GenerationOptions, plan: RunPlan
) -> NDArray[np.int8]:
    """List the passes of a run that skips nothing; see `Family.passes`."""
    shape = plan.shape
    mode = np.full((len(shape.active), shape.branches, shape.active.shape[1]), Mode.IDLE, np.int8)
    for start, matrix in zip(shape.window_start, plan.matrices, strict=True):
        done = (matrix.step > 0) & ~matrix.update
        for chunk in range(matrix.update.shape[1]):
            mode[start + np.flatnonzero(matrix.update[:, chunk]), :, chunk] = Mode.FULL
            if done[:, chunk].any():
                mode[start + done[:, chunk].argmax(), :, chunk] = Mode.CLEAN
    return mode


def list_slots(
    config: Mapping[str, Any], options: GenerationOptions, plan: RunPlan
) -> tuple[tuple[int, ...], int]:
    """Count the chunks of a window, which all branches keep; see `Family.slots`."""
    chunks, branches = plan.shape.active.shape[1], plan.shape.branches
    return (chunks,) * branches, chunks * branches


def list_savings(
    config: Mapping[str, Any], options: GenerationOptions, grid: LatentGrid
) -> Sequence[Sequence[Saving]]:
    """List settings with which a run holds less; see `Family.savings`."""
    guided = options.guidance_scale > 1
    unguided = [Saving("no guidance", {"guidance_scale": 1.0})] if guided else []
    return unguided, list(_shorten(options, grid))


def _shorten(options: GenerationOptions, grid: LatentGrid) -> Iterator[Saving]:
    """Windows of fewer chunks, and overlaps that they can have."""
    size = options.causal_block_size
    overlap = grid.latent_frames(options.overlap_history)
    frames = min(options.num_frames, options.base_num_frames)
    for chunks in range((grid.latent_frames(frames) - 1) // size, 1, -1):
        base = grid.pixel_frames(chunks * size)
        for kept in dict.fromkeys((overlap, *(size * count for count in range(chunks - 1, 0, -1)))):
            settings: dict[str, Any] = {"base_num_frames": base}
            if kept != overlap:
                settings["overlap_history"] = grid.pixel_frames(kept)
            try:
                validate_options(replace(options, **settings), 0, grid)
            except ValueError:
                continue
            yield Saving("shorter windows", settings)
            break
