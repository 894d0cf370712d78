"""What a run of MAGI-1 computes and keeps, known before it: for those who count and predict.

Neighbours: `magi` describes its runs with it; `mc_runtime.flops` counts what a trace says,
`mc_runtime.bench.predict` walks over the passes.
"""

__all__ = [
    "count_prompt_tokens",
    "describe_published",
    "describe_work",
    "list_passes",
    "list_savings",
    "list_slots",
    "plan_uncached",
]

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.model_sizes import describe_magi, describe_magi_schedule
from mc_engines.published import Published
from mc_runtime.families.family import Saving
from mc_runtime.families.magi_schedule import MagiOptions, MagiSchedule
from mc_runtime.run_plan import RunPlan
from mc_runtime.schedule import LatentGrid
from motioncache import DecisionTrace, Mode

# Of a prompt, which is not padded: with two special tokens it has 100, with which the published
# count of operations is met.
_PROMPT_TOKENS = 98


def describe_work(
    schedule: MagiSchedule, plan: RunPlan, captions: Sequence[int], null: int
) -> dict[str, Any]:
    """Say what the passes of a run see, and which texts are encoded.

    Args:
        schedule: Of the run.
        plan: Of the run.
        captions: Tokens of each caption that the prompt becomes, the special ones included; as
            many in all.
        null: Tokens of the null caption.

    Returns:
        As `count_work` reads it from a trace's `run`.
    """
    active, steps = plan.shape.active, plan.matrices[0].step - 1
    visible = np.zeros((len(active), len(schedule.branches), active.shape[1]), np.int64)
    for row, chunk in np.argwhere(active).tolist():
        seen = len(schedule.visible(chunk, int(steps[row, chunk])))
        visible[row, :, chunk] = [1 if branch.alone else seen for branch in schedule.branches]
    for row, clean, given in _clean_passes(plan):
        visible[row, :, clean] = len(schedule.visible_clean(clean, given))
    return {
        "branches": [branch.name for branch in schedule.branches],
        "text_tokens": [captions[0] if branch.prompted else null for branch in schedule.branches],
        "clean_text_tokens": null,
        "encoded_tokens": [*captions, null],
        "visible": visible.tolist(),
        "partial_head": True,
    }


def _clean_passes(plan: RunPlan) -> list[tuple[int, int, bool]]:
    """The row before which each chunk has its clean pass, the chunk, and whether it is given."""
    done = plan.matrices[0].step > plan.shape.steps
    given = plan.windows[0].prefix // plan.shape.frames
    chunks = np.flatnonzero(done.any(axis=0)).tolist()
    return [(int(np.argmax(done[:, chunk])), chunk, chunk < given) for chunk in chunks]


def plan_uncached(
    schedule: MagiSchedule, plan: RunPlan, captions: Sequence[int], null: int
) -> DecisionTrace:
    """Write down what a run does that skips nothing, before it is run.

    Args:
        schedule: Of the run.
        plan: Of the run.
        captions: As for `describe_work`.
        null: Tokens of the null caption.

    Returns:
        A trace that `count_work` counts.
    """
    shape = plan.shape
    trace = DecisionTrace.empty(shape, describe_work(schedule, plan, captions, null))
    trace.mode[:] = _list_passes(schedule, plan)
    trace.recompute[trace.mode == Mode.FULL] = 1
    trace.bucket[trace.mode != Mode.IDLE] = shape.tokens
    return trace


def _list_passes(schedule: MagiSchedule, plan: RunPlan) -> NDArray[np.int8]:
    shape, steps = plan.shape, plan.matrices[0].step - 1
    mode = np.full((len(shape.active), shape.branches, shape.active.shape[1]), Mode.IDLE, np.int8)
    for row, active in enumerate(shape.active):
        taken = {chunk: int(steps[row, chunk]) for chunk in np.flatnonzero(active).tolist()}
        for chunk in taken:
            for branch in range(shape.branches):
                if schedule.takes_part(branch, chunk, taken):
                    mode[row, branch, chunk] = Mode.FULL
    for row, clean, given in _clean_passes(plan):
        mode[row, schedule.clean_branches(given), clean] = Mode.CLEAN
    return mode


def list_passes(config: Mapping[str, Any], options: MagiOptions, plan: RunPlan) -> NDArray[np.int8]:
    """List the passes of a run that skips nothing; see `Family.passes`."""
    return _list_passes(MagiSchedule.from_manifest(config, options), plan)


def list_slots(
    config: Mapping[str, Any], options: MagiOptions, plan: RunPlan
) -> tuple[tuple[int, ...], int]:
    """Count the chunks that each branch keeps, and those of a window; see `Family.slots`."""
    schedule = MagiSchedule.from_manifest(config, options)
    chunks, given = plan.shape.active.shape[1], plan.windows[0].prefix // plan.shape.frames
    return schedule.slots(chunks, given), min(schedule.window_chunks, chunks - given)


def count_prompt_tokens(config: Mapping[str, Any]) -> tuple[int]:
    """Assume a length for the prompt; see `Family.prompt_tokens`."""
    return (_PROMPT_TOKENS,)


def describe_published(published: Published) -> dict[str, Any]:
    """Describe a published model as its manifest would; see `Family.published`."""
    return {
        "transformer": describe_magi(published.transformer),
        "schedule": describe_magi_schedule(published.settings or {}),
        "video": {
            "height": published.height,
            "width": published.width,
            "num_frames": published.base_num_frames,
        },
    }


def list_savings(
    config: Mapping[str, Any], options: MagiOptions, grid: LatentGrid
) -> Sequence[Sequence[Saving]]:
    """List settings with which a run holds less; see `Family.savings`."""
    schedule = MagiSchedule.from_manifest(config, options)
    plain: list[Saving] = []
    if schedule.guidance_passes == 1 and schedule.nearly_clean_timestep is not None:
        plain = [Saving("no nearly clean guidance", {"nearly_clean": False})]
    size = schedule.chunk_frames
    chunks = grid.latent_frames(options.num_frames) // size
    most = min(chunks - 1, schedule.kept_chunks(chunks, 0))  # more are kept of no video
    shorter = [
        Saving("a shorter video", {"num_frames": grid.pixel_frames(count * size)})
        for count in range(most, 0, -1)
    ]
    return plain, shorter
