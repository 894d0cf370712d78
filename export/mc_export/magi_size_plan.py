"""What a run of MAGI-1 holds, from its checkpoint's configuration: of `mc-export --dry-run`.

Neighbours: `size_plan` counts components and reckons; `size_table` prints; `mc-bench predict` plans
the same from a bundle or a published name.
"""

__all__ = ["plan_magi", "render_magi"]

from collections.abc import Mapping
from typing import Any

import torch

from mc_engines.model_sizes import MAGI_NULL_TOKENS, describe_magi, describe_magi_schedule
from mc_engines.run_sizes import Kept, WindowShape, count_kept_chunks
from mc_export.magi_checkpoint import SPATIAL_FACTOR
from mc_export.size_plan import ComponentSize, count_positions, plan_runs
from mc_export.size_table import render_components, render_runs

# Fields of `RunSizes` that nobody has recorded of these graphs in ONNX Runtime.
_UNKNOWN = "pass_plain", "pass_fused", "decode", "peak"


def plan_magi(
    transformer: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    height: int,
    width: int,
    captions: int,
) -> WindowShape:
    """Describe the largest window of a run, and what is kept of it.

    Args:
        transformer: The official `model_config`, and `distill`.
        settings: The official `runtime_config` and `engine_config`, in one.
        height: Pixels.
        width: Pixels.
        captions: The most that a prompt becomes, each for a number of chunks left.

    Returns:
        The window; prompts are as long as the model takes.

    Raises:
        ValueError: The sizes are no whole number of patches.
    """
    c, schedule = describe_magi(transformer), describe_magi_schedule(settings)
    positions = count_positions(height, width, SPATIAL_FACTOR, tuple(c["patch_size"]))
    tokens, window = schedule["chunk_frames"] * positions, schedule["window_chunks"]
    frames = settings["num_frames"] // schedule["temporal_factor"]
    chunks = frames // schedule["chunk_frames"]
    ranges, clean = schedule["kv_ranges"], schedule["clean_kv_range"]
    kept = count_kept_chunks(chunks, window, ranges, [chunks if clean is None else clean])
    active = min(window, chunks)
    # The branches that see chunks before them, and the one that sees each alone.
    slots = (kept,) * (2 if schedule["guidance_passes"] > 1 else 1)
    if schedule["guidance_passes"] > 1 or schedule["nearly_clean_timestep"] is not None:
        slots = (*slots, active)
    text = c["max_text_tokens"]
    return WindowShape(
        layers=c["layers"],
        heads=c["heads"],
        dim=c["dim"],
        ffn_dim=c["ffn_dim"],
        chunk_tokens=tokens,
        window_tokens=tokens * min(chunks, max(ranges, default=chunks)),
        branches=len(slots),
        text_tokens=text,
        key_dim=c["key_heads"] * c["head_dim"],
        query_dim=c["heads"] * c["head_dim"],
        queries=2,
        ffn_matrices=3 if c["gated_ffn"] else 2,
        kept=Kept(
            tuple(tokens * count for count in slots),
            min(chunks, captions) * text + min(MAGI_NULL_TOKENS, text),
            tokens * active,
            c["out_channels"] * c["patch_size"][1] * c["patch_size"][2],
        ),
    )


def render_magi(
    video: str, window: WindowShape, components: tuple[ComponentSize, ...], dtype: torch.dtype
) -> str:
    """Write the plan as a table.

    Args:
        video: Its size, in words.
        window: What `plan_magi` gave.
        components: Of the bundle.
        dtype: Weights are stored in it.

    Returns:
        Lines of plain text: the bundle's components, the export, and a run as far as it is known.
    """
    chunk = window.chunk_tokens
    counts = " + ".join(f"{tokens // chunk}" for tokens in window.keeps.keys)
    lines = [
        *render_components(components, dtype),
        "",
        f"{video}, {chunk:,} tokens a chunk; keys of {counts} chunks, and of prompts of "
        f"{window.text_tokens} tokens",
        *render_runs(*plan_runs(window, components, dtype), _UNKNOWN),
    ]
    return "\n".join(lines)
