"""Tables of a benchmark, on the terminal and in a page of HTML that needs no other file.

Neighbours: `policy_page` and `latency_page` fill them for `mc-bench run`, `predict_cli` and
`compare_cli` for the others.
"""

__all__ = ["Tables", "draw_svg", "html_report", "print_tables"]

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mc_engines.errors import require

Tables = Mapping[str, tuple[Sequence[str], list[list[str]]]]  # columns and rows by title

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em;
  color: #1b1f24; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #d8dee4 }
th:first-child, td:first-child { text-align: left }
.facts td { text-align: left } svg { max-width: 100%; height: auto }
.wide { overflow-x: auto }
"""


def _console_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Make a table whose first column is the name of each row."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def print_tables(tables: Tables, notes: Iterable[str], console: Console) -> None:
    """Print tables, and below them what a reader has to know."""
    for title, (columns, rows) in tables.items():
        console.print(_console_table(title, columns, rows))
    for note in notes:
        console.print(f"- {note}")


def draw_svg(figure: Any) -> str:
    """Write a matplotlib figure as an element of a page; the same chart gives the same bytes."""
    matplotlib = require("matplotlib", "bench")
    with matplotlib.rc_context({"svg.hashsalt": "mc-bench"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table; its first column is the name of each row."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "\n".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _html_facts(facts: Mapping[str, str]) -> str:
    """Write a table of two columns without a head."""
    rows = "\n".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f'<div class="wide"><table class="facts">{rows}</table></div>'


def html_report(
    report: Mapping[str, Any],
    charts: Iterable[str],
    tables: Tables,
    facts: tuple[str, Mapping[str, str]],
) -> str:
    """Write a report of `mc-bench run` as one page that needs no other file.

    Args:
        report: Has `bundle` and `caveats`.
        charts: Elements of `draw_svg`.
        tables: Of what was measured.
        facts: A heading, and everything that the numbers depend on.

    Returns:
        The page.
    """
    caveats = "".join(f"<li>{html.escape(text)}</li>" for text in report["caveats"])
    body = "\n".join(
        [
            f"<h1>{html.escape(report['bundle']['model'] or report['bundle']['path'])}</h1>",
            *charts,
            *(f"<h2>{title}</h2>\n{_html_table(*table)}" for title, table in tables.items()),
            f"<h2>what to know</h2>\n<ul>{caveats}</ul>",
            f"<h2>{facts[0]}</h2>",
            _html_facts(facts[1]),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>mc-bench</title>'
        f"<style>{_STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )
