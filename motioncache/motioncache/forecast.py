"""The schedule as far as it is known before a run: until motion weights decide.

On SkyReels-V2 the distances depend on the timesteps alone, so every policy is predictable up to
the step whose motion it wants to see; on MAGI-1 they depend on what is generated, so it is up to
the first step that asks for one. `mc-inspect --policy` prints what comes out.
"""

__all__ = ["Step", "forecast_chunk", "forecast_unmeasured", "forecast_window"]

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from motioncache.distance import DistanceTable
from motioncache.policy import Plan, Policy, RunShape, Scope


@dataclass(frozen=True)
class Step:
    """A step, or a row of a window, of which the decision is known.

    Attributes:
        number: From 1.
        distance: Relative change of the modulation since the one before; NaN where it is another.
        plan: The decision.
    """

    number: int
    distance: float
    plan: Plan


def forecast_chunk(policy: Policy, shape: RunShape, table: DistanceTable) -> Iterator[Step]:
    """Follow a policy that decides chunk by chunk through the steps of any chunk.

    Args:
        policy: Of scope `chunk`.
        shape: Of the run.
        table: Of its distances.

    Yields:
        Steps from the first on, until the policy needs to see motion.
    """
    state = policy.init_state(shape, Scope(0, 0, 0))
    for step in range(shape.steps):
        distance = table.of_step(step)
        plan, state = policy.plan_step(state, distance)
        yield Step(step + 1, distance, plan)
        if plan.wants_motion:
            return


class _Unknown:
    """A distance that nobody knows yet: to look at it ends the forecast."""

    def __getattr__(self, name: str) -> Any:
        raise _NotKnownError


class _NotKnownError(Exception):
    """A policy asked for a distance."""


def forecast_unmeasured(policy: Policy, shape: RunShape) -> Iterator[Step]:
    """Follow a policy through the steps of any chunk without knowing a distance.

    Args:
        policy: Of scope `chunk`, whose distances are `InputDistance`s.
        shape: Of the run.

    Yields:
        Steps from the first on, until the policy needs to know a distance.
    """
    state = policy.init_state(shape, Scope(0, 0, 0))
    for step in range(shape.steps):
        try:
            plan, state = policy.plan_step(state, _Unknown())
        except _NotKnownError:
            return
        yield Step(step + 1, math.nan, plan)


def forecast_window(
    policy: Policy, shape: RunShape, table: DistanceTable, window: int = 0
) -> Iterator[Step]:
    """Follow a policy that decides row by row through a window.

    Args:
        policy: Of scope `window`.
        shape: Of the run.
        table: Of its distances.
        window: Number of the window.

    Yields:
        Its rows; a chunk that takes its first step in one is computed whatever the plan says.
    """
    state = policy.init_state(shape, Scope(window, 0, None))
    taken = np.cumsum(shape.active[shape.rows_of(window)], axis=0)
    for number, (counts, active) in enumerate(
        zip(taken, shape.active[shape.rows_of(window)], strict=True), start=1
    ):
        distance = table.of_row((counts[active] - 1).tolist())
        plan, state = policy.plan_step(state, distance)
        yield Step(number, distance, plan)
