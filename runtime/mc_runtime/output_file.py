"""Output files: refused before the work if they cannot be written, whole or not there after it.

Neighbours: `mc-generate` checks its outputs; `VideoWriter` and `write_record` write them.
"""

__all__ = [
    "check_distinct",
    "check_output",
    "hidden_path",
    "replace_file",
    "write_failure",
    "write_text",
]

import os
import secrets
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that could not be written, before the work starts.

    Args:
        path: Of a file.
        overwrite: Accept one that exists.

    Raises:
        ValueError: It exists, or its folder is missing or takes no new files.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise ValueError(f"{path}: expected a file, got a folder. Name a file in it.")
    if os.path.lexists(path) and not overwrite:
        raise ValueError(f"{path}: expected a new file, got one that exists. Pass --overwrite.")
    if not folder.is_dir():
        raise ValueError(f"{path}: expected an existing folder, got none. Run: mkdir -p {folder}")
    probe = hidden_path(path)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{path}: expected a folder that takes new files, got: {error.strerror}. "
            "Choose another."
        ) from error


def check_distinct(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse outputs that would replace each other, or an input, without which no run repeats.

    Args:
        outputs: Files to write.
        inputs: Files that are read.

    Raises:
        ValueError: An output is the same file as another output or an input.
    """
    taken = {path.resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in taken:
            raise ValueError(
                f"{path}: expected a file of its own, got another output or an input. "
                "Choose another name."
            )
        taken.add(path.resolve())


def hidden_path(path: Path) -> Path:
    """A new name beside `path`, for a file that takes the name `path` once it is whole."""
    return path.absolute().with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


def write_failure(path: Path, error: OSError, rest: str = "") -> OSError:
    """Make the error of an output that cannot be written; the system's names the hidden file.

    Args:
        path: Of the output.
        error: The system's, such as that the disk is full.
        rest: What else to say.

    Returns:
        The error to raise.
    """
    return OSError(
        f"{path}: expected a file that can be written, got: {error.strerror or error}. "
        f"Make room, or choose another folder.{rest}"
    )


@contextmanager
def replace_file(path: Path) -> Generator[Path]:
    """Let the body write a hidden file, which then replaces `path`; none is left if it fails.

    Args:
        path: Of the output.

    Yields:
        The path to write to.

    Raises:
        OSError: It could not be written; what was at `path` is still there.
    """
    hidden = hidden_path(path)
    try:
        yield hidden
        hidden.replace(path)
    except OSError as error:
        failure = write_failure(path, error)
        raise failure from error
    finally:
        hidden.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text; an old file stays until the new one is whole."""
    with replace_file(path) as hidden:
        hidden.write_text(text, encoding="utf-8")
