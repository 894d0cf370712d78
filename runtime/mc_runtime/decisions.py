"""What the policy decided for one guidance branch of a window, and what it remembers of it.

Neighbours: `denoise` asks for the plan of a chunk's step and passes the motion of its output on;
the functions behind it are those of `motioncache.Policy`.
"""

__all__ = ["Decisions"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motioncache import DistanceTable, Plan, Policy, RunShape, Scope


@dataclass
class Decisions:
    """The policy's states of one branch in one window.

    Attributes:
        policy: Decides.
        table: Distances of the run's steps.
        shape: Of the run.
        window: Number of the window in the run.
        branch: 0 cond, 1 uncond.
        states: By chunk, or one under None for a policy that decides for a whole window.
        row_plan: Row and plan of the last decision for a whole window.
    """

    policy: Policy
    table: DistanceTable
    shape: RunShape
    window: int
    branch: int
    states: dict[int | None, Any] = field(default_factory=dict)
    row_plan: tuple[int, Plan] | None = None

    def plan(self, row: int, chunk: int, steps: Mapping[int, int]) -> Plan:
        """Decide on the coming step of a chunk.

        Args:
            row: Of the window.
            chunk: Of the window.
            steps: The step of every chunk that is active in this row, from 0.

        Returns:
            The plan. A chunk's first step is computed in full: it has no residual.
        """
        if self.policy.scope == "window":
            plan = self._plan_row(row, steps)
        else:
            plan = self._step(chunk, self.table.of_step(steps[chunk]))
        return plan if steps[chunk] else Plan(np.ones(self.shape.tokens, np.bool_))

    def _plan_row(self, row: int, steps: Mapping[int, int]) -> Plan:
        """Decide once for all chunks of a row."""
        if self.row_plan is None or self.row_plan[0] != row:
            self.row_plan = row, self._step(None, self.table.of_row(list(steps.values())))
        return self.row_plan[1]

    def _step(self, chunk: int | None, distance: float) -> Plan:
        if chunk not in self.states:
            scope = Scope(self.window, self.branch, chunk)
            self.states[chunk] = self.policy.init_state(self.shape, scope)
        plan, self.states[chunk] = self.policy.plan_step(self.states[chunk], distance)
        return plan

    def observe(self, chunk: int, motion: NDArray[np.float32]) -> None:
        """Pass on the motion (F, P) of a step's output."""
        self.states[chunk] = self.policy.observe(self.states[chunk], motion)

    def weights(self, chunk: int) -> NDArray[np.float32] | None:
        """Return the motion weights (L,) in force; None where there are none."""
        state = self.states.get(chunk)
        return None if state is None else self.policy.weights(state)
