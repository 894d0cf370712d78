"""Whether one report of `mc-bench run` is slower than another.

Neighbours: `samples` has the statistics; `mc-bench compare` asks.
"""

__all__ = ["Comparison", "Row", "compare_reports", "read_report"]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mc_runtime.bench.latency_report import SCHEMA
from mc_runtime.bench.reference import (
    LEAST_QUIET,
    QUIET_SPREAD,
    find_quiet_rounds,
    is_busy,
    kernel_by_round,
)
from mc_runtime.bench.samples import Change, compare_samples, confidence
from mc_runtime.bench.schemas import find_fault
from mc_runtime.input_file import read_json

FEWEST = 5  # samples of which a median means something
_NAMES = {"engines": "{name} ({backend})", "generation": "generation, {policy} ({backend})"}
_WHAT = "a report of mc-bench run --engines or --generation"
_REMEDY = "Measure again with this version: mc-bench run --engines -o FILE."
_NOTHING = "nothing"


@dataclass(frozen=True)
class Row:
    """One thing that both reports measured.

    Attributes:
        name: With its backend.
        before_ms: Median of the first report.
        after_ms: Median of the second.
        change: In units of the reference kernel, or in milliseconds where it was not timed.
        by_kernel: Which of both.
        verdict: `slower`, `faster` or `no change`; `too few samples` or `busy machine` where it is
            not judged.
    """

    name: str
    before_ms: float
    after_ms: float
    change: Change
    by_kernel: bool
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Two reports, side by side.

    Attributes:
        rows: What both measured.
        confidence: Least chance that the intervals of all rows that are judged hold, where nothing
            changed; None where no row is.
        missing: What only one of them did.
        notes: What else differs: settings, bundle, machine, versions; and what was not judged.
    """

    rows: tuple[Row, ...]
    confidence: float | None
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        """Whether anything is slower."""
        return any(row.verdict == "slower" for row in self.rows)


@dataclass(frozen=True)
class _Entry:
    """Something that was measured.

    Attributes:
        samples: Milliseconds, one per quiet round; of every round where the kernel was not timed.
        kernel: Median of the reference kernel's milliseconds in each of these rounds; None where it
            was not timed, beside a GPU.
        median: Of the samples.
        busy: Whether too few rounds of this part of the report were quiet.
    """

    samples: Sequence[float]
    kernel: Sequence[float] | None
    median: float
    busy: bool


def read_report(path: Path) -> dict[str, Any]:
    """Load what an earlier `mc-bench run` measured.

    Args:
        path: JSON of `mc-bench run --engines` or `--generation`.

    Returns:
        The report.

    Raises:
        ValueError: It is no JSON, of another schema, or does not follow its schema.
        MissingExtraError: jsonschema is not installed.
    """
    report = read_json(path, SCHEMA, _WHAT, _REMEDY)
    fault = find_fault("latency", report) or _find_uneven(report)
    if fault is not None:
        raise ValueError(f"{path}: expected {_WHAT}, got one in which {fault}. {_REMEDY}")
    return report


def compare_reports(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    relative: float = 0.05,
    absolute: float = 0.05,
) -> Comparison:
    """Compare what both reports measured.

    A sample counts in units of the reference kernel, of which the median of the sample's round is
    taken: a single time of it varies as much as what it is to steady. Only quiet rounds count (see
    `find_quiet_rounds`): shares of a machine that something else uses are not the same for a short
    kernel and a long engine. Where they are too few in either report, nothing is judged.

    Args:
        before: A report.
        after: A later one.
        relative: Least relative change that counts.
        absolute: Least change in milliseconds that counts.

    Returns:
        A row for each engine and generation that is in both.

    Raises:
        ValueError: They have nothing in common.
    """
    first, second = _list_entries(before), _list_entries(after)
    pairs = {name: (first[name], second[name]) for name in first if name in second}
    if not pairs:
        raise ValueError(
            "reports: expected engines or generations that both have, got none. "
            "Measure both with the same --engines, --generation and --backend."
        )
    refused = {name: _refuse(*pair) for name, pair in pairs.items()}
    judged = [
        (len(mine.samples), len(theirs.samples))
        for name, (mine, theirs) in pairs.items()
        if refused[name] is None
    ]
    rows = []
    for name, (mine, theirs) in pairs.items():
        timed = mine.kernel is not None and theirs.kernel is not None
        kernels = (mine.kernel or (), theirs.kernel or ()) if timed else None
        change = compare_samples(mine.samples, theirs.samples, kernels, max(1, len(judged)))
        verdict = refused[name] or change.verdict(relative, absolute)
        rows.append(Row(name, mine.median, theirs.median, change, timed, verdict))
    return Comparison(
        tuple(rows),
        confidence(judged) if judged else None,
        tuple(sorted(first.keys() ^ second.keys())),
        (
            *_explain_refusals(refused),
            *_compare_kernels(pairs.values()),
            *_list_differences(before, after),
        ),
    )


def _list_entries(report: Mapping[str, Any]) -> dict[str, _Entry]:
    """Everything with samples, by a name that says what it is."""
    entries = {}
    for part, name in _NAMES.items():
        kernels = [entry["reference_ms"] for entry in report[part]]
        by_round = kernel_by_round(kernels)
        quiet, busy = find_quiet_rounds(by_round), is_busy(by_round)
        for entry in report[part]:
            samples, kernel = entry["samples_ms"], entry["reference_ms"]
            timed = bool(kernel) and None not in kernel
            rounds = [number for number in quiet if number < len(samples)] if timed else ()
            entries[name.format(**entry)] = _Entry(
                [samples[number] for number in rounds] if timed else samples,
                [by_round[number] for number in rounds] if timed else None,
                float(np.median(samples)),
                timed and busy,
            )
    return entries


def _refuse(before: _Entry, after: _Entry) -> str | None:
    """Why a pair is not judged."""
    if before.busy or after.busy:
        return "busy machine"
    few = min(len(before.samples), len(after.samples)) < FEWEST
    return "too few samples" if few else None


def _explain_refusals(refused: Mapping[str, str | None]) -> Iterator[str]:
    """What can be done about each reason."""
    if "too few samples" in refused.values():
        yield (
            f"Fewer than {FEWEST} samples of quiet rounds are not judged. Measure with more: "
            "--iterations for --engines, --rounds for --generation, of which --quick takes 1."
        )
    if "busy machine" in refused.values():
        yield (
            f"In more than {1 - LEAST_QUIET:.0%} of the rounds of a report the reference kernel "
            f"took over {QUIET_SPREAD} times as long as in the fastest: something else ran, and "
            "nothing is judged. Measure again when the machine is quiet."
        )


def _compare_kernels(pairs: Iterable[tuple[_Entry, _Entry]]) -> Iterator[str]:
    """Say whether the machine was another, or in another state."""
    ratios = [
        float(np.median(theirs.kernel) / np.median(mine.kernel))
        for mine, theirs in pairs
        if mine.kernel is not None and theirs.kernel is not None
    ]
    ratio = float(np.median(ratios)) if ratios else 1.0
    if max(ratio, 1 / ratio) > QUIET_SPREAD:
        yield (
            f"The reference kernel took {ratio:.2f} times as long in the second report: ratios "
            "hold as far as everything slows down as it does."
        )


def _list_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What else is not the same in both."""
    notes = []
    if before["bundle"]["hash"] != after["bundle"]["hash"]:
        notes.append("The bundles differ.")
    for part in ("settings", "run", "environment"):
        old, new = (dict(_flatten(report[part])) for report in (before, after))
        names = [*old, *(name for name in new if name not in old)]
        pairs = [(name, old.get(name, _NOTHING), new.get(name, _NOTHING)) for name in names]
        notes += [f"{part}: {name} was {a}, is {b}." for name, a, b in pairs if a != b]
    for which, report in (("first", before), ("second", after)):
        if report["partial"]:
            notes.append(f"The {which} report is partial.")
    return notes


def _flatten(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Values by the names that lead to them, such as `policies.flowcache.threshold`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _find_uneven(report: Mapping[str, Any]) -> str | None:
    """Say which entry has not as many times of the reference kernel as samples; a schema cannot."""
    for part in _NAMES:
        for number, entry in enumerate(report[part]):
            kernel = entry["reference_ms"]
            if kernel is not None and len(kernel) != len(entry["samples_ms"]):
                return f"$.{part}[{number}].reference_ms: is not as long as samples_ms"
    return None
