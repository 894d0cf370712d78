"""What a cache policy is: pure functions that decide which tokens are recomputed.

A policy keeps one state per branch and scope, the scope being a chunk of a window or a whole
window. A new window starts with a new state; nothing is ever cleared. Neighbours: `motion`,
`flowcache`, `teacache` and `replay` are the policies, `presets` finds one by its name; the loop in
`mc_runtime.denoise` asks `plan_step` before every step of a chunk, computes what the plan says, and
hands `observe` the motion it saw where the plan wants it.

Axes: F latent frames of a chunk, P positions of a frame, L = F*P tokens of a chunk.
"""

__all__ = ["Plan", "Policy", "RunShape", "Scope", "none"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RunShape:
    """What a policy may know of a run before it starts.

    Attributes:
        active: Which chunk takes a step in which row, the rows of all windows one after the other;
            shape (rows, chunks of the largest window), bool.
        window_start: First row of each window.
        branches: 1, or 2 with guidance: cond, uncond.
        frames: F.
        positions: P.
        steps: Steps N of every chunk.
    """

    active: NDArray[np.bool_]
    window_start: tuple[int, ...]
    branches: int
    frames: int
    positions: int
    steps: int

    @property
    def tokens(self) -> int:
        """L."""
        return self.frames * self.positions

    def rows_of(self, window: int) -> slice:
        """Return the rows of a window."""
        bounds = (*self.window_start, len(self.active))
        return slice(bounds[window], bounds[window + 1])


@dataclass(frozen=True)
class Scope:
    """Whose decisions a state is for; all numbers from 0.

    Attributes:
        window: Of the run.
        branch: 0 cond, 1 uncond.
        chunk: Of the window; None where the policy decides for all its chunks together.
    """

    window: int
    branch: int
    chunk: int | None


@dataclass(frozen=True)
class Plan:
    """What to do in one step of a scope.

    Attributes:
        recompute: True where the blocks run for the token; False where what they gave is reused.
            Shape (L,), bool. A chunk's first step is computed whatever the plan says: nothing of it
            is there to reuse.
        distance: Rescaled distance of the step, NaN where none was used.
        accumulated: What was compared with the threshold; shape (L,), or () where it is the same
            for all tokens. NaN where none was.
        wants_motion: Whether `observe` is to be told the motion that this step shows.
    """

    recompute: NDArray[np.bool_]
    distance: float = float("nan")
    accumulated: NDArray[np.float32] | float = float("nan")
    wants_motion: bool = False

    @classmethod
    def full(cls, tokens: int, wants_motion: bool = False) -> "Plan":
        """Recompute every token, without asking for a distance."""
        return cls(np.ones(tokens, np.bool_), wants_motion=wants_motion)


def _see_nothing(state: Any, motion: NDArray[np.float32]) -> Any:
    return state


def _no_weights(state: Any) -> None:
    return None


def _fits_any(shape: RunShape) -> None:
    return None


@dataclass(frozen=True)
class Policy:
    """Pure functions over explicit state, with their configuration bound.

    Attributes:
        name: As the command line knows it.
        init_state: From the shape of a run and a scope to the state before its first step.
        plan_step: From a state and the distance of the coming step to the plan and the state after
            it. On SkyReels-V2 the distance is the relative change of the modulation, before any
            rescaling; on MAGI-1 it is an `InputDistance`, None in a chunk's first step.
        observe: From a state and the motion that the step shows, shape (F, P), to the state with
            new weights. Called only where the plan wants it.
        weights: The motion weights in a state, shape (L,); None where it has none.
        check: Refuses a run that the policy does not fit, with ValueError.
        scope: What a state is for: one chunk, or all active chunks of a window together.
        clean_pass: Whether a finished chunk is evaluated once more at timestep 0, so that later
            chunks see its clean keys.
        reset_history: Whether a new window forgets the last frames that motion is measured from.
        motion: What `observe` is told the motion of: the block output of the branch, relative to
            its size, or the clean latents that the step predicts with guidance, in absolute terms
            and the same for all branches.
        extrapolation: See `config.ThresholdConfig`; None where the family's own way of reuse holds.
        switches: Where the family's way of computing follows the policy; None for the family's
            own way.
        config: What was bound; None for `none`.
        preset: Name of the preset the configuration came from.
        made_for_steps: Steps of a chunk that the preset was made for, where that is known.
    """

    name: str
    init_state: Callable[[RunShape, Scope], Any]
    plan_step: Callable[[Any, Any], tuple[Plan, Any]]
    observe: Callable[[Any, NDArray[np.float32]], Any] = _see_nothing
    weights: Callable[[Any], NDArray[np.float32] | None] = _no_weights
    check: Callable[[RunShape], None] = _fits_any
    scope: Literal["chunk", "window"] = "chunk"
    clean_pass: bool = True
    reset_history: bool = True
    motion: Literal["output", "latents"] = "output"
    extrapolation: float | None = None
    switches: Any = None
    config: Any = None
    preset: str | None = None
    made_for_steps: int | None = None


def none() -> Policy:
    """Recompute every token in every step: the baseline of every measurement.

    Returns:
        The policy; its state is the number of tokens.

    Example:
        >>> shape = RunShape(np.ones((2, 1), bool), (0,), 1, frames=2, positions=2, steps=2)
        >>> policy = none()
        >>> plan, state = policy.plan_step(policy.init_state(shape, Scope(0, 0, 0)), 0.0)
        >>> plan.recompute.tolist()
        [True, True, True, True]
    """
    return Policy("none", _count_tokens, _recompute_all)


def _count_tokens(shape: RunShape, scope: Scope) -> int:
    return shape.tokens


def _recompute_all(tokens: int, distance: float) -> tuple[Plan, int]:
    return Plan.full(tokens), tokens
