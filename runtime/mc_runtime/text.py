"""From a prompt to the embedding that the transformer attends to, one encoder layer at a time.

Neighbours: `Bundle` maps the tokenizer, the table and each layer's weights; the graphs
`text_layer` and `text_norm` are mc_export's; `context` takes the embedding.

Axes: T tokens of the prompt, C channels of the encoder.
"""

__all__ = [
    "EncodedPrompt",
    "TextEncoder",
    "Tokenizer",
    "clean_prompt",
    "encode_prompt",
    "relative_position_buckets",
]

import html
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from numpy.typing import NDArray

from mc_engines.errors import BundleError, EngineError
from mc_engines.runner import Array, Arrays, Runner


def clean_prompt(prompt: str) -> str:
    """Mend broken Unicode, resolve HTML entities (also those escaped twice), and join white space.

    Args:
        prompt: The text as the user gave it.

    Returns:
        The text that is tokenised.

    Source: diffusers 0.42.1, pipeline_skyreels_v2_diffusion_forcing.py, prompt_clean.

    Example:
        >>> clean_prompt("  a cat &amp;amp;  a dog ")
        'a cat & a dog'
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


class Tokenizer:
    """A `tokenizer.json`: text to token ids. Safe to use from several threads at once."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # The file may carry a limit and padding of its own; both are decided by the caller here.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @classmethod
    def from_folder(cls, path: Path) -> "Tokenizer":
        """Load the tokenizer of a bundle or checkpoint.

        Args:
            path: Folder that holds `tokenizer.json`.

        Returns:
            The tokenizer.

        Raises:
            BundleError: The file is missing or cannot be read.
        """
        file = Path(path) / "tokenizer.json"
        try:
            return cls(tokenizers.Tokenizer.from_file(str(file)))
        except Exception as error:  # tokenizers raises bare Exception for every fault
            raise BundleError(
                f"{file}: expected a tokenizer of the tokenizers library, got: {error}. "
                "Export the bundle again from a checkpoint with tokenizer/tokenizer.json."
            ) from error

    def encode(self, text: str, max_tokens: int) -> tuple[list[int], int]:
        """Turn a text into ids, of which the last is the end-of-sequence token.

        Args:
            text: A cleaned prompt.
            max_tokens: Most ids to return; special tokens count and are never cut.

        Returns:
            The ids, and how many tokens at the end of the text were cut.

        Raises:
            ValueError: max_tokens leaves no room for the special tokens.
        """
        special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_tokens < special:
            raise ValueError(
                f"max_tokens: expected at least {special}, got {max_tokens}. "
                "Leave it at the model's 512."
            )
        words = self._tokenizer.encode(text, add_special_tokens=False)
        cut = max(0, len(words.ids) - (max_tokens - special))
        words.truncate(max_tokens - special)
        return self._tokenizer.post_process(words).ids, cut


@dataclass(frozen=True)
class TextEncoder:
    """Everything that encodes a prompt; only one layer's weights are in memory at a time.

    Attributes:
        tokenizer: Text to ids.
        table: Embedding of every id, shape (vocabulary, C), as stored; memory-mapped, because
            umT5-xxl's is 2 GB, of which a prompt needs T rows.
        layer: Runs `text_layer`.
        norm: Runs `text_norm`.
        layer_weights: Maps the weights of layer 0, 1, ...
        norm_weights: Maps the weights of the last norm.
        layers: Number of layers.
        relative_buckets: See `relative_position_buckets`.
        relative_max_distance: See `relative_position_buckets`.
        clean: Cleans a prompt.
        padded: Whether the rows of an embedding after the prompt are zeros, as many as there can
            be tokens; else there are none.
    """

    tokenizer: Tokenizer
    table: Array
    layer: Runner
    norm: Runner
    layer_weights: Callable[[int], Arrays]
    norm_weights: Callable[[], Arrays]
    layers: int
    relative_buckets: int
    relative_max_distance: int
    clean: Callable[[str], str] = clean_prompt
    padded: bool = True


@dataclass(frozen=True)
class EncodedPrompt:
    """What the transformer sees of a prompt.

    Attributes:
        embedding: shape (1, rows, C); see `TextEncoder.padded`.
        tokens: Tokens of the prompt that were encoded, the end-of-sequence token among them.
        cut: Tokens at the end of the prompt that did not fit.
    """

    embedding: NDArray[np.float32]
    tokens: int
    cut: int


def relative_position_buckets(tokens: int, buckets: int, max_distance: int) -> NDArray[np.int32]:
    """Number the distances between tokens: one by one when near, in widening buckets when far.

    The first half of the buckets is for tokens at or before the query, the second for those after
    it. In each half of n the distances d below n/2 have a bucket each; from there the number is

        n/2 + floor(log(d / (n/2)) / log(max_distance / (n/2)) * n/2), at most n - 1.

    Args:
        tokens: T.
        buckets: Number of buckets, 32 in umT5.
        max_distance: Distance from which all share the last bucket, 128 in umT5.

    Returns:
        Bucket of key j seen from query i, shape (T, T), int32.

    Raises:
        ValueError: There are too few buckets, or max_distance does not reach beyond the near ones.

    Source: T5 (arXiv 1910.10683), section 2.1. The quotient is float32, as in transformers: whether
        a distance lies on a bucket's edge depends on its rounding.
    """
    half = buckets // 2
    near = half // 2
    if near < 1 or max_distance <= near:
        raise ValueError(
            f"relative_position_buckets: expected buckets >= 4 and max_distance > buckets // 4, "
            f"got {buckets} and {max_distance}. Take both from the bundle's manifest."
        )
    offset = np.arange(tokens) - np.arange(tokens)[:, None]
    distance = np.abs(offset)
    logarithm = np.log(np.maximum(distance, near) / near).astype(np.float32)
    fraction = logarithm / np.float32(math.log(max_distance / near))
    far = near + (fraction * np.float32(half - near)).astype(np.int32)
    number = np.where(distance < near, distance, np.minimum(far, half - 1))
    bucket: NDArray[np.int32] = (number + half * (offset > 0)).astype(np.int32)
    return bucket


def encode_prompt(prompt: str, encoder: TextEncoder, max_tokens: int = 512) -> EncodedPrompt:
    """Clean, tokenise and encode a prompt.

    Only the prompt's own tokens are computed. That is what masking the padding comes to: a masked
    key has weight zero, and the rows after the prompt are zeros, or left out.

    Args:
        prompt: Text; may be empty.
        encoder: The parts of the encoder.
        max_tokens: A longer prompt is cut; its end-of-sequence token stays.

    Returns:
        The embedding, and how many tokens were encoded and cut.

    Raises:
        ValueError: max_tokens leaves no room for the special tokens.
        BundleError: The tokenizer knows tokens that the table lacks.
        EngineError: A graph failed, or gave NaN or infinity.

    Source: diffusers 0.42.1, pipeline_skyreels_v2_diffusion_forcing.py, encode_prompt;
        SandAI-org/MAGI-1 6ff822e, inference/pipeline/prompt_process.py.
    """
    ids, cut = encoder.tokenizer.encode(encoder.clean(prompt), max_tokens)
    encoded = _run_layers(_look_up(encoder.table, ids), encoder)
    rows = max_tokens if encoder.padded else len(ids)
    embedding = np.zeros((1, rows, encoded.shape[-1]), np.float32)
    embedding[:, : len(ids)] = encoded
    return EncodedPrompt(embedding, tokens=len(ids), cut=cut)


def _look_up(table: Array, ids: list[int]) -> Array:
    """Read the rows of the ids, shape (1, T, C); nothing else of the table is touched."""
    if max(ids, default=0) >= len(table):
        raise BundleError(
            f"tokenizer: expected ids below {len(table)}, got {max(ids)}. "
            "Export the bundle again with the tokenizer that belongs to the text encoder."
        )
    return table[np.asarray(ids, np.int64)][None].astype(np.float32)


def _run_layers(hidden: Array, encoder: TextEncoder) -> Array:
    """Run every layer and the last norm on the embedded tokens, shape (1, T, C)."""
    buckets = relative_position_buckets(
        hidden.shape[1], encoder.relative_buckets, encoder.relative_max_distance
    )
    for layer in range(encoder.layers):
        inputs = {"hidden": hidden, "buckets": buckets}
        hidden = encoder.layer.run(inputs, encoder.layer_weights(layer))["output"]
        _check_finite(f"text_layer {layer}", hidden)
    embedding = encoder.norm.run({"hidden": hidden}, encoder.norm_weights())["embedding"]
    _check_finite("text_norm", embedding)
    return embedding


def _check_finite(component: str, values: Array) -> None:
    if not np.isfinite(values).all():
        raise EngineError(
            f"{component}: expected finite values, got NaN or infinity. "
            "Check the weights with mc-inspect --verify."
        )
