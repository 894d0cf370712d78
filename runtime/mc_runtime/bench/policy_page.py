"""A comparison of policies as a person reads it: tables on the terminal, one page of HTML.

Neighbours: `policy_report.build_report` makes the report, `mc-bench run` prints and writes this.
"""

__all__ = ["draw_plot", "print_report", "render_page"]

import importlib
import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from mc_engines.errors import require
from mc_runtime.bench.tables import Tables, draw_svg, html_report, print_tables

Report = Mapping[str, Any]
_TIME = ("", "seconds", "speed-up", "by FLOPs", "verdict", "outside engines", "policy")
_WORK = (
    *("", "embed", "text", "text keys", "blocks", "head", "FLOPs", "to vanilla", "to none"),
    *("reused", "padding"),
)
_FIDELITY = (
    *("", "PSNR dB", "SSIM", "LPIPS", "moving PSNR dB", "moving SSIM", "moving LPIPS"),
    "identical frames",
)
_VANILLA, _CAUSAL = "every_chunk_every_row", "chunk_causal"


def _tables(report: Report) -> Tables:
    """Columns and rows by title; fidelity only where there are frames."""
    tables = {
        "time": (_TIME, _time_rows(report)),
        "work, in FLOPs of a run": (_WORK, _work_rows(report)),
        "fidelity to none": (_FIDELITY, _fidelity_rows(report)),
    }
    return {title: table for title, table in tables.items() if table[1]}


def _time_rows(report: Report) -> list[list[str]]:
    """A row per policy, and one of diffusers if that ran."""
    rows = [
        [
            entry["policy"],
            f"{entry['median_seconds']:.3g}",
            f"{entry['speedup']:.2f}",
            f"{entry['flops_ratio'][_CAUSAL]:.2f}",
            entry["verdict"] or "",
            f"{entry['outside_engines_share']:.1%}",
            f"{entry['policy_share']:.1%}",
        ]
        for entry in report["policies"]
    ]
    theirs, baselines = report["diffusers"], report["baseline_flops"]
    if theirs:
        promised = baselines[_CAUSAL]["total"] / baselines[_VANILLA]["total"]
        speeds = (f"{1 / theirs['none_speedup']:.2f}", f"{promised:.2f}")
        rows.append(["diffusers", f"{theirs['median_seconds']:.3g}", *speeds, "", "", ""])
    return rows


def _work_rows(report: Report) -> list[list[str]]:
    """Every chunk in every row, where a family does that; nothing skipped, `none`; the policies."""
    vanilla, none = (report["baseline_flops"][name] for name in (_VANILLA, _CAUSAL))
    rows = []
    if vanilla is not None:
        rows = [
            ["vanilla", *map(_count, vanilla.values()), *_ratios(vanilla, vanilla, none), "", ""]
        ]
    for entry in report["policies"]:
        work = entry["flops"]
        shares = (f"{entry[name]:.1%}" for name in ("reuse_ratio", "padding_waste"))
        counts = map(_count, work.values())
        rows.append([entry["policy"], *counts, *_ratios(work, vanilla, none), *shares])
    return rows


def _ratios(work: Mapping[str, int], *baselines: Mapping[str, int] | None) -> list[str]:
    return [
        "" if baseline is None else f"{baseline['total'] / work['total']:.2f}"
        for baseline in baselines
    ]


def _fidelity_rows(report: Report) -> list[list[str]]:
    """A row per policy; against diffusers, one of `none`. Nothing without frames."""
    rows = [
        _fidelity_row(entry["policy"], entry["fidelity"])
        for entry in report["policies"]
        if entry["fidelity"]
    ]
    theirs = report["diffusers"]
    if theirs and theirs["none_fidelity"]:
        rows.append(_fidelity_row("none, to diffusers", theirs["none_fidelity"]))
    return rows


def _fidelity_row(name: str, fidelity: Mapping[str, Any]) -> list[str]:
    whole, moving = fidelity["mean"]["whole"], fidelity["mean"]["moving"]
    identical = f"{whole['identical']} of {whole['frames']}"
    return [name, *_scores(whole), *_scores(moving), identical]


def _scores(scores: Mapping[str, Any]) -> list[str]:
    formats = {"psnr": ".1f", "ssim": ".4f", "lpips": ".4f"}
    return [
        "" if scores[name] is None else format(scores[name], form) for name, form in formats.items()
    ]


def _count(flops: float) -> str:
    """Operations with a prefix, three digits: 1.23G."""
    flops = float(f"{flops:.3g}")  # first, or 999.9 k would become 1e+03 k
    power = min(int(math.log10(flops)) // 3, 6) if flops >= 1 else 0
    return f"{flops / 1000**power:.3g}{' kMGTPE'[power].strip()}"


def print_report(report: Report, console: Console) -> None:
    """Print the tables and every caveat.

    Args:
        report: Of `build_report`.
        console: Where to.
    """
    print_tables(_tables(report), report["caveats"], console)


def render_page(report: Report) -> str:
    """Write the report as one page of HTML that needs no other file.

    Args:
        report: Of `build_report`.

    Returns:
        The page: plot, tables, settings, caveats.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    charts = [draw_svg(draw_plot(report))] if _fidelity_rows(report) else []
    return html_report(report, charts, _tables(report), ("settings", _facts(report)))


def _facts(report: Report) -> dict[str, str]:
    """Everything that the run depended on."""
    environment, kernel = report["environment"], report["reference_kernel"]["samples_ms"]
    versions = environment["versions"] | (report["diffusers"] or {}).get("versions", {})
    return {
        "bundle": f"{report['bundle']['path']}, {report['bundle']['hash'][:12]}",
        **{f"prompt {n}": prompt for n, prompt in enumerate(report["prompts"], 1)},
        "rounds": str(report["rounds"]),
        **{name: str(value) for name, value in report["settings"].items()},
        **{
            f"policy {entry['policy']}": ", ".join(entry["options"]) or "no settings"
            for entry in report["policies"]
        },
        "processor": f"{environment['cpu']}, {environment['logical_cores']} logical cores",
        "threads": str(environment["threads"] or "all physical cores"),
        "system": environment["platform"],
        "reference kernel": f"{min(kernel):.1f} to {max(kernel):.1f} ms",
        **versions,
    }


def draw_plot(report: Report) -> Any:
    """Draw PSNR over speed-up, a point per policy; over FLOPs if the machine was busy.

    Args:
        report: With frames.

    Returns:
        A matplotlib figure. A policy whose frames all equal those of `none` has no PSNR: it is
        drawn on the upper edge, as `none` itself is. Where nothing moves, no moving region is.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "bench")
    figure = importlib.import_module("matplotlib.figure").Figure((8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    busy = report["reference_kernel"]["busy"]
    axes.set_xlabel(
        "FLOPs of none / FLOPs (the machine was too busy to time)"
        if busy
        else "seconds of none / seconds"
    )
    axes.set_ylabel("PSNR to none, dB")
    for number, entry in enumerate(report["policies"]):
        ratio = entry["flops_ratio"][_CAUSAL] if busy else entry["speedup"]
        for region, face in (("whole", f"C{number}"), ("moving", "none")):
            scores = entry["fidelity"]["mean"][region]
            if not scores["frames"]:
                continue  # nothing moves
            psnr = scores["psnr"]
            place = (ratio, 1.0 if psnr is None else psnr)
            axes.plot(
                *place,
                "o" if psnr is not None else "^",
                color=f"C{number}",
                markerfacecolor=face,
                transform=axes.transData if psnr is not None else axes.get_xaxis_transform(),
                clip_on=False,
                label=f"{entry['policy']}" if region == "whole" else None,
            )
    axes.grid(alpha=0.3)
    axes.legend(
        title="filled: whole frame\nhollow: moving region\ntriangle: identical",
        loc="upper left",
        bbox_to_anchor=(1.02, 1),
        frameon=False,
    )
    return figure
