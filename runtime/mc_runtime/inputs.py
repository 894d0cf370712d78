"""What a caller gives to a generation, held against what the model takes.

Neighbours: `VideoPipeline.generate` calls these before anything is computed.
"""

__all__ = ["Inputs", "NamedText", "Prompt", "check_array", "check_policy", "pick_texts"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from motioncache import Policy, RunShape

Embedding = NDArray[np.float32]
Prompt: TypeAlias = tuple[str | None, Embedding | None]  # one of both
NamedText: TypeAlias = tuple[str, str | Embedding]


@dataclass(frozen=True)
class Inputs:
    """The tensors and settings of a generation; all of them are checked.

    Attributes:
        embeddings: Of the family's prompts, and its tables behind them, each (1, T, text_dim).
        noise: Latent frame i of the video starts from noise[:, i]; shape (c, frames, h, w).
        prefix: Latents that the video begins with, shape (c, n, h, w); n may be 0.
        options: Of the family, accepted by it.
        config: Of the bundle's manifest.
        bundle: Identity of the model, for the trace.
    """

    embeddings: tuple[Embedding, ...]
    noise: NDArray[np.float32]
    prefix: NDArray[np.float32]
    options: Any
    config: Mapping[str, Any]
    bundle: str

    @property
    def tokens(self) -> list[int]:
        """How many each embedding has."""
        return [embedding.shape[1] for embedding in self.embeddings]


def check_policy(policy: Policy, shape: RunShape, note: Callable[[str], None]) -> None:
    """Refuse a policy that does not fit a run; note one whose preset was made for another.

    Args:
        policy: Of the run.
        shape: Of the run.
        note: Called with what the caller should know.

    Raises:
        ValueError: The policy does not fit.
    """
    policy.check(shape)
    if policy.made_for_steps not in (None, shape.steps):
        note(
            f"{policy.name}:{policy.preset}: expected {policy.made_for_steps} steps, for which the "
            f"preset was made, got {shape.steps}. Run mc-calibrate with these."
        )


def pick_texts(
    positive: Prompt,
    negative: Prompt,
    branches: int,
) -> list[NamedText]:
    """Choose the text or embedding of each branch, under its name.

    Args:
        positive: Prompt and embedding; one of both.
        negative: The same for the negative prompt; neither is an empty prompt.
        branches: 1, or 2 with guidance.

    Returns:
        Name and value by branch.

    Raises:
        ValueError: Both are given, or no prompt.
    """
    if all(value is None for value in negative):
        negative = "", None
    given = [("prompt", positive), ("negative_prompt", negative)]
    return [_pick(name, *values) for name, values in given[:branches]]


def _pick(name: str, text: str | None, embedding: Embedding | None) -> NamedText:
    """The one of both that is given."""
    given = [value for value in (text, embedding) if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"{name}: expected either {name} or {name}_embeds, "
            f"got {'both' if given else 'neither'}. Pass one of them."
        )
    return name, given[0]


def check_array(name: str, array: NDArray[Any], shape: tuple[int | str, ...]) -> None:
    """Refuse an array of another dtype or shape, or with NaN; a symbol stands for any size.

    Raises:
        ValueError: The array is refused.
    """
    fits = array.ndim == len(shape) and all(
        isinstance(expected, str) or size == expected
        for size, expected in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype != np.float32:
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"{name}: expected float32 ({wanted}), got {array.dtype} {array.shape}. "
            "Its sizes follow from the model, num_frames, height and width."
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity.")
