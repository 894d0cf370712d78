"""Statistics of samples: what is reported of them, and whether two sets differ.

Percentiles are those of numpy's default, `linear`.
"""

__all__ = ["PERCENTILE_METHOD", "Change", "compare_samples", "summarise"]

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PERCENTILE_METHOD = "linear"
_PERCENTILES = 50, 90, 95, 99
_RESAMPLES = 4000


def summarise(samples: Sequence[float]) -> dict[str, float]:
    """Describe samples.

    Args:
        samples: At least one.

    Returns:
        mean, std (of the population), min, max and percentiles p50, p90, p95, p99, in the unit of
        the samples.
    """
    values = np.asarray(samples, np.float64)
    percentiles = np.percentile(values, _PERCENTILES, method="linear").tolist()
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
        **{f"p{rank}": value for rank, value in zip(_PERCENTILES, percentiles, strict=True)},
    }


@dataclass(frozen=True)
class Change:
    """How samples changed from one report to another.

    Attributes:
        ratio: Of the medians of samples, each over the reference kernel beside it; above 1 is
            slower.
        low: Lower end of the ratio's interval.
        high: Upper end.
        milliseconds: By how much the median changed, at the first report's speed of the machine.
    """

    ratio: float
    low: float
    high: float
    milliseconds: float

    def verdict(self, relative: float, absolute: float) -> str:
        """Judge the change.

        Args:
            relative: Least change of the ratio that counts, such as 0.05.
            absolute: Least change in milliseconds that counts.

        Returns:
            `slower` or `faster` where the interval excludes 1 and the change exceeds both
            thresholds, else `no change`.
        """
        if abs(self.milliseconds) <= absolute:
            return "no change"
        if self.low > 1 and self.ratio > 1 + relative:
            return "slower"
        if self.high < 1 and self.ratio < 1 / (1 + relative):
            return "faster"
        return "no change"


def compare_samples(
    before: Sequence[float],
    after: Sequence[float],
    references: tuple[Sequence[float], Sequence[float]],
    tests: int = 1,
) -> Change:
    """Compare two sets of samples by their medians, in units of the reference kernel.

    Args:
        before: Milliseconds, one per round.
        after: Likewise, of the other report; the counts may differ.
        references: Milliseconds of the reference kernel beside each sample, of either report.
        tests: How many comparisons are made together: their intervals widen so that all hold
            together in 95 of 100 repetitions (Bonferroni).

    Returns:
        The change, with a percentile bootstrap interval; rounds are drawn, each sample with its
        reference. The draw is always the same.
    """
    rng = np.random.default_rng(0)
    sides = [
        np.asarray(samples, np.float64) / np.asarray(reference, np.float64)
        for samples, reference in zip((before, after), references, strict=True)
    ]
    first, second = (_draw_medians(rng, side) for side in sides)
    tail = 0.05 / 2 / tests
    low, high = np.quantile(second / first, (tail, 1 - tail)).tolist()
    medians = [float(np.median(side)) for side in sides]
    unit = float(np.median(references[0]))
    return Change(medians[1] / medians[0], low, high, (medians[1] - medians[0]) * unit)


def _draw_medians(rng: np.random.Generator, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Medians of resampled values, shape (resamples,)."""
    drawn = values[rng.integers(len(values), size=(_RESAMPLES, len(values)))]
    medians: NDArray[np.float64] = np.median(drawn, axis=1)
    return medians
