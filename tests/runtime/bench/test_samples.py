"""Statistics of samples: against numpy's and Python's own, and by planted changes."""

import itertools
import statistics

import numpy as np
import pytest

from mc_runtime.bench.samples import Change, compare_samples, confidence, summarise


def test_a_summary_is_that_of_the_standard_library() -> None:
    samples = [3.0, 1.0, 2.0, 10.0, 4.0]
    summary = summarise(samples)
    assert summary["mean"] == pytest.approx(statistics.fmean(samples))
    assert summary["std"] == pytest.approx(statistics.pstdev(samples))
    assert (summary["min"], summary["p50"], summary["max"]) == (1, statistics.median(samples), 10)
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    assert summary["p90"] == pytest.approx(deciles[-1])
    hundredths = statistics.quantiles(samples, n=100, method="inclusive")
    assert [summary["p95"], summary["p99"]] == pytest.approx([hundredths[94], hundredths[98]])


@pytest.mark.parametrize("speed", [0.5, 1.0, 3.0])
def test_a_faster_machine_is_no_change(speed: float) -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(2, 0.02, (2, 30))
    samples = [7 * each * rng.normal(1, 0.02, 30) for each in reference]
    change = compare_samples(samples[0], speed * samples[1], (reference[0], speed * reference[1]))
    assert change.low < 1 < change.high and change.ratio == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("ratio", "milliseconds", "expected"), [
    (1.10, 1.0, "slower"), (0.90, -1.0, "faster"), (1.04, 1.0, "no change"),
    (1.10, 0.04, "no change"), (0.96, -1.0, "no change"), (0.90, -0.04, "no change"),
])  # fmt: skip
def test_a_verdict_needs_both_thresholds(ratio, milliseconds, expected) -> None:
    narrow = Change(ratio, ratio - 0.01, ratio + 0.01, milliseconds)
    assert narrow.verdict(relative=0.05, absolute=0.05) == expected
    wide = Change(ratio, 0.8, 1.2, milliseconds)
    assert wide.verdict(relative=0.05, absolute=0.05) == "no change"


def test_more_comparisons_make_wider_intervals() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(10, 1, (2, 30))
    alone, among = (compare_samples(*samples, np.ones((2, 30)), tests) for tests in (1, 25))
    assert among.low < alone.low < alone.ratio < alone.high < among.high
    assert alone.ratio == pytest.approx(np.median(samples[1]) / np.median(samples[0]))


def test_an_interval_of_five_samples_reaches_as_far_as_they_do() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(10, 1, (2, 5))
    change = compare_samples(before, after, tests=12)
    ends = after.min() / before.max(), after.max() / before.min()
    assert (change.low, change.high) == pytest.approx(ends, rel=1e-6)


def test_the_confidence_is_what_orders_of_samples_leave() -> None:
    orders = list(itertools.combinations(range(10), 5))
    apart = [chosen for chosen in orders if chosen in (orders[0], orders[-1])]
    assert confidence([(5, 5)] * 12) == pytest.approx(1 - 12 * len(apart) / len(orders))
    assert confidence([(30, 30)] * 12) == confidence([(7, 9)]) == pytest.approx(0.95)
    assert confidence([(2, 2)] * 12) == 0


@pytest.mark.parametrize("count", [8, 30])
def test_intervals_hold_as_often_as_they_claim(count: int) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        change = compare_samples(*(1 + 0.05 * rng.exponential(size=(2, count))))
        held += change.low <= 1 <= change.high
    assert held >= 54  # of 57; fewer in 1 of 50 draws
