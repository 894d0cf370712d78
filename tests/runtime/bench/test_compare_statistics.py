"""The statistics of `mc-bench compare` on a real run, its rounds dealt out to two reports.

`data/sweep.json` is a report of `mc-bench run mini.bundle --engines --threads 1`. Its samples are
as they were written; folders are left out, and its summary of the kernel was reckoned anew.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_runtime.bench.compare import Comparison, compare_reports, read_report

SWEEP = Path(__file__).parent / "data" / "sweep.json"
PAIRS, NEEDED = 20, 19
PLANTED = 1.10
LEAST_MS = 1.0  # of an engine whose tenth is beyond the absolute threshold

Report = dict[str, Any]


@pytest.fixture(scope="module")
def sweep() -> Report:
    return read_report(SWEEP)


def deal(report: Report, rng: np.random.Generator) -> tuple[Report, Report]:
    """Two reports, each with half of the rounds: of every engine, the kernel's times with them."""
    rounds = len(report["engines"][0]["samples_ms"])
    halves = np.split(rng.permutation(rounds), 2)
    first, second = (_keep(report, half) for half in halves)
    return first, second


def _keep(report: Report, rounds: np.ndarray) -> Report:
    kept = copy.deepcopy(report)
    for entry in kept["engines"]:
        for times in ("samples_ms", "reference_ms"):
            entry[times] = [entry[times][number] for number in rounds]
    return kept


def plant(report: Report, number: int) -> Report:
    """The report with one engine slower."""
    changed = copy.deepcopy(report)
    entry = changed["engines"][number]
    entry["samples_ms"] = [PLANTED * sample for sample in entry["samples_ms"]]
    return changed


def verdicts(comparison: Comparison) -> list[str]:
    return [row.verdict for row in comparison.rows]


def test_the_report_is_of_a_whole_run(sweep: Report) -> None:
    assert not sweep["partial"]
    (rounds,) = {len(entry["samples_ms"]) for entry in sweep["engines"]}
    assert rounds == sweep["run"]["iterations"] and rounds % 2 == 0
    assert all(len(set(entry["samples_ms"])) > 0.9 * rounds for entry in sweep["engines"])


def test_nothing_changed_is_no_change_in_19_of_20(sweep: Report) -> None:
    rng = np.random.default_rng(0)
    found = [verdicts(compare_reports(*deal(sweep, rng))) for _ in range(PAIRS)]
    assert sum({*each} == {"no change"} for each in found) >= NEEDED


def test_a_tenth_more_in_one_engine_is_slower_in_that_row_alone_in_19_of_20(sweep: Report) -> None:
    rng = np.random.default_rng(0)
    medians = [np.median(entry["samples_ms"]) for entry in sweep["engines"]]
    long = [number for number, median in enumerate(medians) if median >= LEAST_MS]
    assert len(long) > 5
    found = 0
    for pair in range(PAIRS):
        number = long[pair % len(long)]
        before, after = deal(sweep, rng)
        found += verdicts(compare_reports(before, plant(after, number))) == [
            "slower" if row == number else "no change" for row in range(len(medians))
        ]
    assert found >= NEEDED
