"""What all commands have in common: three options, and how an error ends.

The commands are in `mc_export` and `mc_runtime`; they start from `command`.
"""

__all__ = ["FAILURE", "INTERRUPTED", "WRONG_USAGE", "Command", "command"]

import errno
import traceback
from collections.abc import Callable
from typing import Any

import click

from mc_engines.errors import McError

FAILURE, WRONG_USAGE, INTERRUPTED = 1, 2, 130


class Command(click.Command):
    """A command whose errors are one message on stderr and an exit code.

    A failure exits 1, wrong usage 2 (click's own errors, and a ValueError: an option has a value
    that the model cannot do), Ctrl-C 130. `--debug` shows the traceback instead of the message.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see the class for what becomes of its errors."""
        debug = ctx.params.pop("debug")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            code = INTERRUPTED
        except (McError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # click ends quietly when the reader of a pipe has gone
            click.echo(traceback.format_exc() if debug else str(error), err=True)
            code = WRONG_USAGE if isinstance(error, ValueError) else FAILURE
        ctx.exit(code)


def command(name: str) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function, and add `--version`, `--quiet` and `--debug`.

    Args:
        name: Such as `mc-inspect`.

    Returns:
        A decorator, to stand above the command's own options. The function is called with
        `quiet` besides its own parameters.
    """

    def decorate(function: Callable[..., Any]) -> Command:
        made = click.command(name, cls=Command)(function)
        for add in (
            click.option("--quiet", is_flag=True, help="Print results and errors only."),
            click.option("--debug", is_flag=True, help="Show the traceback of an error."),
            click.version_option(package_name="motioncache"),
        ):
            made = add(made)
        return made

    return decorate
