"""How far the model's input moved since the step before, as the schedules measure it.

On SkyReels-V2 the measure is the blocks' modulation e0, which depends on the timestep and the fps
id alone: `DistanceTable` is computed once per run, before its first step. A policy turns the raw
relative change into an estimate of how much the blocks' output changes by `rescale`. On MAGI-1 it
is the embedded latents themselves: `InputDistance` is measured while the run goes on.
"""

__all__ = ["DistanceTable", "InputDistance", "rescale"]

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

EPSILON = 1e-8  # of the published code: TeaCache and MotionCache divide by mean + 1e-8


@dataclass(frozen=True)
class DistanceTable:
    """Change of the modulation from each step to the next; the same for every chunk and branch.

    Attributes:
        change: mean |e0_s - e0_(s-1)| of step s, 0 for the first; shape (N,).
        scale: mean |e0_(s-1)| of step s, 0 for the first; shape (N,).
    """

    change: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def from_modulation(cls, modulation: NDArray[np.float32]) -> "DistanceTable":
        """Measure the steps of a run.

        Args:
            modulation: e0 of every step's timestep, shape (N, 6, C).

        Returns:
            The table.

        Example:
            >>> table = DistanceTable.from_modulation(np.array([2.0, 3.0, 3.0]).reshape(3, 1, 1))
            >>> [round(table.of_step(step), 3) for step in range(3)]
            [0.0, 0.5, 0.0]
        """
        flat = modulation.reshape(len(modulation), -1).astype(np.float64)
        change = np.abs(np.diff(flat, axis=0)).mean(axis=1)
        return cls(np.append(0.0, change), np.append(0.0, np.abs(flat[:-1]).mean(axis=1)))

    def of_step(self, step: int) -> float:
        """Return mean |e0_s - e0_(s-1)| / (mean |e0_(s-1)| + 1e-8) of step s, from 0."""
        return float(self.change[step] / (self.scale[step] + EPSILON))

    def of_row(self, steps: Sequence[int]) -> float:
        """Return the relative change of several chunks together.

        Args:
            steps: The step of each, from 0; one that takes its first step does not count.

        Returns:
            The sum of their changes over the sum of their scales: the relative L1 distance of
            the modulation of all their frames at once.
        """
        chosen = [step for step in steps if step > 0]
        return float(self.change[chosen].sum() / (self.scale[chosen].sum() + EPSILON))


@dataclass(frozen=True)
class InputDistance:
    """Change of a chunk's embedded latents from one step to the next; measured when asked for.

    Attributes:
        now: Embedded tokens, shape (1, L, C).
        before: Those of the step before.

    Example:
        >>> before = np.array([[[1.0, 3.0], [0.0, 4.0]]], np.float32)
        >>> distance = InputDistance(before + 1, before)
        >>> distance.chunk, distance.tokens.tolist()
        (0.5, [0.5, 0.5])
    """

    now: NDArray[np.float32]
    before: NDArray[np.float32]

    @cached_property
    def chunk(self) -> float:
        """Relative change of the whole chunk: mean |now - before| / (mean |before| + 1e-8)."""
        return float(self._change.mean() / (self._scale.mean() + EPSILON))

    @cached_property
    def tokens(self) -> NDArray[np.float32]:
        """Relative change of each token for itself, shape (L,)."""
        relative: NDArray[np.float32] = self._change / (self._scale + np.float32(EPSILON))
        return relative

    @cached_property
    def _change(self) -> NDArray[np.float32]:
        """Of each token, over the channels."""
        change: NDArray[np.float32] = np.abs(self.now - self.before).mean(axis=2)[0]
        return change

    @cached_property
    def _scale(self) -> NDArray[np.float32]:
        scale: NDArray[np.float32] = np.abs(self.before).mean(axis=2)[0]
        return scale


def rescale(coefficients: Sequence[float], distance: float, clamp: bool) -> float:
    """Estimate the change of the blocks' output from the change of the modulation.

    Args:
        coefficients: Of the polynomial, highest power first.
        distance: Relative change, 0 or above.
        clamp: Whether an estimate below 0 counts as 0. The published polynomials are negative
            outside the range they were fitted on, and the published code accumulates that.

    Returns:
        The value of the polynomial.

    Source:
        TeaCache (arXiv 2411.19108), section 3.3.

    Example:
        >>> rescale((2.0, -1.0), 0.25, clamp=False), rescale((2.0, -1.0), 0.25, clamp=True)
        (-0.5, 0.0)
    """
    value = float(np.polyval(coefficients, distance))
    return max(value, 0.0) if clamp else value
