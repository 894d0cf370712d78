"""`mc-bench compare`: whether one report is slower than another, for a person and for CI."""

__all__ = ["compare_command"]

import json
import math
from dataclasses import asdict
from pathlib import Path

import click

from mc_engines.command import FAILURE, command
from mc_runtime.bench.compare import Comparison, compare_reports, read_report
from mc_runtime.bench.tables import print_tables
from mc_runtime.display import open_console
from mc_runtime.flags import INPUT

_PLAIN_WIDTH = 110  # columns where the output is not a terminal
_COLUMNS = ("", "before ms", "after ms", "ratio", "interval", "verdict")


@command("compare")
@click.argument("before", type=INPUT, metavar="A.json")
@click.argument("after", type=INPUT, metavar="B.json")
@click.option(
    "--relative",
    type=click.FloatRange(min=0),
    default=0.05,
    show_default=True,
    help="Least relative change that counts.",
)
@click.option(
    "--absolute",
    type=click.FloatRange(min=0),
    default=0.05,
    show_default=True,
    help="Least change in milliseconds that counts.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def compare_command(
    ctx: click.Context,
    before: Path,
    after: Path,
    relative: float,
    absolute: float,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare two reports of `mc-bench run`; exit 1 where B is slower than A."""
    comparison = compare_reports(
        read_report(before), read_report(after), relative=relative, absolute=absolute
    )
    if as_json:
        click.echo(json.dumps(asdict(comparison) | {"regressed": comparison.regressed}, indent=2))
    else:
        _print(comparison, relative, absolute, quiet)
    if comparison.regressed:
        ctx.exit(FAILURE)


def _print(comparison: Comparison, relative: float, absolute: float, quiet: bool) -> None:
    console = open_console(_PLAIN_WIDTH)
    rows = [
        [
            row.name,
            f"{row.before_ms:.3f}",
            f"{row.after_ms:.3f}",
            f"{row.change.ratio:.3f}",
            f"{row.change.low:.3f} to {row.change.high:.3f}",
            row.verdict,
        ]
        for row in comparison.rows
    ]
    notes = [] if quiet else _notes(comparison, relative, absolute)
    print_tables({"after, over before": (_COLUMNS, rows)}, notes, console)


def _notes(comparison: Comparison, relative: float, absolute: float) -> list[str]:
    """What a reader has to know before believing a verdict."""
    notes = [_describe_ratios(comparison)]
    if comparison.confidence is not None:
        notes += [
            "Intervals are bootstrapped from the samples of each report. Those of all rows that "
            f"are judged hold together in {math.floor(100 * comparison.confidence)} of 100 "
            "repetitions or more where nothing changed, as far as samples are independent; what "
            "differs from one start of the program to the next is not in them.",
            f"A verdict needs an interval without 1, more than {relative:.0%} and {absolute:g} ms.",
        ]
    notes += comparison.notes
    if comparison.missing:
        notes.append(f"In one report alone: {', '.join(comparison.missing)}.")
    return notes


def _describe_ratios(comparison: Comparison) -> str:
    by_kernel = "each sample over the reference kernel of its round"
    raw = [row.name for row in comparison.rows if not row.by_kernel]
    if len(raw) == len(comparison.rows):
        return "Ratios are those of medians, in milliseconds: no reference kernel was timed."
    but = f"; but in milliseconds, without one: {', '.join(raw)}" if raw else ""
    return f"Ratios are those of medians, {by_kernel}{but}."
