"""A report of engines and generations as a person reads it: on the terminal, and as a page.

Neighbours: `latency_report` makes the report, `tables` has the tables.
"""

__all__ = ["print_latency", "render_latency"]

import importlib
from collections.abc import Mapping
from statistics import median
from typing import Any

from rich.console import Console

from mc_engines.errors import require
from mc_runtime.bench.tables import Tables, draw_svg, html_report, print_tables

Report = Mapping[str, Any]
_ENGINES = ("", "tokens", "keys", "p50 ms", "p90", "p99", "std", "GFLOP/s", "GB/s", "to kernel")
_GENERATION = (
    *("", "first chunk ms", "between ms", "total ms", "frames/s", "s per video s", "VAE"),
    *("reused", "padding", "MB own", "MB mapped", "MB device"),
)


def _tables(report: Report) -> Tables:
    """Columns and rows by title, of what was measured."""
    tables = {
        "engines": (_ENGINES, [_engine_row(entry) for entry in report["engines"]]),
        "generations": (_GENERATION, [_generation_row(each) for each in report["generation"]]),
    }
    return {title: table for title, table in tables.items() if table[1]}


def _engine_row(entry: Mapping[str, Any]) -> list[str]:
    latency, cost = entry["latency_ms"], entry["cost"]
    rates = ["", ""]
    if cost is not None:
        rates = [f"{cost['flops_per_s'] / 1e9:.1f}", f"{cost['bytes_per_s'] / 1e9:.2f}"]
    kernel = [time for time in entry["reference_ms"] if time is not None]
    return [
        f"{entry['name']} ({entry['backend']})",
        str(entry["tokens"]),
        str(entry["keys"] or ""),
        *(f"{latency[name]:.3g}" for name in ("p50", "p90", "p99", "std")),
        *rates,
        f"{latency['p50'] / median(kernel):.2f}" if kernel else "",
    ]


def _generation_row(entry: Mapping[str, Any]) -> list[str]:
    between, peaks = entry["inter_chunk_ms"], entry["peak_bytes"]
    return [
        f"{entry['policy']} ({entry['backend']})",
        f"{entry['first_chunk_ms']['p50']:.0f}",
        "" if between is None else f"{between['p50']:.0f}",
        f"{entry['total_ms']['p50']:.0f}",
        f"{entry['frames_per_second']:.2f}",
        f"{entry['realtime_factor']:.2f}",
        *(f"{entry[name]:.0%}" for name in ("decode_share", "reuse_ratio", "padding_waste")),
        *(
            f"{peaks[kind] / 1e6:.0f}" if kind in peaks else ""
            for kind in ("anonymous", "mapped", "device")
        ),
    ]


def print_latency(report: Report, console: Console) -> None:
    """Print the tables and every caveat.

    Args:
        report: Of `build_latency_report`.
        console: Where to.
    """
    print_tables(_tables(report), report["caveats"], console)


def render_latency(report: Report) -> str:
    """Write the report as one page of HTML that needs no other file.

    Args:
        report: Of `build_latency_report`.

    Returns:
        The page: charts, tables, caveats, facts.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    charts = []
    if report["engines"]:
        charts.append(draw_svg(_draw_engines(report)))
    if report["generation"]:
        charts.append(draw_svg(_draw_chunks(report)))
    return html_report(report, charts, _tables(report), ("measured on", _facts(report)))


def _facts(report: Report) -> dict[str, str]:
    """Everything that the times depended on."""
    environment, kernel = report["environment"], report["reference_kernel"]
    gpu = environment["gpu"]
    facts = {
        "bundle": f"{report['bundle']['path']}, {report['bundle']['hash'][:12]}",
        "measured": report["created"],
        "command": " ".join(report["command"]),
        **{name: str(value) for name, value in report["settings"].items()},
        **_describe_run(report["run"]),
        "processor": f"{environment['cpu']}, {environment['logical_cores']} logical cores",
        "threads": str(environment["threads"] or "all physical cores"),
        "GPU": "none" if gpu is None else _describe_gpu(gpu),
        "system": environment["platform"],
        **environment["versions"],
    }
    if kernel["median_ms"] is not None:
        facts["reference kernel"] = (
            f"{kernel['median_ms']:.2f} ms for {kernel['size']} by {kernel['size']}, "
            f"{kernel['quiet_rounds']:.0%} of the rounds quiet"
        )
    for name, values in report["telemetry"]["samples"].items():
        known = [value for value in values if value is not None]
        facts[name] = f"{min(known):.4g} to {max(known):.4g}" if known else "not known"
    return facts


def _describe_run(run: Mapping[str, Any]) -> dict[str, str]:
    """What was asked for besides the settings of the video, as far as it applies."""
    plain = {
        name: str(value) for name, value in run.items() if name != "policies" and value is not None
    }
    policies = {
        f"policy {name}": ", ".join(f"{key}={value}" for key, value in settings.items())
        for name, settings in run["policies"].items()
    }
    return plain | {name: settings or "no settings" for name, settings in policies.items()}


def _describe_gpu(gpu: Mapping[str, Any]) -> str:
    """Name and driver, as far as the driver tells."""
    return f"{gpu['name'] or 'name not known'}, driver {gpu['driver'] or 'not known'}"


def _draw_engines(report: Report) -> Any:
    """Median of every case, with a line from its least time to the 99th percentile."""
    require("matplotlib", "bench")
    entries = report["engines"]
    figure = importlib.import_module("matplotlib.figure").Figure(
        (8, 0.6 + 0.28 * len(entries)), layout="constrained"
    )
    axes = figure.add_subplot()
    backends = list(dict.fromkeys(entry["backend"] for entry in entries))
    for place, entry in enumerate(entries):
        latency, colour = entry["latency_ms"], f"C{backends.index(entry['backend'])}"
        axes.barh(place, latency["p50"], color=colour, alpha=0.8)
        axes.plot([latency["min"], latency["p99"]], [place, place], color="black", linewidth=1)
    axes.set_yticks(range(len(entries)), [_engine_row(entry)[0] for entry in entries], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms: median; the line goes from the least to the 99th percentile")
    axes.grid(axis="x", alpha=0.3)
    return figure


def _draw_chunks(report: Report) -> Any:
    """Time of each chunk in the order of the video, a line per policy and backend."""
    require("matplotlib", "bench")
    entries = report["generation"]
    figure = importlib.import_module("matplotlib.figure").Figure((8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for entry in entries:
        runs = entry["chunks_ms"]
        medians = [sorted(times)[len(times) // 2] for times in zip(*runs, strict=True)]
        numbers = range(1, len(medians) + 1)
        axes.plot(numbers, medians, "o-", label=f"{entry['policy']} ({entry['backend']})")
    axes.set_xlabel("chunk")
    axes.xaxis.set_major_locator(
        importlib.import_module("matplotlib.ticker").MaxNLocator(integer=True)
    )
    axes.set_ylabel("ms since the chunk before")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
