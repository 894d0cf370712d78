"""The loop: chunks of a window move from noise to latents, each as soon as its turn comes.

Neighbours: `step_matrix` says which chunk takes which step in a row, the policy which tokens are
recomputed, `Transformer` computes, `sampler_step` moves the latents. `VideoPipeline` feeds windows
in and decodes what comes out.

A chunk sees its own keys and those of the chunks before it. When it is finished, one clean pass at
timestep 0 writes its keys for good: that equals evaluating it again in every later row, as
diffusers does, because nothing that it sees changes any more. A prefix gets that pass first.
"""

__all__ = ["FinishedChunk", "Request", "Window", "denoise_window"]

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.errors import EngineError
from mc_engines.runner import Arrays
from mc_runtime.patches import patchify, unpatchify
from mc_runtime.rope import rope_tables
from mc_runtime.sampler import SamplerState, SamplerTable, init_sampler, sampler_step
from mc_runtime.schedule import StepMatrix
from mc_runtime.transformer import Conditions, KeyCache, Transformer
from motioncache import Policy

Latents = NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """What all windows of a generation have in common.

    Attributes:
        transformer: Engines and weights.
        policy: Decides which tokens are recomputed.
        contexts: Keys and values of the prompt per branch (cond, and uncond with guidance) and
            layer.
        guidance_scale: g of `uncond + g * (cond - uncond)`.
        table: Of the sampler.
        conditions: One row per step, then one for timestep 0 and one for the prefix's timestep.
        chunk_frames: Latent frames F of a chunk.
    """

    transformer: Transformer
    policy: Policy
    contexts: Sequence[Sequence[Arrays]]
    guidance_scale: float
    table: SamplerTable
    conditions: Conditions
    chunk_frames: int

    @property
    def clean_row(self) -> int:
        """Row of `conditions` for a finished chunk."""
        return len(self.table.timesteps)

    @property
    def prefix_row(self) -> int:
        """Row of `conditions` for a chunk of the prefix."""
        return len(self.table.timesteps) + 1


@dataclass(frozen=True)
class FinishedChunk:
    """A chunk of a window that has taken its last step.

    Attributes:
        chunk: Its position in the window.
        latents: shape (c, F, h, w).
        computed: Passes by kind since the chunk before, clean ones of earlier chunks among them,
            and tokens that the blocks computed.
    """

    chunk: int
    latents: Latents
    computed: Counter[str]


@dataclass
class _Branch:
    """What one guidance branch remembers within a window."""

    context: Sequence[Arrays]
    cache: KeyCache
    residuals: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    policy_states: dict[int, Any] = field(default_factory=dict)


@dataclass
class Window:
    """The state of one window; belongs to one generation.

    Attributes:
        request: Of the generation.
        latents: Prefix and noise at first, shape (c, frames, h, w); changed step by step.
        prefix: Latents of the prefix as the model is shown them, with noise added.
        matrix: Which chunk takes which step in which row.
        first_chunk: Number in the video of the window's first chunk, for messages.
        branches: cond, and uncond with guidance.
        samplers: Per chunk.
        computed: Passes and tokens since the last chunk was finished.
        frozen: Chunks whose keys are final.
    """

    request: Request
    latents: Latents
    prefix: Latents
    matrix: StepMatrix
    first_chunk: int
    branches: list[_Branch] = field(init=False)
    samplers: list[SamplerState] = field(init=False)
    computed: Counter[str] = field(default_factory=Counter)
    frozen: int = 0

    def __post_init__(self) -> None:
        request, config = self.request, self.request.transformer.config
        _, frames, height, width = self.latents.shape
        _, down, across = config.patch_size
        self.grid = (height // down, width // across)
        chunks = frames // request.chunk_frames
        self.tokens = request.chunk_frames * self.grid[0] * self.grid[1]
        self.branches = [
            _Branch(context, KeyCache(config, chunks * self.tokens)) for context in request.contexts
        ]
        self.samplers = [init_sampler() for _ in range(chunks)]
        self.angles = [
            rope_tables(
                request.chunk_frames,
                *self.grid,
                config.rope_axes,
                config.rope_theta,
                config.rope_max_positions,
                first_frame=chunk * request.chunk_frames,
            )
            for chunk in range(chunks)
        ]

    def frames_of(self, chunk: int) -> slice:
        """The latent frames of a chunk."""
        size = self.request.chunk_frames
        return slice(chunk * size, (chunk + 1) * size)


def denoise_window(
    window: Window, after_row: Callable[[int], None] = lambda row: None
) -> Iterator[FinishedChunk]:
    """Denoise the chunks of a window that are not its prefix.

    Args:
        window: Its latents are changed in place.
        after_row: Called with the number of every row that is done.

    Yields:
        Each chunk right after its last step, in the order of time.

    Raises:
        EngineError: An engine failed, or computed NaN; the message names component, chunk, step.
    """
    steps = len(window.request.table.timesteps)
    for row, (step, update) in enumerate(
        zip(window.matrix.step, window.matrix.update, strict=True)
    ):
        while step[window.frozen] > steps:
            _clean_pass(window, window.frozen)
            window.frozen += 1
        for chunk in _numbers(update):
            _take_step(window, chunk)
        after_row(row)
        for chunk in _numbers(update & (step == steps)):
            latents = window.latents[:, window.frames_of(chunk)].copy()
            yield FinishedChunk(chunk, latents, window.computed)
            window.computed = Counter()


def _numbers(chosen: NDArray[np.bool_]) -> list[int]:
    return [int(number) for number in np.flatnonzero(chosen)]


def _take_step(window: Window, chunk: int) -> None:
    """One sampler step of a chunk, with guidance."""
    frames = window.frames_of(chunk)
    velocities = [_velocity(window, branch, chunk) for branch in window.branches]
    velocity = velocities[0]
    if len(velocities) == 2:
        cond, uncond = velocities
        velocity = uncond + np.float32(window.request.guidance_scale) * (cond - uncond)
    following, state = sampler_step(
        window.request.table, window.samplers[chunk], velocity, window.latents[:, frames]
    )
    window.latents[:, frames] = following
    window.samplers[chunk] = state


def _velocity(window: Window, branch: _Branch, chunk: int) -> Latents:
    """The model's velocity for a chunk: reused tokens keep their residual, others are computed."""
    request, step = window.request, window.samplers[chunk].step
    latents = window.latents[:, window.frames_of(chunk)]
    transformer, patch = request.transformer, request.transformer.config.patch_size
    if step == 0:
        branch.policy_states[chunk] = request.policy.init_state(window.tokens)
    plan, branch.policy_states[chunk] = request.policy.plan_step(branch.policy_states[chunk])
    x = transformer.embed(patchify(latents, patch))
    out = _block_output(window, branch, chunk, x, np.flatnonzero(plan.recompute), step)
    patches = transformer.head(out, request.conditions.head_modulation[step : step + 1])
    if not np.isfinite(patches).all():
        values = {"embed": x, "block": out, "head": patches}
        _refuse_nan(values, window.first_chunk + chunk, step)
    shape = (transformer.config.out_channels, *latents.shape[1:])
    return unpatchify(patches, patch, shape)


def _block_output(
    window: Window,
    branch: _Branch,
    chunk: int,
    x: NDArray[np.float32],
    rows: NDArray[np.intp],
    step: int,
) -> NDArray[np.float32]:
    """Output of the last block for every token of a chunk; updates the branch's residual."""
    kind = "full" if len(rows) == window.tokens else "partial" if len(rows) else "reuse"
    window.computed += Counter({kind: 1, "tokens": len(rows)})
    if kind == "full":
        out = _recompute(window, branch, chunk, x, rows, step)
        branch.residuals[chunk] = out - x
        return out
    residual = branch.residuals[chunk]
    out = x + residual
    if kind == "partial":
        y = _recompute(window, branch, chunk, x, rows, step)
        out[:, rows] = y
        residual[:, rows] = y - x[:, rows]
    return out


def _clean_pass(window: Window, chunk: int) -> None:
    """Write the keys of a finished chunk, or of a chunk of the prefix, for good."""
    request, frames = window.request, window.frames_of(chunk)
    is_prefix = frames.stop <= window.prefix.shape[1]
    latents = (window.prefix if is_prefix else window.latents)[:, frames]
    row = request.prefix_row if is_prefix else request.clean_row
    x = request.transformer.embed(patchify(latents, request.transformer.config.patch_size))
    for branch in window.branches:
        _recompute(window, branch, chunk, x, np.arange(window.tokens), row)
        window.computed += Counter({"clean": 1, "tokens": window.tokens})


def _recompute(
    window: Window,
    branch: _Branch,
    chunk: int,
    x: NDArray[np.float32],
    rows: NDArray[np.intp],
    row: int,
) -> NDArray[np.float32]:
    request = window.request
    return request.transformer.recompute(
        x,
        rows,
        request.conditions.modulation[row : row + 1],
        window.angles[chunk],
        branch.context,
        branch.cache,
        chunk * window.tokens,
    )


def _refuse_nan(values: Arrays, chunk: int, step: int) -> None:
    component = next(name for name, value in values.items() if not np.isfinite(value).all())
    raise EngineError(
        f"{component}: expected finite values, got NaN or infinity in chunk {chunk}, "
        f"step {step + 1}. Check the bundle with mc-inspect --verify, and the latents."
    )
