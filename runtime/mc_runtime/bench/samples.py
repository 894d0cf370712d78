"""Statistics of samples: what is reported of them, and whether two sets differ.

Percentiles are those of numpy's default, `linear`.
"""

__all__ = ["PERCENTILE_METHOD", "Change", "compare_samples", "confidence", "summarise"]

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

PERCENTILE_METHOD = "linear"
_PERCENTILES = 50, 90, 95, 99
_RESAMPLES = 20_000
_MISSED = 0.05  # chance that intervals made together do not all hold


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
        ratio: Of the medians of samples, each in units of the reference kernel where there is one;
            above 1 is slower.
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
    references: tuple[Sequence[float], Sequence[float]] | None = None,
    tests: int = 1,
) -> Change:
    """Compare two sets of samples by their medians, in units of the reference kernel.

    Args:
        before: Milliseconds, one per round.
        after: Likewise, of the other report; the counts may differ.
        references: Milliseconds of the reference kernel beside each sample, of either report; None
            compares the milliseconds themselves.
        tests: How many comparisons are judged together: their intervals widen (Bonferroni).
            `confidence` says what they hold.

    Returns:
        The change, with a percentile bootstrap interval, expanded for few samples; rounds are
        drawn, each sample with its reference. The draw is always the same.

    Source:
        Hesterberg, What Teachers Should Know About the Bootstrap, 2015: the expanded percentile
        interval, here by the smaller of both counts.
    """
    rng = np.random.default_rng(0)
    units = references
    if units is None:
        units = np.ones(len(before)).tolist(), np.ones(len(after)).tolist()
    sides = [
        np.asarray(samples, np.float64) / np.asarray(reference, np.float64)
        for samples, reference in zip((before, after), units, strict=True)
    ]
    first, second = (_draw_medians(rng, side) for side in sides)
    tail = _expand(_MISSED / 2 / tests, min(map(len, sides)))
    low, high = np.quantile(second / first, (tail, 1 - tail)).tolist()
    medians = [float(np.median(side)) for side in sides]
    unit = float(np.median(units[0]))
    return Change(medians[1] / medians[0], low, high, (medians[1] - medians[0]) * unit)


def confidence(counts: Iterable[tuple[int, int]]) -> float:
    """Say how often the intervals of comparisons that were made together all hold.

    An interval ends where the samples do, so it misses 1 whenever all samples of one side lie above
    all of the other. By chance alone that is one of the `comb(n + m, n)` orders of n and m samples,
    and so is the reverse: with 5 on either side both are 0.8 % of the repetitions, more than each
    of 7 comparisons may miss for all of them to hold in 95 %.

    Args:
        counts: Samples of either side, of every comparison.

    Returns:
        The least chance where nothing changed, 0.95 at most. It counts on samples that are
        independent, and on a machine that is in the same state for both sides.

    Example:
        >>> [round(confidence([(n, n)] * 12), 3) for n in (5, 6, 30)]
        [0.905, 0.95, 0.95]
    """
    counts = list(counts)
    missed = (max(_MISSED / len(counts), 2 / math.comb(n + m, n)) for n, m in counts)
    return max(0.0, 1 - sum(missed))


def _expand(tail: float, count: int) -> float:
    """Share that lies beyond an end, so that intervals of few samples are as wide as Student's."""
    if count < 2:
        return 0.0
    z, freedom = -NormalDist().inv_cdf(tail), count - 1
    # Student's quantile from the normal one (Abramowitz and Stegun, 26.7.5).
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return NormalDist().cdf(-math.sqrt(count / freedom) * t)


def _draw_medians(rng: np.random.Generator, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Medians of resampled values, shape (resamples,)."""
    # A resample takes values at uniform places; its median is at the middle one, or between the
    # middle two. The middle of uniform numbers follows a beta distribution: no other is drawn.
    count = len(values)
    below, above = (count + 1) // 2, count // 2 + 1  # middle ranks, from 1; one if count is odd
    upper = rng.beta(above, count + 1 - above, _RESAMPLES)
    lower = upper if below == above else upper * rng.beta(below, 1, _RESAMPLES)
    ordered = np.sort(values)
    places = [(count * each).astype(np.intp).clip(max=count - 1) for each in (lower, upper)]
    medians: NDArray[np.float64] = ordered[places].mean(axis=0)
    return medians
