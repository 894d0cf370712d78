"""What a run of MAGI-1 computes, known before it: for those who count operations.

Neighbours: `magi` describes its runs with it; `mc_runtime.flops` counts what a trace says.
"""

__all__ = ["describe_work", "plan_uncached"]

from collections.abc import Sequence
from typing import Any

import numpy as np

from mc_runtime.families.magi_schedule import MagiSchedule
from mc_runtime.run_plan import RunPlan
from motioncache import DecisionTrace, Mode


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
    shape, steps = plan.shape, plan.matrices[0].step - 1
    trace = DecisionTrace.empty(shape, describe_work(schedule, plan, captions, null))
    for row, active in enumerate(shape.active):
        taken = {chunk: int(steps[row, chunk]) for chunk in np.flatnonzero(active).tolist()}
        for chunk in taken:
            for branch in range(shape.branches):
                if schedule.takes_part(branch, chunk, taken):
                    trace.mode[row, branch, chunk] = Mode.FULL
                    trace.recompute[row, branch, chunk] = 1
    for row, clean, given in _clean_passes(plan):
        for number in schedule.clean_branches(given):
            trace.mode[row, number, clean] = Mode.CLEAN
    trace.bucket[trace.mode != Mode.IDLE] = shape.tokens
    return trace
