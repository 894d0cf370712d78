"""Prompts in a file: what `--prompts FILE` means for every command."""

__all__ = ["read_prompts"]

from pathlib import Path


def read_prompts(path: Path, least: int = 1) -> tuple[str, ...]:
    """Read the prompts of a file.

    Args:
        path: One per line; empty lines and those that begin with # are left out.
        least: How many there must be.

    Returns:
        The prompts, each once.

    Raises:
        ValueError: There are fewer, or it is no text.
    """
    try:
        lines = map(str.strip, path.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected a text file in UTF-8, got: {error}. Write one prompt per line."
        ) from error
    prompts = tuple(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if len(prompts) < least:
        raise ValueError(
            f"{path}: expected different prompts, one per line, at least {least}, got "
            f"{len(prompts)}. Write more."
        )
    return prompts
