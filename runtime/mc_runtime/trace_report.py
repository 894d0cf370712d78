"""A run's trace in numbers, and as one page of HTML that needs no other file.

Neighbours: `mc-inspect --trace` prints `summarise` and writes `report_page`; `overlay` knows the
place of the frames that the page shows beside the decisions.
"""

__all__ = ["describe", "list_chunks", "report_page", "summarise"]

import html
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.errors import require
from mc_runtime.overlay import Layout, Pixels, free_steps
from mc_runtime.video import read_frames
from motioncache import DecisionTrace, Mode

_MOMENTS = 8  # rows of the run that are drawn token by token
_THUMBNAIL = 240  # pixels across, at most
_DPI = 110
_SHARE_MAP, _WEIGHT_MAP = "viridis", "cividis"  # uniform, and safe for the colour-blind
_IDLE = "#e4e4e4"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; }
thead th { border-bottom: 1px solid #999; } tbody th { font-weight: normal; color: #555; }
td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; } figure { margin: 0; } p, figcaption { max-width: 50rem; }
"""


def summarise(trace: DecisionTrace) -> dict[str, Any]:
    """Count what a run did.

    Args:
        trace: Of the run.

    Returns:
        JSON-ready: `policy`, `bundle`, `interrupted` (None where the trace does not say), sizes,
        passes by mode, shares of the tokens of all steps (`recomputed`), of those in which the
        policy had a choice (`reused_after_warmup`), of the rows of partial passes that were padding
        (`padding`), milliseconds, and `chunks` with the share recomputed per branch. A share is
        None where nothing counts into it.
    """
    run, partial = trace.run, trace.mode == Mode.PARTIAL
    ones = int((trace.recompute[partial] == 1).sum())
    return {
        "policy": run["policy"],
        "bundle": run.get("bundle"),
        "interrupted": run.get("interrupted"),
        "steps": run["steps"],
        "rows": len(trace.mode),
        "windows": len(trace.window_start),
        "branches": trace.mode.shape[1],
        "tokens_per_chunk": trace.recompute.shape[3],
        "passes": {
            kind.name.lower(): int((trace.mode == kind).sum()) for kind in Mode if kind >= 0
        },
        "recomputed": _share(trace.recompute),
        "reused_after_warmup": trace.reused(),
        "padding": 1 - ones / int(trace.bucket[partial].sum()) if partial.any() else None,
        "milliseconds": {
            "engines": float(trace.engine_ms.sum(dtype=float)),
            "host": float(trace.host_ms.sum(dtype=float)),
            "policy": float(trace.policy_ms.sum(dtype=float)),
        },
        "chunks": [_summarise_chunk(trace, *place) for place in _chunks(trace)],
    }


def _chunks(trace: DecisionTrace) -> list[tuple[int, int]]:
    """Window and chunk of every chunk of every window."""
    size = trace.run["frames"]
    return [
        (window, chunk)
        for window, plan in enumerate(trace.run["windows"])
        for chunk in range(plan["frames"] // size)
    ]


def _summarise_chunk(trace: DecisionTrace, window: int, chunk: int) -> dict[str, Any]:
    rows = trace.rows_of(window)
    masks = trace.recompute[rows, :, chunk]
    return {
        "window": window,
        "chunk": chunk,
        "recomputed": {
            name: _share(masks[:, branch]) for branch, name in enumerate(trace.branch_names)
        },
        "engine_ms": float(trace.engine_ms[rows, :, chunk].sum(dtype=float)),
    }


def _share(masks: NDArray[np.int8]) -> float | None:
    """Share of ones among what is not -1."""
    taken = int((masks >= 0).sum())
    return int((masks == 1).sum()) / taken if taken else None


def report_page(trace: DecisionTrace, video: Path | None) -> str:
    """Draw a run.

    Args:
        trace: Of the run.
        video: Its video; None leaves the frames out.

    Returns:
        HTML with everything in it: charts as PNG, no links.

    Raises:
        ValueError: The video is none.
        OSError: The video cannot be read.
        MissingExtraError: matplotlib, or PyAV for a video, is not installed.
    """
    summary, layout = summarise(trace), Layout.of(trace)
    thumbnails = {} if video is None else _read_thumbnails(trace, layout, video)
    name = summary["policy"]["name"]
    sections = [
        f"<h1>Schedule of a run: {html.escape(name)}</h1>",
        _table(describe(summary)),
        "<h2>Which chunk was computed when</h2>",
        _image(_draw_schedule(trace), "Share of each chunk's tokens recomputed in every row"),
        "<p>One cell per row of the schedule and chunk; the colour is the share of its tokens that "
        "went through the blocks. Grey: the chunk took no step. Diamonds: clean passes of finished "
        "chunks.</p>",
        "<h2>What moved, and what was recomputed</h2>",
        _motion_text(trace, bool(thumbnails)),
        *(
            _image(_draw_motion(trace, window, rows, thumbnails), f"Window {window}")
            for window, rows in _moments(trace).items()
        ),
        "<h2>Chunks</h2>",
        _chunk_table(summary),
        "<h2>Settings of the policy</h2>",
        _table(_settings(summary["policy"])),
    ]
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>Schedule of a run: {html.escape(name)}</title>\n<style>{_STYLE}</style>\n"
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def describe(summary: Mapping[str, Any]) -> dict[str, str]:
    """Put the totals of a summary into words, for the page and the terminal.

    Args:
        summary: From `summarise`.

    Returns:
        What is said, by what it is about.
    """
    policy, spent = summary["policy"], summary["milliseconds"]
    modes = (f"{count} {mode}" for mode, count in summary["passes"].items())
    return {
        "policy": policy["name"] + (f":{policy['preset']}" if policy["preset"] else ""),
        "bundle": (summary["bundle"] or "not known")[:12],
        "run": f"{summary['windows']} windows, {summary['rows']} rows, {summary['steps']} steps, "
        f"{summary['branches']} branches, {summary['tokens_per_chunk']} tokens per chunk"
        + (", interrupted" if summary["interrupted"] else ""),
        "passes": ", ".join(modes),
        "tokens recomputed": _format_share(summary["recomputed"]),
        "reused after the warm-up": _format_share(summary["reused_after_warmup"]),
        "padding of partial passes": _format_share(summary["padding"]),
        "time": f"{spent['engines'] / 1e3:.2f} s in engines, {spent['host'] / 1e3:.2f} s elsewhere "
        f"({spent['policy'] / 1e3:.3f} s of it in the policy)",
    }


def _format_share(share: float | None) -> str:
    """Write a share as a percentage, and a hyphen where nothing counts into it."""
    return "-" if share is None else f"{share:.1%}"


def _settings(policy: Mapping[str, Any]) -> dict[str, str]:
    config = policy["config"] or {"none": "as this policy has none"}
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        for name, value in config.items()
    }


def _motion_text(trace: DecisionTrace, frames: bool) -> str:
    weights = (
        "the motion weights, and below them "
        if not np.isnan(trace.weights).all()
        else "no motion weights, as this policy had none, but "
    )
    seen = (
        "The top line shows a frame of each chunk." if frames else "Frames are missing: no video."
    )
    return (
        f"<p>{seen} Each further pair of lines is a row of the run: {weights}the share of the "
        "branches that recomputed the token. Both are those of the latent frame in the middle of "
        "the chunk; what took no step, or has no weights yet, is left out.</p>"
    )


def _table(values: Mapping[str, str]) -> str:
    lines = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in values.items()
    )
    return f"<table><tbody>{''.join(lines)}</tbody></table>"


def list_chunks(summary: Mapping[str, Any]) -> list[list[str]]:
    """Put the chunks of a summary into words, for the page and the terminal.

    Args:
        summary: From `summarise`.

    Returns:
        The heads of the columns, then a line per chunk of every window.
    """
    names = list(summary["chunks"][0]["recomputed"])
    lines = [["window", "chunk", *(f"recomputed, {name}" for name in names), "seconds in engines"]]
    for chunk in summary["chunks"]:
        shares = [_format_share(chunk["recomputed"][name]) for name in names]
        seconds = f"{chunk['engine_ms'] / 1e3:.2f}"
        lines.append([str(chunk["window"]), str(chunk["chunk"]), *shares, seconds])
    return lines


def _chunk_table(summary: Mapping[str, Any]) -> str:
    heads, *chunks = list_chunks(summary)
    lines = "".join(_line("td", chunk) for chunk in chunks)
    return f"<table><thead>{_line('th', heads)}</thead><tbody>{lines}</tbody></table>"


def _line(tag: str, cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _image(figure: Any, text: str) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    data = b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></figure>'


def _read_thumbnails(trace: DecisionTrace, layout: Layout, video: Path) -> dict[int, Pixels]:
    """By latent frame, a small picture of those that stand for their chunks."""
    wanted = {}
    for window, chunk in _chunks(trace):
        place = _middle(trace, window, chunk)
        frames = layout.pixel_frames(place)
        wanted[frames[len(frames) // 2]] = place
    thumbnails = {}
    for number, pixels in enumerate(read_frames(video)):
        if number in wanted:
            stride = -(-pixels.shape[1] // _THUMBNAIL)
            thumbnails[wanted[number]] = pixels[::stride, ::stride]
    return thumbnails


def _middle(trace: DecisionTrace, window: int, chunk: int) -> int:
    """The latent frame of the video in the middle of a chunk."""
    size: int = trace.run["frames"]
    first: int = trace.run["windows"][window]["first"]
    return first + chunk * size + size // 2


def _moments(trace: DecisionTrace) -> dict[int, list[int]]:
    """By window, rows spread evenly over those in which the policy had a choice."""
    rows = np.flatnonzero(free_steps(trace).any(axis=(1, 2)))
    spread = np.linspace(0, len(rows) - 1, min(_MOMENTS, len(rows))).round().astype(int)
    moments = {}
    for window in range(len(trace.window_start)):
        span = trace.rows_of(window)
        chosen = [row for row in rows[spread].tolist() if span.start <= row < span.stop]
        if chosen:
            moments[window] = chosen
    return moments


def _figure(width: float, height: float) -> Any:
    return require("matplotlib.figure", "bench").Figure((width, height), layout="constrained")


def _color_map(name: str) -> Any:
    return require("matplotlib", "bench").colormaps[name].with_extremes(bad=_IDLE)


def _draw_schedule(trace: DecisionTrace) -> Any:
    """Rows from left to right, chunks from top to bottom, one panel per branch."""
    _, branches, chunks = trace.mode.shape
    figure = _figure(11, branches * (0.9 + 0.28 * chunks) + 0.9)
    panels = figure.subplots(branches, 1, sharex=True, squeeze=False)[:, 0]
    shares = trace.shares()
    for branch, (panel, name) in enumerate(zip(panels, trace.branch_names, strict=True)):
        drawn = panel.imshow(
            shares[:, branch].T,
            cmap=_color_map(_SHARE_MAP),
            vmin=0,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
        )
        clean = np.argwhere(trace.mode[:, branch] == Mode.CLEAN)
        panel.scatter(clean[:, 0], clean[:, 1], marker="D", s=14, color="black")
        for start in trace.window_start[1:]:
            panel.axvline(start - 0.5, color="black", linewidth=1)
        panel.set(title=name, ylabel="chunk of the window", yticks=range(chunks))
    panels[-1].set_xlabel("row of the run")
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(drawn, ax=panels, label="share recomputed", aspect=12, pad=0.01)
    return figure


def _draw_motion(
    trace: DecisionTrace,
    window: int,
    rows: Sequence[int],
    thumbnails: Mapping[int, Pixels],
) -> Any:
    """A column per chunk of the window; the frames, then weights and masks of each chosen row."""
    chunks = [chunk for number, chunk in _chunks(trace) if number == window]
    weighted = not np.isnan(trace.weights).all()
    lines = bool(thumbnails) + len(rows) * (1 + weighted)
    height, width = trace.run["grid"]
    cell = min(9.6 / len(chunks), 1.6)
    tall = 1.6 + lines * (cell * height / width + 0.2)
    figure = _figure(1.2 + max(cell * len(chunks), 4.8), tall)
    panels = figure.subplots(lines, len(chunks), squeeze=False)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[], frame_on=False)
        panel.set_box_aspect(height / width)
    for column, chunk in enumerate(chunks):
        panels[0, column].set_title(f"chunk {chunk}", fontsize=9)
        if (place := _middle(trace, window, chunk)) in thumbnails:
            panels[0, column].imshow(thumbnails[place], aspect="auto")
    drawn = _draw_rows(trace, rows, panels[bool(thumbnails) :], weighted)
    for label, image in drawn.items():
        bar = figure.colorbar(
            image,
            ax=panels,
            location="bottom",
            fraction=0.12 / tall,
            pad=0.15 / tall,
            aspect=30,
            shrink=0.5,
        )
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=8)
    return figure


def _draw_rows(
    trace: DecisionTrace, rows: Sequence[int], panels: Any, weighted: bool
) -> dict[str, Any]:
    """Fill the panels of the chosen rows; return one image of each kind, for the colour bars."""
    size, grid = trace.run["frames"], trace.run["grid"]
    step = 1 + weighted
    drawn = {}
    kinds = [
        ("recomputed", _SHARE_MAP, np.where(trace.recompute < 0, np.nan, trace.recompute), 0.0)
    ]
    if weighted:
        floor = float(np.nanmin(trace.weights))
        kinds.insert(0, ("motion weight", _WEIGHT_MAP, trace.weights, floor))
    for number, row in enumerate(rows):
        for line, (label, name, values, low) in enumerate(kinds, start=step * number):
            text = f"row {row}\n{label}"
            panels[line, 0].set_ylabel(text, fontsize=7, rotation=0, ha="right", va="center")
            for chunk, panel in enumerate(panels[line]):
                tokens = values[row, :, chunk].astype(np.float32).mean(axis=0)
                if np.isnan(tokens).all():
                    continue
                frame = tokens.reshape(size, *grid)[size // 2]
                drawn[label] = panel.imshow(
                    frame, cmap=_color_map(name), vmin=low, vmax=1, aspect="auto"
                )
                if line % step == step - 1:  # once below the pair
                    panel.set_xlabel(f"step {trace.step[row, chunk]}", fontsize=7, labelpad=2)
    return drawn
