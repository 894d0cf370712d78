"""A recorded schedule as a policy: what was recomputed is recomputed again, nothing else.

Source of the decisions: a `trace.DecisionTrace`, recorded or made of masks.
"""

__all__ = ["replay"]

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motioncache.config import MagiSwitches
from motioncache.policy import Plan, Policy, RunShape, Scope
from motioncache.trace import DecisionTrace


@dataclass(frozen=True)
class _Tape:
    """The masks of a chunk's steps, shape (N, L), and which comes next."""

    masks: NDArray[np.bool_]
    step: int = 0


def replay(trace: DecisionTrace) -> Policy:
    """Force the decisions of a trace.

    Args:
        trace: Of a run of the same shape.

    Returns:
        The policy; its `check` refuses a run of another shape.
    """
    switches = trace.run.get("switches")
    return Policy(
        "replay",
        partial(_init_state, trace),
        _plan_step,
        check=partial(_check, trace),
        clean_pass=bool(trace.run["clean_pass"]),
        extrapolation=trace.run.get("extrapolation"),
        switches=None if switches is None else MagiSwitches(**switches),
    )


def _init_state(trace: DecisionTrace, shape: RunShape, scope: Scope) -> _Tape:
    masks = trace.recompute[shape.rows_of(scope.window), scope.branch, scope.chunk]
    return _Tape(masks[masks[:, 0] >= 0] == 1)


def _plan_step(tape: _Tape, distance: Any) -> tuple[Plan, _Tape]:
    return Plan(tape.masks[tape.step]), _Tape(tape.masks, tape.step + 1)


def _check(trace: DecisionTrace, shape: RunShape) -> None:
    """Refuse another run than the recorded one.

    Raises:
        ValueError: With what differs.
    """
    size = (len(shape.active), shape.branches, shape.active.shape[1], shape.tokens)
    if trace.recompute.shape != size or trace.window_start != shape.window_start:
        raise ValueError(
            f"trace: expected {_describe(size)}, got {_describe(trace.recompute.shape)}. "
            "Replay it with the size, length, steps and guidance of its own run."
        )
    if not np.array_equal(trace.recompute[:, 0, :, 0] >= 0, shape.active):
        raise ValueError(
            "trace: expected chunks to take their steps in the rows of this run, got others. "
            "Replay it with the ar_step and the windows of its own run; one that was interrupted "
            "cannot be replayed."
        )


def _describe(size: tuple[int, ...]) -> str:
    rows, branches, chunks, tokens = size
    return f"{rows} rows, {branches} branches, {chunks} chunks of {tokens} tokens"
