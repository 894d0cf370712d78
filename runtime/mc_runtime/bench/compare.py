"""Whether one report of `mc-bench run` is slower than another.

Neighbours: `samples` has the statistics; `mc-bench compare` asks.
"""

__all__ = ["Comparison", "Row", "compare_reports", "read_report"]

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_runtime.bench.latency_report import SCHEMA
from mc_runtime.bench.samples import Change, compare_samples

_FEWEST = 5  # samples of which a median means something


@dataclass(frozen=True)
class Row:
    """One thing that both reports measured.

    Attributes:
        name: With its backend.
        before_ms: Median of the first report.
        after_ms: Median of the second.
        change: In units of the reference kernel.
        verdict: `slower`, `faster`, `no change`, or `too few samples`.
    """

    name: str
    before_ms: float
    after_ms: float
    change: Change
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Two reports, side by side.

    Attributes:
        rows: What both measured.
        missing: What only one of them did.
        notes: What else differs: settings, bundle, machine, versions.
    """

    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def regressed(self) -> bool:
        """Whether anything is slower."""
        return any(row.verdict == "slower" for row in self.rows)


def read_report(path: Path) -> dict[str, Any]:
    """Load what an earlier `mc-bench run` measured.

    Args:
        path: JSON of `mc-bench run --engines` or `--generation`.

    Returns:
        The report.

    Raises:
        ValueError: It is no JSON, or of another schema.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        found = report.get("schema")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a report of mc-bench run, got: {error}. Pass its JSON."
        ) from error
    if found != SCHEMA:
        raise ValueError(
            f"{path}: expected schema {SCHEMA}, got {found}. Measure again with this version: "
            "mc-bench run --engines -o FILE."
        )
    checked: dict[str, Any] = report
    return checked


def compare_reports(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    relative: float = 0.05,
    absolute: float = 0.05,
) -> Comparison:
    """Compare what both reports measured.

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
    first, second = _entries(before), _entries(after)
    common = [name for name in first if name in second]
    if not common:
        raise ValueError(
            "reports: expected engines or generations that both have, got none. "
            "Measure both with the same --engines, --generation and --backend."
        )
    rows = []
    for name in common:
        mine, theirs = first[name], second[name]
        change = compare_samples(
            mine["samples_ms"],
            theirs["samples_ms"],
            (mine["reference_ms"], theirs["reference_ms"]),
            len(common),
        )
        fewest = min(len(mine["samples_ms"]), len(theirs["samples_ms"]))
        verdict = "too few samples" if fewest < _FEWEST else change.verdict(relative, absolute)
        rows.append(Row(name, _median(mine), _median(theirs), change, verdict))
    missing = sorted(first.keys() ^ second.keys())
    return Comparison(tuple(rows), tuple(missing), tuple(_differences(before, after)))


def _entries(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Everything with samples, by a name that says what it is."""
    engines = {f"{entry['name']} ({entry['backend']})": entry for entry in report["engines"]}
    whole = {
        f"generation, {entry['policy']} ({entry['backend']})": entry
        for entry in report["generation"]
    }
    return engines | whole


def _median(entry: Mapping[str, Any]) -> float:
    summary = entry["latency_ms"] if "latency_ms" in entry else entry["total_ms"]
    return float(summary["p50"])


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What else is not the same in both."""
    notes = []
    if before["bundle"]["hash"] != after["bundle"]["hash"]:
        notes.append("The bundles differ.")
    for part in ("settings", "environment"):
        notes += [
            f"{part}: {key} was {old}, is {new}."
            for key, old, new in _changed(before[part], after[part])
        ]
    for which, report in (("first", before), ("second", after)):
        if report["partial"]:
            notes.append(f"The {which} report is partial.")
        if report["reference_kernel"]["busy"]:
            notes.append(f"The machine was busy during the {which} report.")
    return notes


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Sequence[tuple[str, Any, Any]]:
    """Keys whose values differ, with both."""
    keys = [*old, *(key for key in new if key not in old)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]
