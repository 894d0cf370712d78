"""The loop: chunks of a window move from noise to latents, each as soon as its turn comes.

Neighbours: `step_matrix` says which chunk takes which step in a row, the policy which tokens are
recomputed, `Passes` computes, `sampler_step` moves the latents. `VideoPipeline` feeds windows
in and decodes what comes out.

A chunk sees its own keys and those of the chunks before it. When it is finished, one clean pass at
timestep 0 writes its keys for good: that equals evaluating it again in every later row, as
diffusers does, because nothing that it sees changes any more. A prefix gets that pass first.
"""

__all__ = ["FinishedChunk", "Request", "Window", "denoise_window"]

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.errors import EngineError
from mc_engines.runner import Arrays
from mc_engines.timed_runner import Clock
from mc_runtime.decisions import Decisions
from mc_runtime.latent_motion import measure_latent_motion
from mc_runtime.passes import Angles, Passes, Values
from mc_runtime.patches import patchify, unpatchify
from mc_runtime.rope import rope_tables
from mc_runtime.sampler import SamplerState, SamplerTable, init_sampler, sampler_step
from mc_runtime.schedule import StepMatrix
from mc_runtime.transformer import Conditions
from motioncache import DecisionTrace, DistanceTable, Mode, Plan, Policy, RunShape

Latents = NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """What all windows of a generation have in common.

    Attributes:
        passes: Of the transformer.
        policy: Decides which tokens are recomputed.
        contexts: Keys and values of the prompt per branch: cond, and uncond with guidance.
        guidance_scale: g of `uncond + g * (cond - uncond)`.
        table: Of the sampler.
        conditions: One row per step, then one for timestep 0 and one for the prefix's timestep.
        chunk_frames: Latent frames F of a chunk.
        distances: Between the steps.
        shape: Of the run, for the policy.
        trace: Of the run; every decision is written into it.
    """

    passes: Passes
    policy: Policy
    contexts: Sequence[Any]
    guidance_scale: float
    table: SamplerTable
    conditions: Conditions
    chunk_frames: int
    distances: DistanceTable
    shape: RunShape
    trace: DecisionTrace

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
    computed: Mapping[str, int]


@dataclass
class _Branch:
    """What one guidance branch remembers within a window.

    Attributes:
        number: 0 cond, 1 uncond.
        memory: Keys, values and residuals, where the engines run.
        decisions: What the policy makes of it.
        last_frames: By chunk, what its last frame was when motion was measured: block output
            (1, P, C), or clean latents (P, c). The motion of the next chunk starts from it.
    """

    number: int
    memory: Any
    decisions: Decisions
    last_frames: dict[int, Values]


@dataclass
class Window:
    """The state of one window; belongs to one generation.

    Attributes:
        request: Of the generation.
        latents: Prefix and noise at first, shape (c, frames, h, w); changed step by step.
        prefix: Latents of the prefix as the model is shown them, with noise added.
        matrix: Which chunk takes which step in which row.
        first_chunk: Number in the video of the window's first chunk, for messages.
        number: Of the window in the run.
        histories: Per branch, the last frames by chunk that motion may be measured from.
        branches: cond, and uncond with guidance.
        samplers: Per chunk.
        clock: Time in engines.
        passes: The request's, on this clock.
        row: Of the run, that is being computed.
        frozen: Chunks whose keys are final.
    """

    request: Request
    latents: Latents
    prefix: Latents
    matrix: StepMatrix
    first_chunk: int
    number: int
    histories: Sequence[dict[int, Values]]
    branches: list[_Branch] = field(init=False)
    samplers: list[SamplerState] = field(init=False)
    clock: Clock = field(default_factory=Clock)
    passes: Passes = field(init=False)
    row: int = field(init=False)
    frozen: int = 0

    def __post_init__(self) -> None:
        request, config = self.request, self.request.passes.config
        self.passes = request.passes.timed(self.clock)
        self.row = request.shape.window_start[self.number]
        self.tokens = request.shape.tokens
        _, frames, height, width = self.latents.shape
        _, down, across = config.patch_size
        chunks = frames // request.chunk_frames
        self.samplers = [init_sampler() for _ in range(chunks)]
        angles = [
            rope_tables(
                request.chunk_frames,
                height // down,
                width // across,
                config.rope_axes,
                config.rope_theta,
                config.rope_max_positions,
                first_frame=chunk * request.chunk_frames,
            )
            for chunk in range(chunks)
        ]
        self.branches = [self._open_branch(number, angles) for number in range(len(self.histories))]

    def _open_branch(self, number: int, angles: Sequence[Angles]) -> _Branch:
        request = self.request
        return _Branch(
            number,
            self.passes.open_branch(request.contexts[number], angles),
            Decisions(
                request.policy,
                request.distances,
                request.shape,
                request.trace,
                self.number,
                number,
            ),
            self.histories[number],
        )

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
    steps, trace = len(window.request.table.timesteps), window.request.trace
    counted = window.row
    for row, (step, update) in enumerate(
        zip(window.matrix.step, window.matrix.update, strict=True)
    ):
        while step[window.frozen] > steps:
            _freeze(window, window.frozen)
            window.frozen += 1
        active = {chunk: window.samplers[chunk].step for chunk in _numbers(update)}
        for chunk in active:
            _take_step(window, chunk, active)
        window.row += 1
        after_row(row)
        for chunk in _numbers(update & (step == steps)):
            latents = window.latents[:, window.frames_of(chunk)].copy()
            yield FinishedChunk(chunk, latents, trace.count(slice(counted, window.row)))
            counted = window.row


def _numbers(chosen: NDArray[np.bool_]) -> list[int]:
    return [int(number) for number in np.flatnonzero(chosen)]


@contextmanager
def _timed(window: Window, branch: int, chunk: int) -> Generator[None]:
    """Add what passes to the trace of a chunk, in engines and elsewhere."""
    trace, at = window.request.trace, (window.row, branch, chunk)
    start, engines = time.perf_counter(), window.clock.seconds
    try:
        yield
    finally:
        spent = window.clock.seconds - engines
        trace.engine_ms[at] += 1e3 * spent
        trace.host_ms[at] += 1e3 * (time.perf_counter() - start - spent)


def _take_step(window: Window, chunk: int, active: Mapping[int, int]) -> None:
    """One sampler step of a chunk, with guidance; `active` has the step of each active chunk."""
    frames = window.frames_of(chunk)
    with _timed(window, 0, chunk):
        x = _embed(window, window.latents[:, frames])
    velocities, plans = [], []
    for branch in window.branches:
        with _timed(window, branch.number, chunk):
            plans.append(branch.decisions.plan(window.row, chunk, active))
            velocities.append(_velocity(window, branch, chunk, x, plans[-1], active[chunk]))
    with _timed(window, 0, chunk):
        velocity = velocities[0]
        if len(velocities) == 2:
            cond, uncond = velocities
            velocity = uncond + np.float32(window.request.guidance_scale) * (cond - uncond)
        if window.request.policy.motion == "latents":
            _observe_latents(window, chunk, velocity, plans, active[chunk])
        window.latents[:, frames], window.samplers[chunk] = sampler_step(
            window.request.table, window.samplers[chunk], velocity, window.latents[:, frames]
        )


def _embed(window: Window, latents: Latents) -> Values:
    return window.passes.embed(patchify(latents, window.passes.config.patch_size))


def _velocity(
    window: Window, branch: _Branch, chunk: int, x: Values, plan: Plan, step: int
) -> Latents:
    """The model's velocity for a chunk: reused tokens keep their residual, others are computed."""
    request, passes = window.request, window.passes
    rows = np.flatnonzero(plan.recompute)
    whole = len(rows) == window.tokens
    mode = Mode.FULL if whole else Mode.PARTIAL if len(rows) else Mode.REUSE
    _write_pass(window, branch, chunk, mode, len(rows))
    conditions, row = request.conditions, slice(step, step + 1)
    out = passes.evaluate(branch.memory, chunk, x, rows, conditions.modulation[row])
    observed = plan.wants_motion and request.policy.motion == "output"
    reading = passes.read(
        out,
        conditions.head_modulation[row],
        request.chunk_frames if observed else 0,
        branch.last_frames.get(chunk - 1) if observed else None,
    )
    if not np.isfinite(reading.patches).all():
        values = {"embed": x, "block": out}
        on_host = {name: passes.to_host(value) for name, value in values.items()}
        _refuse_nan({**on_host, "head": reading.patches}, window.first_chunk + chunk, step)
    if reading.motion is not None:
        branch.last_frames[chunk] = reading.last_frame
        branch.decisions.observe(window.row, chunk, reading.motion)
    shape = (passes.config.out_channels, request.chunk_frames, *window.latents.shape[2:])
    return unpatchify(reading.patches, passes.config.patch_size, shape)


def _observe_latents(
    window: Window, chunk: int, velocity: Latents, plans: Sequence[Plan], step: int
) -> None:
    """Show the policy in every branch how the clean latents move that this step predicts."""
    if not any(plan.wants_motion for plan in plans):
        return
    request, latents = window.request, window.latents[:, window.frames_of(chunk)]
    clean = latents - request.table.sigmas[step] * velocity
    rows = patchify(clean, window.passes.config.patch_size)
    frames = rows.reshape(request.chunk_frames, -1, rows.shape[2])
    for branch, plan in zip(window.branches, plans, strict=True):
        motion = measure_latent_motion(frames, branch.last_frames.get(chunk - 1))
        branch.last_frames[chunk] = frames[-1]
        if plan.wants_motion:
            branch.decisions.observe(window.row, chunk, motion)


def _write_pass(window: Window, branch: _Branch, chunk: int, mode: Mode, tokens: int) -> None:
    """Write down which pass is made, and how many tokens go through the blocks."""
    trace, at = window.request.trace, (window.row, branch.number, chunk)
    trace.mode[at] = mode
    trace.bucket[at] = window.passes.bucket(tokens, window.tokens)


def _freeze(window: Window, chunk: int) -> None:
    """Write the keys of a chunk of the prefix, or of a finished one, for good.

    A policy without clean passes leaves a finished chunk the keys of its last computed step.
    """
    request, frames = window.request, window.frames_of(chunk)
    is_prefix = frames.stop <= window.prefix.shape[1]
    if not (is_prefix or request.policy.clean_pass):
        return
    row = request.prefix_row if is_prefix else request.clean_row
    with _timed(window, 0, chunk):
        x = _embed(window, (window.prefix if is_prefix else window.latents)[:, frames])
    for branch in window.branches:
        _write_pass(window, branch, chunk, Mode.CLEAN, window.tokens)
        with _timed(window, branch.number, chunk):
            modulation = request.conditions.modulation[row : row + 1]
            window.passes.write_keys(branch.memory, chunk, x, modulation)


def _refuse_nan(values: Arrays, chunk: int, step: int) -> None:
    component = next(name for name, value in values.items() if not np.isfinite(value).all())
    raise EngineError(
        f"{component}: expected finite values, got NaN or infinity in chunk {chunk}, "
        f"step {step + 1}. Check the bundle with mc-inspect --verify, and the latents."
    )
