"""The prompts of a command that runs several: read from a file, encoded once.

Neighbours: `mc-bench` and `mc-calibrate` pass the embeddings to `VideoPipeline.generate`.
"""

__all__ = ["encode_prompts", "read_prompts"]

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mc_runtime.pipeline import Embedding, VideoPipeline


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


def encode_prompts(
    pipeline: VideoPipeline,
    prompts: Sequence[str],
    options: Any,
    note: Callable[[str], None],
) -> list[dict[str, Embedding]]:
    """Encode every prompt, and the empty one for guidance, once for all runs.

    Args:
        pipeline: Of the bundle.
        prompts: To encode.
        options: Of the runs.
        note: Called with what the user should know, such as that a prompt was cut.

    Returns:
        For each prompt `prompt_embeds`, and with guidance `negative_prompt_embeds`.

    Raises:
        BundleError: The bundle has no text encoder.
    """
    shared = {}
    if pipeline.family.guided(options):
        shared["negative_prompt_embeds"] = pipeline.embed_text("negative_prompt", "", note)
    return [
        {"prompt_embeds": pipeline.embed_text(f"prompt {number}", prompt, note), **shared}
        for number, prompt in enumerate(prompts, 1)
    ]
