"""What the policy decides for one guidance branch of a window, asked for and written down.

Neighbours: `denoise` asks for the plan of a chunk's step and passes the motion of its output on;
the functions behind it are those of `motioncache.Policy`, the record is a `DecisionTrace`.
"""

__all__ = ["Decisions"]

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motioncache import DecisionTrace, DistanceTable, InputDistance, Plan, Policy, RunShape, Scope


@dataclass
class Decisions:
    """The policy's states of one branch in one window.

    Attributes:
        policy: Decides.
        table: Distances of the run's steps; None where they are measured as it goes.
        shape: Of the run.
        trace: Of the run; every decision is written into it.
        window: Number of the window in the run.
        branch: 0 cond, 1 uncond.
        states: By chunk, or one under None for a policy that decides for a whole window.
        row_plan: Row and plan of the last decision for a whole window.
    """

    policy: Policy
    table: DistanceTable | None
    shape: RunShape
    trace: DecisionTrace
    window: int
    branch: int
    states: dict[int | None, Any] = field(default_factory=dict)
    row_plan: tuple[int, Plan] | None = None

    def plan(
        self,
        row: int,
        chunk: int,
        steps: Mapping[int, int],
        measured: InputDistance | None = None,
    ) -> Plan:
        """Decide on the coming step of a chunk.

        Args:
            row: Of the run.
            chunk: Of the window.
            steps: The step of every chunk that is active in this row, from 0.
            measured: The distance of the step, where there is no table.

        Returns:
            The plan. A chunk's first step is computed in full: nothing is there to reuse.
        """
        at = row, self.branch, chunk
        with self._timed(at):
            if self.table is None:
                plan = self._step(chunk, measured)
            elif self.policy.scope == "window":
                plan = self._plan_row(row, steps, self.table)
            else:
                plan = self._step(chunk, self.table.of_step(steps[chunk]))
            if steps[chunk] == 0:
                plan = Plan.full(self.shape.tokens, plan.wants_motion)
        self.trace.step[row, chunk] = steps[chunk] + 1
        self.trace.recompute[at] = plan.recompute
        self.trace.distance[at] = plan.distance
        accumulated = np.asarray(plan.accumulated)
        self.trace.accumulated[at] = accumulated.min(), accumulated.mean(), accumulated.max()
        return plan

    def repeat(self, row: int, chunk: int, branch: int) -> None:
        """Write down that another branch computes the same tokens."""
        for record in (self.trace.recompute, self.trace.distance, self.trace.accumulated):
            record[row, branch, chunk] = record[row, self.branch, chunk]

    def observe(self, row: int, chunk: int, motion: NDArray[np.float32]) -> None:
        """Show the policy the motion (F, P) of a step's output, and write its weights down."""
        at = row, self.branch, chunk
        with self._timed(at):
            self.states[chunk] = self.policy.observe(self.states[chunk], motion)
        weights = self.policy.weights(self.states[chunk])
        if weights is not None:
            self.trace.weights[at] = weights

    def _plan_row(self, row: int, steps: Mapping[int, int], table: DistanceTable) -> Plan:
        """Decide once for all chunks of a row."""
        if self.row_plan is None or self.row_plan[0] != row:
            self.row_plan = row, self._step(None, table.of_row(list(steps.values())))
        return self.row_plan[1]

    def _step(self, chunk: int | None, distance: float | InputDistance | None) -> Plan:
        if chunk not in self.states:
            scope = Scope(self.window, self.branch, chunk)
            self.states[chunk] = self.policy.init_state(self.shape, scope)
        plan, self.states[chunk] = self.policy.plan_step(self.states[chunk], distance)
        return plan

    @contextmanager
    def _timed(self, at: tuple[int, int, int]) -> Generator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.trace.policy_ms[at] += 1e3 * (time.perf_counter() - start)
