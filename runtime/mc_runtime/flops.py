"""Floating-point operations of a generation, counted from its sizes and decisions.

`count_work` says what a run did; `vanilla_work` and `chunk_causal_work` say what it is compared
with. Neighbours: `plan_run` gives the schedule, a `DecisionTrace` what was decided;
`published_flops` counts as the papers do.

A multiply-add is two operations. What counts are the matrix products and convolutions of the
transformer, as in torch's FlopCounterMode: no norm, activation, softmax or rotation. The modulation
of the timesteps is left out, which no policy changes, and sampler, text encoder and VAE are.

Axes: L tokens of a chunk, T text tokens, C channels.
"""

__all__ = [
    "DueCounts",
    "Job",
    "ModelFlops",
    "Sight",
    "Work",
    "causal_blocks",
    "chunk_causal_work",
    "count_due",
    "count_work",
    "vanilla_work",
]

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from mc_runtime.run_plan import RunPlan
from mc_runtime.schedule import StepMatrix
from motioncache.trace import DecisionTrace, Mode

Count = TypeVar("Count", int, NDArray[Any])


@dataclass(frozen=True)
class ModelFlops:
    """Operations of each part of the transformer, by the tokens that go through it.

    Attributes:
        layers: Blocks.
        dim: Channels C.
        ffn_dim: Inner channels of the feed-forward.
        text_dim: Channels of the text embedding.
        patch_in: Values of a token's patch of latents.
        patch_out: Values of a token's patch of velocity.
        query_dim: Channels of the queries; None for C.
        key_dim: Channels of the keys, and of the values; None for C.
        ffn_matrices: Of the feed-forward: 2, or 3 where it is gated.
        text_matrices: Of the text projection: 2, or 1.
        condition_dim: Channels of what each block makes its gates of; 0 where it makes none.
    """

    layers: int
    dim: int
    ffn_dim: int
    text_dim: int
    patch_in: int
    patch_out: int
    query_dim: int | None = None
    key_dim: int | None = None
    ffn_matrices: int = 2
    text_matrices: int = 2
    condition_dim: int = 0

    @classmethod
    def from_manifest(cls, config: Mapping[str, Any]) -> "ModelFlops":
        """Read the manifest's `config.transformer`."""
        patch, size = math.prod(config["patch_size"]), config["head_dim"]
        widths = {"query_dim": config["heads"] * size, "key_dim": config.get("key_heads", 0) * size}
        return cls(
            **{name: config[name] for name in ("layers", "dim", "ffn_dim", "text_dim")},
            patch_in=patch * config["in_channels"],
            patch_out=patch * config["out_channels"],
            **{name: width for name, width in widths.items() if width not in (0, config["dim"])},
            ffn_matrices=3 if config.get("gated_ffn") else 2,
            text_matrices=config.get("text_projection_layers", 2),
            condition_dim=config.get("condition_dim", 0),
        )

    def embed(self, tokens: int) -> int:
        """Patches to tokens."""
        return 2 * tokens * self.patch_in * self.dim

    def text_projection(self, text: int) -> int:
        """Embedding of T text tokens to the transformer's width."""
        return 2 * text * self.text_weights

    def text_keys(self, text: int) -> int:
        """Keys and values of T text tokens, in all layers."""
        return self.layers * 2 * text * self.context_weights

    def blocks(self, tokens: Count, keys: Count, text: Count) -> Count:
        """All blocks for some tokens that see `keys` keys, their own included, and T text ones."""
        attention = 4 * self.query_width * (keys + text)  # scores, and their use
        work: Count = self.layers * tokens * (2 * self._projections + attention)
        return work

    def head(self, tokens: int) -> int:
        """Tokens to patches of velocity."""
        return 2 * tokens * self.dim * self.patch_out

    @property
    def query_width(self) -> int:
        """Channels of all heads of queries."""
        return self.query_dim or self.dim

    @property
    def key_width(self) -> int:
        """Channels of all heads of keys, and of those of values."""
        return self.key_dim or self.dim

    @property
    def text_weights(self) -> int:
        """Number of weights of the text projection, without its biases."""
        return (self.text_dim + (self.text_matrices - 1) * self.dim) * self.dim

    @property
    def context_weights(self) -> int:
        """Number of weights of a layer's keys and values of the text."""
        return 2 * self.dim * self.key_width

    @property
    def block_weights(self) -> int:
        """Number of weights of a block's matrices, those of its gates included."""
        return self._projections + 2 * self.dim * self.condition_dim

    @property
    def _projections(self) -> int:
        """Weights that every token meets in a block."""
        # q and out, of both attentions, k and v; feed-forward.
        feed_forward = self.ffn_matrices * self.dim * self.ffn_dim
        return self.dim * (4 * self.query_width + 2 * self.key_width) + feed_forward


@dataclass(frozen=True)
class Work:
    """Operations of a generation, part by part.

    Attributes:
        embed: Patches to tokens.
        text_projection: Text embedding to the transformer's width.
        text_keys: Keys and values of the text, in all layers.
        blocks: All blocks.
        head: Tokens to velocity.
    """

    embed: int
    text_projection: int
    text_keys: int
    blocks: int
    head: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        """The parts and their total."""
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Job:
    """What a generation has to do, whatever is skipped.

    Attributes:
        chunk_tokens: L.
        text_tokens: T of each guidance branch: cond, and uncond with guidance.
        matrices: Which chunk takes which step in which row, window by window.
    """

    chunk_tokens: int
    text_tokens: tuple[int, ...]
    matrices: tuple[StepMatrix, ...]

    @classmethod
    def from_plan(cls, plan: RunPlan, text_tokens: Sequence[int]) -> "Job":
        """Take what counts from a plan; T of each guidance branch is not in it."""
        return cls(plan.shape.tokens, tuple(text_tokens), plan.matrices)


class DueCounts(NamedTuple):
    """How often each chunk is due, by its place in a window, of all windows; each (chunks,)."""

    rows: NDArray[np.int64]  # rows of the windows that have the chunk
    steps: NDArray[np.int64]
    prefix: NDArray[np.int64]  # windows in which it is given
    clean: NDArray[np.int64]  # windows in which rows follow that see it finished or given


def count_due(job: Job) -> DueCounts:
    """Count how often each chunk of a job is due, whatever is made of it."""
    passes = np.zeros((4, max(matrix.step.shape[1] for matrix in job.matrices)), np.int64)
    for matrix in job.matrices:
        done = (matrix.step > 0) & ~matrix.update
        per_chunk = len(done), matrix.update.sum(0), done[:1].any(0), done.any(0)
        for counted, count in zip(passes, per_chunk, strict=True):
            counted[: done.shape[1]] += count
    return DueCounts(*passes)


@dataclass(frozen=True)
class Sight:
    """What the passes of a run see, and which texts are encoded.

    A pass sees its own chunk and all before it, and the text of its branch; a run where that is not
    so says it: `visible`, `clean_text_tokens`, and `encoded_tokens` where that is not one text for
    each branch. `partial_head` says that reused tokens do not meet the head, as does extrapolation.

    Attributes:
        visible: Chunks whose keys each pass sees, its own included; shape (rows, branches, chunks).
        text: Tokens of text that each pass sees; same shape.
        encoded: Tokens of every text whose keys are computed.
        partial_head: Whether the head runs for recomputed tokens alone.
    """

    visible: NDArray[np.int64]
    text: NDArray[np.int64]
    encoded: tuple[int, ...]
    partial_head: bool

    @classmethod
    def of_run(cls, run: Mapping[str, Any], mode: NDArray[np.int8]) -> "Sight":
        """Read what a trace says of its run.

        Args:
            run: As `Family.describe` gives it.
            mode: A `Mode` for every pass, shape (rows, branches, chunks).

        Returns:
            What the passes see.
        """
        chunks = np.arange(1, mode.shape[2] + 1)
        text = np.broadcast_to(np.array(run["text_tokens"])[:, None], mode.shape)
        return cls(
            np.broadcast_to(run.get("visible") or chunks, mode.shape),
            np.where(mode == Mode.CLEAN, run.get("clean_text_tokens") or text, text),
            tuple(run.get("encoded_tokens") or run["text_tokens"]),
            bool(run.get("partial_head")) or run.get("extrapolation") is not None,
        )


def count_work(flops: ModelFlops, trace: DecisionTrace, *, padded: bool) -> Work:
    """Count what a run did.

    A chunk is embedded once per step or clean pass, for all branches; the head runs once per step
    and branch, for all L tokens; the text is projected, and its keys computed, once per branch;
    where that is not so, the run says it (`Sight`).

    Args:
        flops: Of the model.
        trace: Of the run.
        padded: Count the tokens that went through the blocks, those that fill a bucket included;
            otherwise the tokens that the policy asked for.

    Returns:
        The operations, clean passes included.
    """
    tokens = trace.recompute.shape[-1]
    busy, clean = trace.mode != Mode.IDLE, trace.mode == Mode.CLEAN
    asked = (trace.recompute == 1).sum(-1) * (busy & ~clean) + tokens * clean
    computed = (trace.bucket * busy if padded else asked).astype(np.int64)
    sight = Sight.of_run(trace.run, trace.mode)
    headed = computed[~clean].sum() if sight.partial_head else tokens * (busy & ~clean).sum()
    return Work(
        embed=flops.embed(tokens * int(busy.any(1).sum())),
        text_projection=sum(map(flops.text_projection, sight.encoded)),
        text_keys=sum(map(flops.text_keys, sight.encoded)),
        blocks=int(flops.blocks(computed, tokens * sight.visible, sight.text).sum()),
        head=flops.head(int(headed)),
    )


def chunk_causal_work(flops: ModelFlops, job: Job) -> Work:
    """Count the policy `none`: the same run as any other policy's, nothing skipped.

    Args:
        flops: Of the model.
        job: Of the generation.

    Returns:
        The operations, clean passes included.
    """
    passes, branches = count_due(job), len(job.text_tokens)
    forwards = passes.steps + passes.clean
    return _add_up(
        flops,
        job.chunk_tokens,
        job.text_tokens,
        computed=np.tile(job.chunk_tokens * forwards, (branches, 1)),
        embedded=job.chunk_tokens * int(forwards.sum()),
        headed=job.chunk_tokens * branches * int(passes.steps.sum()),
    )


def _add_up(
    flops: ModelFlops,
    chunk_tokens: int,
    text_tokens: Sequence[int],
    computed: NDArray[Any],
    embedded: int,
    headed: int,
) -> Work:
    """Count a run of ours from its tokens; computed has shape (branches, chunks)."""
    return Work(
        embed=flops.embed(embedded),
        text_projection=sum(map(flops.text_projection, text_tokens)),
        text_keys=sum(map(flops.text_keys, text_tokens)),
        blocks=sum(
            causal_blocks(flops, chunk_tokens, of_branch, text)
            for text, of_branch in zip(text_tokens, computed, strict=True)
        ),
        head=flops.head(headed),
    )


def causal_blocks(flops: ModelFlops, chunk_tokens: int, computed: NDArray[Any], text: int) -> int:
    """Count all blocks for some tokens of each chunk, which sees itself and those before it.

    Args:
        flops: Of the model.
        chunk_tokens: L.
        computed: Tokens of each chunk of a window, all passes together; shape (chunks,).
        text: T.

    Returns:
        The operations.
    """
    keys = chunk_tokens * np.arange(1, len(computed) + 1)
    return sum(
        flops.blocks(tokens, visible, text)
        for tokens, visible in zip(computed.tolist(), keys.tolist(), strict=True)
    )


def vanilla_work(flops: ModelFlops, job: Job) -> Work:
    """Count every chunk in every row, as diffusers and SkyReels-V2 run.

    Every forward takes the whole window, finished chunks and those not yet started among them; all
    tokens see all; text projection and text keys are computed anew.

    Args:
        flops: Of the model.
        job: Of the generation.

    Returns:
        The operations.

    Source:
        diffusers 0.42.1, pipeline_skyreels_v2_diffusion_forcing.py.
    """
    windows = [
        (len(matrix.step), job.chunk_tokens * matrix.step.shape[1]) for matrix in job.matrices
    ]
    rows = sum(count for count, _ in windows)
    tokens = len(job.text_tokens) * sum(count * size for count, size in windows)
    return Work(
        embed=flops.embed(tokens),
        text_projection=rows * sum(map(flops.text_projection, job.text_tokens)),
        text_keys=rows * sum(map(flops.text_keys, job.text_tokens)),
        blocks=sum(
            count * flops.blocks(size, size, text)
            for count, size in windows
            for text in job.text_tokens
        ),
        head=flops.head(tokens),
    )
