"""What a run holds in memory, by arithmetic alone, in ONNX Runtime or on a device.

Neighbours: `mc-export --dry-run` prints it for a checkpoint, `mc-bench predict` for a GPU.

Symbols: L tokens of a chunk, S tokens of a window, T text tokens, C channels, H heads.
"""

__all__ = [
    "TEXT_TOKENS",
    "Kept",
    "RunSizes",
    "WindowShape",
    "count_kept_chunks",
    "count_text_tokens",
    "plan_run_sizes",
]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mc_engines.onnxruntime_runner import FUSED_ATTENTION_BYTES

TEXT_TOKENS = 512  # of a prompt, where neither transformer nor text encoder says it


@dataclass(frozen=True)
class Kept:
    """What a run keeps from pass to pass, in tokens.

    Attributes:
        keys: Of every branch, those whose keys and values it keeps at once.
        texts: Of all texts.
        reused: Those of which something is kept for reuse.
        velocity: Channels of the velocity that they keep, in float32; 0 where they keep the
            residual of the blocks, of C channels.
    """

    keys: tuple[int, ...]
    texts: int
    reused: int
    velocity: int = 0


@dataclass(frozen=True)
class WindowShape:
    """The sizes of a transformer and of the largest window it denoises.

    Attributes:
        layers: Blocks.
        heads: H.
        dim: C.
        ffn_dim: Inner channels of the feed-forward.
        chunk_tokens: L.
        window_tokens: S; the most that a pass sees.
        branches: Of guidance: 2, or 1 without it.
        text_tokens: T of a branch.
        key_dim: Channels of the keys, and of the values; None for C.
        query_dim: Channels of the queries; None for C.
        queries: How many a token has at a time: 2 where the text is attended to beside the chunks.
        ffn_matrices: Of the feed-forward: 2, or 3 where it is gated.
        kept: What a run keeps; None for the whole window and T in every branch.
    """

    layers: int
    heads: int
    dim: int
    ffn_dim: int
    chunk_tokens: int
    window_tokens: int
    branches: int = 2
    text_tokens: int = TEXT_TOKENS
    key_dim: int | None = None
    query_dim: int | None = None
    queries: int = 1
    ffn_matrices: int = 2
    kept: Kept | None = None

    @property
    def keeps(self) -> Kept:
        """What a run keeps."""
        window, count = self.window_tokens, self.branches
        whole = Kept((window,) * count, self.text_tokens * count, window * count)
        return whole if self.kept is None else self.kept


@dataclass(frozen=True)
class RunSizes:
    """Memory of a run, in bytes.

    Attributes:
        kv_per_branch: Keys and values that a branch keeps, all layers; of the one that keeps most.
        kv: Of all branches.
        context: Keys and values of the texts.
        residual: Block output minus input of every token of a window, all branches; or velocities.
        weights: On the CPU the blocks', or one layer's, cast from the mapped file (0 where that is
            float32); on a device the whole transformer.
        qkv: Queries, keys and values of a whole chunk.
        ffn: Inner values of the feed-forward of a whole chunk, before and after its nonlinearity.
        scores: Of the plain attention at the window's last chunk: H x L x S values.
        pass_plain: Activations of the largest pass, with the plain attention.
        pass_fused: Activations of the largest pass, with the fused attention.
        decode: One step of the VAE's decoder with its states; 0 without a VAE, and on a device,
            where it was not measured.
        peak: All that is held, and the larger of a pass and a step of the decoder.
    """

    kv_per_branch: int
    kv: int
    context: int
    residual: int
    weights: int
    qkv: int
    ffn: int
    scores: int
    pass_plain: int
    pass_fused: int
    decode: int
    peak: int


def count_text_tokens(config: Mapping[str, Any]) -> int:
    """Count the tokens of the longest prompt that a transformer sees.

    Args:
        config: Of the bundle's manifest.

    Returns:
        T.
    """
    encoded = config.get("text_encoder", {}).get("max_tokens", TEXT_TOKENS)
    return int(config["transformer"].get("max_text_tokens", encoded))


def count_kept_chunks(
    chunks: int, window_chunks: int, kv_ranges: Sequence[int], clean_ranges: Iterable[int]
) -> int:
    """Count the chunks whose keys have to be kept at once, where chunks pass through stages.

    Args:
        chunks: Of the video.
        window_chunks: That are denoised together, each in a stage of its own.
        kv_ranges: By stage, how many chunks a chunk sees, itself included; empty for all.
        clean_ranges: The same of every kind of clean pass.

    Returns:
        The most that lie between the first that anything sees and the newest.

    Example:
        >>> count_kept_chunks(7, 4, [5, 4, 3, 2], [1])
        5
    """
    if not kv_ranges:
        return chunks
    # How far each active chunk sees beyond the oldest, and its clean pass.
    beyond = (size - 1 - place for place, size in enumerate(reversed(kv_ranges)))
    return min(chunks, window_chunks + max(*beyond, *clean_ranges))


def plan_run_sizes(
    shape: WindowShape, *, value_bytes: int, weights: int, decode: int, fused: bool = False
) -> RunSizes:
    """Plan the memory of a run.

    Args:
        shape: Of the model and the window.
        value_bytes: Of keys, values and activations: 4 in float32.
        weights: Bytes that stay in memory.
        decode: Bytes of a step of the VAE's decoder.
        fused: Attention never writes its scores; otherwise it does where they are small.

    Returns:
        The sizes.
    """
    row, key_row = (width * value_bytes for width in (shape.dim, shape.key_dim or shape.dim))
    keeps = shape.keeps
    slots, per_layer = max(keeps.keys), 2 * shape.layers * key_row
    kv = sum(keeps.keys) * per_layer
    context = keeps.texts * per_layer
    residual = keeps.reused * (4 * keeps.velocity or row)
    rows = shape.chunk_tokens * row
    query_row = (shape.query_dim or shape.dim) * value_bytes
    qkv = shape.chunk_tokens * (shape.queries * query_row + 2 * key_row)
    ffn = shape.ffn_matrices * shape.chunk_tokens * shape.ffn_dim * value_bytes
    scores = shape.heads * shape.chunk_tokens * shape.window_tokens * value_bytes
    # Keys and values: the cache joined with the new rows, and what is gathered from that. The
    # fused form lays the gathered ones out twice more, for its inputs and within its kernel.
    joined = 2 * (slots + shape.chunk_tokens) * key_row
    gathered = 2 * shape.window_tokens * key_row
    pass_plain = rows + max(qkv + joined + gathered + scores, ffn)
    pass_fused = rows + max(qkv + joined + 3 * gathered, ffn)
    largest = pass_fused if fused or scores > FUSED_ATTENTION_BYTES else pass_plain
    return RunSizes(
        kv_per_branch=slots * per_layer,
        kv=kv,
        context=context,
        residual=residual,
        weights=weights,
        qkv=qkv,
        ffn=ffn,
        scores=scores,
        pass_plain=pass_plain,
        pass_fused=pass_fused,
        decode=decode,
        peak=kv + context + residual + weights + max(largest, decode),
    )
