"""How every command ends: its message, its exit code, and the traceback on request."""

import errno
import os
import subprocess
import sys
from importlib import metadata

import click
import pytest
from click.testing import CliRunner

from mc_engines.command import command
from mc_engines.errors import EngineError, MissingExtraError


def run(error: BaseException | None = None, *arguments: str):
    @command("mc-test")
    @click.option("--size", type=int, default=1, help="A number.")
    def main(size: int, quiet: bool) -> None:
        """Do something."""
        if error is not None:
            raise error
        click.echo(f"size {size}, quiet {quiet}")

    return CliRunner().invoke(main, list(arguments))


def test_runs_with_its_own_options_and_quiet():
    assert run(None, "--size", "3").output == "size 3, quiet False\n"
    assert run(None, "--quiet").output == "size 1, quiet True\n"


def test_help_lists_its_own_options_before_the_common_ones():
    result = run(None, "--help")
    assert result.exit_code == 0
    assert result.output.startswith("Usage: mc-test [OPTIONS]\n\n  Do something.")
    places = [result.output.index(f"--{name} ") for name in ("size", "quiet", "debug", "version")]
    assert places == sorted(places)


def test_version_is_that_of_the_distribution():
    result = run(None, "--version")
    assert result.output == f"mc-test, version {metadata.version('motioncache')}\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineError("a.onnx: expected x, got y."), 1),
        (MissingExtraError("av: not installed."), 1),
        (PermissionError(errno.EACCES, "Permission denied", "out.mp4"), 1),
        (ValueError("num_frames: expected 97, got 98."), 2),
    ],
)
def test_an_error_is_its_message_alone(error, code):
    result = run(error)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", f"{error}\n")


def test_debug_shows_the_traceback_and_exits_the_same():
    result = run(ValueError("no"), "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("ValueError: no\n\n")


def test_ctrl_c_exits_130():
    result = run(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


@pytest.mark.parametrize("arguments", [["--size", "x"], ["--unknown"], ["extra"]])
def test_wrong_usage_exits_2(arguments):
    result = run(None, *arguments)
    assert result.exit_code == 2
    assert "Try 'mc-test --help' for help" in result.stderr


def test_a_defect_is_not_dressed_up():
    assert isinstance(run(TypeError("a defect")).exception, TypeError)


def test_a_reader_that_has_gone_is_not_an_error():
    script = (
        "import click; from mc_engines.command import command\n"
        "@command('mc-test')\n"
        "def main(quiet):\n"
        "    for _ in range(100000): click.echo('x' * 100)\n"
        "main()"
    )
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    os.read(read, 100)
    os.close(read)
    _, stderr = process.communicate(timeout=60)
    assert stderr == ""
