"""What commands show on the terminal: results, and a generation while it runs.

Neighbours: `mc-generate` passes `Display` the progress of a `Generation`; `mc-inspect` and
`mc-bench` print tables to `open_console`.
"""

__all__ = ["Display", "open_console"]

import sys

import click
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mc_runtime.generation import Progress
from mc_runtime.options import Chunk


def open_console(plain_width: int) -> Console:
    """Open the standard output for tables.

    Args:
        plain_width: Columns where it is not a terminal.

    Returns:
        A console that prints text as it is, without colours of its own.
    """
    width = None if sys.stdout.isatty() else plain_width
    return Console(width=width, highlight=False, markup=False, emoji=False)


class Display:
    """A progress bar on a terminal, a line per chunk elsewhere, nothing with --quiet."""

    def __init__(self, quiet: bool) -> None:
        console = Console(stderr=True)
        self._lines = not quiet and not console.is_terminal
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[chunks]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("denoising", total=None, chunks="")
        self._words = "first chunk to come"

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, progress: Progress) -> None:
        """Show where the schedule is."""
        self._bar.update(
            self._task, completed=progress.row, total=progress.rows, chunks=self._words
        )

    def show_chunk(self, chunk: Chunk) -> None:
        """Say that a chunk is finished, and how long it took."""
        if chunk.index == 0:
            self._words = f"first chunk after {chunk.seconds:.1f} s"
        else:
            self._words = f"chunk {chunk.index + 1} of {chunk.of}, {chunk.seconds:.1f} s"
        self._bar.update(self._task, chunks=self._words)
        if self._lines:
            click.echo(f"{self._words}, {chunk.of - chunk.index - 1} left", err=True)
