"""The velocity of tokens that are not computed: a straight line through the last two that were.

A token whose blocks ran at steps a < b has at step s > b, with share e of its last rate of change,

    v(s) = v(b) + e * min(s - b, b - a) / (b - a) * (v(b) - v(a))

and v(b) where they ran once. It goes on for as many steps as the two lay apart and then stands
still: a slope between neighbouring steps errs more the farther it is followed. At e = 0 it keeps
its velocity. That a cached feature changes evenly along the run, so that a line through its last
values foretells it, is what arXiv 2503.06923 (TaylorSeer) found of the features of other models'
blocks; here the line is drawn through what the sampler takes of them. Neighbours:
`families.skyreels` asks.

Axes: L tokens of a chunk, K recomputed ones, c values of a token's patch of velocity.
"""

__all__ = ["VelocityTrend", "renew_trend"]

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Rows = NDArray[np.float32]
_Steps = NDArray[np.int64]


@dataclass(frozen=True)
class VelocityTrend:
    """What is known of the velocities of a chunk in a branch.

    Attributes:
        last: Of every token, as last computed, shape (L, c).
        before: As computed the time before; `last` where there was none.
        last_step: When that was, shape (L, 1).
        before_step: Likewise.
    """

    last: _Rows
    before: _Rows
    last_step: _Steps
    before_step: _Steps

    def at(self, step: int, share: float) -> _Rows:
        """Return the velocity of every token in a step, the last known one's or a later one.

        Args:
            step: Its number.
            share: e.

        Returns:
            Shape (L, c).

        Example:
            >>> trend = renew_trend(None, np.arange(2), np.float32([[1], [5]]), step=0)
            >>> trend = renew_trend(trend, np.array([0]), np.float32([[2]]), step=2)
            >>> trend.at(3, share=1.0).tolist(), trend.at(3, share=0.5).tolist()
            ([[2.5], [5.0]], [[2.25], [5.0]])
            >>> trend.at(4, share=1.0).tolist(), trend.at(9, share=1.0).tolist()
            ([[3.0], [5.0]], [[3.0], [5.0]])
        """
        apart = np.maximum(self.last_step - self.before_step, 1)  # where it is 0, so is the change
        steps = np.minimum(step - self.last_step, apart)
        ahead = np.float32(share) * (steps / apart).astype(np.float32)
        moved: _Rows = self.last + ahead * (self.last - self.before)
        return moved


def renew_trend(
    known: VelocityTrend | None, rows: NDArray[np.intp], velocity: _Rows, step: int
) -> VelocityTrend:
    """Take in the velocities that a step computed.

    Args:
        known: Of earlier steps; None where there was none, and every token is computed.
        rows: Which tokens were computed, shape (K,).
        velocity: Theirs, shape (K, c).
        step: Its number.

    Returns:
        What is known after it.
    """
    if known is None:
        steps = np.full((len(velocity), 1), step)
        return VelocityTrend(velocity, velocity, steps, steps)
    last, before = known.last.copy(), known.before.copy()
    last_step, before_step = known.last_step.copy(), known.before_step.copy()
    before[rows], before_step[rows] = last[rows], last_step[rows]
    last[rows], last_step[rows] = velocity, step
    return VelocityTrend(last, before, last_step, before_step)
