"""SkyReels-V2 and other chunk-causal Wan models: two branches, UniPC, residuals of the blocks.

Neighbours: `mc_runtime.generation` starts a run of this family, `denoise_window` asks for its
steps. A reused token keeps the residual of the block stack, branch by branch, or goes by its
velocities where the policy extrapolates; the distance of a step is that of the modulation, known
before the run.

A finished chunk's clean pass at timestep 0 equals evaluating it again in every later row, as
diffusers does, because nothing that it sees changes any more.
"""

__all__ = [
    "SkyreelsRun",
    "SkyreelsSteps",
    "count_continued",
    "count_vanilla",
    "default_options",
    "describe",
    "limit_video",
    "list_timesteps",
    "pick_prompts",
    "plan",
    "read_grid",
    "rehearse",
    "start",
]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.building.bounds import VideoLimits
from mc_runtime.decisions import Decisions
from mc_runtime.denoise import Window
from mc_runtime.families.family import Place, Rehearsal
from mc_runtime.flops import Job, ModelFlops, Work, vanilla_work
from mc_runtime.inputs import Inputs, NamedText, Prompt, pick_texts
from mc_runtime.latent_motion import measure_latent_motion
from mc_runtime.options import GenerationOptions
from mc_runtime.passes import Passes, Values
from mc_runtime.patches import patchify, unpatchify
from mc_runtime.rope import chunk_tables
from mc_runtime.run_plan import RunPlan, plan_run
from mc_runtime.sampler import (
    SamplerState,
    SamplerTable,
    init_sampler,
    sampler_step,
    sampler_table,
    sigma_table,
)
from mc_runtime.schedule import LatentGrid, validate_options
from mc_runtime.schedule import Window as WindowPlan
from mc_runtime.transformer import Conditions
from mc_runtime.velocity_trend import VelocityTrend, renew_trend
from motioncache import DistanceTable, Mode, Plan, Policy

CLEAN_TIMESTEP = 0
_REHEARSED = 500  # timestep; what a pass computes is the same at any
Latents = NDArray[np.float32]


def default_options(config: Mapping[str, Any]) -> GenerationOptions:
    """Take the defaults of a model; see `Family.defaults`."""
    return GenerationOptions(**config.get("video", {}))


def read_grid(config: Mapping[str, Any]) -> LatentGrid:
    """Read what latents and tokens stand for: Wan's factors where there is no VAE."""
    patch_size = tuple(config["transformer"]["patch_size"])
    vae = config.get("vae")
    if vae is None:
        return LatentGrid(patch_size=patch_size)
    return LatentGrid(vae["temporal_factor"], vae["spatial_factor"], patch_size)


def count_continued(frames: int, options: GenerationOptions) -> int:
    """Count the frames of a given video that are continued: as many as windows overlap."""
    return min(frames, options.overlap_history)


def plan(
    options: GenerationOptions, prefix: int, grid: LatentGrid, config: Mapping[str, Any]
) -> RunPlan:
    """Lay out a run; see `Family.plan`."""
    validate_options(options, prefix, grid)
    return plan_run(options, prefix, grid)


def limit_video(options: GenerationOptions, config: Mapping[str, Any]) -> VideoLimits:
    """Return the size of a run's largest window; see `Family.limits`."""
    frames = min(options.num_frames, options.base_num_frames)
    return VideoLimits(options.height, options.width, frames, options.causal_block_size)


def count_vanilla(flops: ModelFlops, plan: RunPlan, text_tokens: Sequence[int]) -> Work:
    """Count what diffusers takes; see `Family.vanilla`."""
    return vanilla_work(flops, Job.from_plan(plan, text_tokens))


def list_timesteps(options: GenerationOptions, config: Mapping[str, Any]) -> NDArray[np.int64]:
    """List the timestep of every step, 0 to 999; see `Family.timesteps`."""
    return sigma_table(options.num_inference_steps, options.flow_shift, options.sigma_table)[1]


def pick_prompts(positive: Prompt, negative: Prompt, plan: RunPlan) -> Sequence[NamedText]:
    """Choose the prompts: the negative one with guidance alone; see `pick_texts`."""
    return pick_texts(positive, negative, plan.shape.branches)


@dataclass
class SkyreelsRun:
    """What all windows of a generation have in common.

    Attributes:
        passes: Of the transformer.
        policy: Decides which tokens are recomputed.
        contexts: Keys and values of the prompt per branch: cond, and uncond with guidance.
        options: Of the run.
        table: Of the sampler.
        conditions: One row per step, then one for timestep 0 and one for the prefix's timestep.
        distances: Between the steps.
        histories: Per branch, by chunk, what its last frame was when motion was measured: block
            output (1, P, C), or clean latents (P, c). The motion of the next chunk starts from it.
    """

    passes: Passes
    policy: Policy
    contexts: Sequence[Any]
    options: GenerationOptions
    table: SamplerTable
    conditions: Conditions
    distances: DistanceTable
    histories: list[dict[int, Values]]

    @property
    def clean_row(self) -> int:
        """Row of `conditions` for a finished chunk."""
        return len(self.table.timesteps)

    @property
    def prefix_row(self) -> int:
        """Row of `conditions` for a chunk of the prefix."""
        return len(self.table.timesteps) + 1

    def open_window(self, window: Window, cut: WindowPlan) -> "SkyreelsSteps":
        """Begin a window.

        Args:
            window: Its state.
            cut: Where it lies in the video.

        Returns:
            Its steps.
        """
        if self.policy.reset_history:
            self.histories = [{} for _ in self.contexts]
        shown = _show_prefix(self.options, window.latents[:, : cut.prefix], window.number)
        return SkyreelsSteps(self, window, shown)


def describe(
    config: Mapping[str, Any], options: GenerationOptions, plan: RunPlan, tokens: Sequence[int]
) -> dict[str, Any]:
    """Say how long the text of each branch is; see `Family.describe`."""
    return {"text_tokens": list(tokens[: plan.shape.branches])}


def start(inputs: Inputs, plan: RunPlan, passes: Passes, policy: Policy) -> SkyreelsRun:
    """Compute what all windows share: the prompt's keys and the modulation, once.

    Args:
        inputs: Tensors and settings.
        plan: Of the run.
        passes: Of the transformer.
        policy: Has accepted the shape of the run.

    Returns:
        The run.
    """
    options = inputs.options
    table = sampler_table(
        options.num_inference_steps, options.flow_shift, options.sigma_table, options.first_sample
    )
    timesteps = np.append(table.timesteps, [CLEAN_TIMESTEP, options.addnoise_condition])
    conditions = passes.encode_timesteps(timesteps, options.fps)
    return SkyreelsRun(
        passes,
        policy,
        [passes.encode_context(embedding) for embedding in inputs.embeddings],
        options,
        table,
        conditions,
        DistanceTable.from_modulation(conditions.modulation[: len(table.timesteps)]),
        [{} for _ in inputs.embeddings],
    )


def rehearse(
    passes: Passes, options: GenerationOptions, plan: RunPlan, config: Mapping[str, Any]
) -> Rehearsal:
    """Give the passes of a run at every place of a window; see `Family.rehearse`."""
    conditions = passes.encode_timesteps(np.array([_REHEARSED]), options.fps)
    chunks = plan.shape.active.shape[1]

    def make(branch: Any, place: Place, x: Values, rows: NDArray[np.intp]) -> None:
        out = passes.evaluate(branch, place.chunk, x, rows, conditions.modulation)
        passes.read(out, conditions.head_modulation)

    places = [
        Place(f"chunk {chunk + 1}", chunk, range(chunk + 1), chunks) for chunk in range(chunks)
    ]
    return Rehearsal(places, make)


def _show_prefix(options: GenerationOptions, prefix: Latents, number: int) -> Latents:
    """The prefix of a window as the model sees it: with noise, drawn once per window."""
    share = np.float32(0.001 * options.addnoise_condition)
    drawn = np.random.default_rng([options.seed, number + 1])
    noise = drawn.standard_normal(prefix.shape, np.float32)
    return (1 - share) * prefix + share * noise


@dataclass
class _Branch:
    """What one guidance branch remembers within a window.

    Attributes:
        number: 0 cond, 1 uncond.
        memory: Keys, values and residuals, where the engines run.
        decisions: What the policy makes of it.
        last_frames: The run's history of this branch.
        trends: By chunk, where the policy extrapolates velocities.
    """

    number: int
    memory: Any
    decisions: Decisions
    last_frames: dict[int, Values]
    trends: dict[int, VelocityTrend] = field(default_factory=dict)


@dataclass
class SkyreelsSteps:
    """The steps of a window.

    Attributes:
        run: Of the generation.
        window: Its latents are moved.
        prefix: Latents of the prefix as the model is shown them, with noise added.
        passes: The run's, on the window's clock.
        samplers: Per chunk.
        branches: cond, and uncond with guidance.
    """

    run: SkyreelsRun
    window: Window
    prefix: Latents
    passes: Passes = field(init=False)
    samplers: list[SamplerState] = field(init=False)
    branches: list[_Branch] = field(init=False)

    def __post_init__(self) -> None:
        run, window = self.run, self.window
        self.passes = run.passes.timed(window.clock)
        self.samplers = [init_sampler() for _ in range(window.chunks)]
        rope, frames = self.passes.config.rope, window.shape.frames
        angles = chunk_tables(rope, window.chunks, frames, window.token_grid)
        decide = run.policy, run.distances, window.shape, window.trace, window.number
        self.branches = [
            _Branch(
                number,
                self.passes.open_branch(context, angles),
                Decisions(*decide, number),
                run.histories[number],
            )
            for number, context in enumerate(run.contexts)
        ]

    def freeze(self, chunk: int) -> None:
        """Write the keys of a chunk for good; see `Steps.freeze`.

        A policy without clean passes leaves a finished chunk the keys of its last computed step.
        """
        run, window = self.run, self.window
        given = window.is_given(chunk)
        if not (given or run.policy.clean_pass):
            return
        row = run.prefix_row if given else run.clean_row
        source, rows = self.prefix if given else window.latents, np.arange(window.shape.tokens)
        with window.timed(0, chunk):
            x = self._embed(source[:, window.frames_of(chunk)])
        for branch in self.branches:
            window.write_pass(branch.number, chunk, Mode.CLEAN, self._padded(len(rows)))
            with window.timed(branch.number, chunk):
                modulation = run.conditions.modulation[row : row + 1]
                self.passes.recompute(branch.memory, chunk, x, rows, modulation)

    def take_step(self, chunk: int, active: Mapping[int, int]) -> None:
        """Take one sampler step of a chunk, with guidance; see `Steps.take_step`."""
        run, window, step = self.run, self.window, active[chunk]
        frames = window.frames_of(chunk)
        with window.timed(0, chunk):
            x = self._embed(window.latents[:, frames])
        velocities, plans = [], []
        for branch in self.branches:
            with window.timed(branch.number, chunk):
                plans.append(branch.decisions.plan(window.row, chunk, active))
                velocities.append(self._velocity(branch, chunk, x, plans[-1], step))
        with window.timed(0, chunk):
            velocity = velocities[0]
            if len(velocities) == 2:
                cond, uncond = velocities
                velocity = uncond + np.float32(run.options.guidance_scale) * (cond - uncond)
            if run.policy.motion == "latents":
                self._observe_latents(chunk, velocity, plans, step)
            window.latents[:, frames], self.samplers[chunk] = sampler_step(
                run.table, self.samplers[chunk], velocity, window.latents[:, frames]
            )

    def _embed(self, latents: Latents) -> Values:
        return self.passes.embed(patchify(latents, self.passes.config.patch_size))

    def _padded(self, tokens: int) -> int:
        return self.passes.bucket(tokens, self.window.shape.tokens)

    def _velocity(self, branch: _Branch, chunk: int, x: Values, plan: Plan, step: int) -> Latents:
        """The model's velocity: of some tokens computed, of the others as the policy reuses it."""
        window, config = self.window, self.passes.config
        rows = np.flatnonzero(plan.recompute)
        mode = Mode.of(len(rows), window.shape.tokens)
        window.write_pass(branch.number, chunk, mode, self._padded(len(rows)))
        share = self.run.policy.extrapolation
        if share is None:
            patches = self._keep_residuals(branch, chunk, x, plan, step)
        else:
            if len(rows):
                self._renew_trend(branch, chunk, x, rows, step)
            patches = branch.trends[chunk].at(step, share)
        shape = (config.out_channels, window.shape.frames, *window.latents.shape[2:])
        return unpatchify(patches, config.patch_size, shape)

    def _keep_residuals(
        self, branch: _Branch, chunk: int, x: Values, plan: Plan, step: int
    ) -> NDArray[np.float32]:
        """Velocity of every token, reused ones by their residual; show the policy its motion."""
        run, window, passes = self.run, self.window, self.passes
        rows, row = np.flatnonzero(plan.recompute), slice(step, step + 1)
        out = passes.evaluate(branch.memory, chunk, x, rows, run.conditions.modulation[row])
        observed = plan.wants_motion and run.policy.motion == "output"
        reading = passes.read(
            out,
            run.conditions.head_modulation[row],
            window.shape.frames if observed else 0,
            branch.last_frames.get(chunk - 1) if observed else None,
        )
        window.refuse_nan(passes, x, out, reading.by_component, chunk, step)
        if reading.motion is not None:
            branch.last_frames[chunk] = reading.last_frame
            branch.decisions.observe(window.row, chunk, reading.motion)
        return reading.patches

    def _renew_trend(
        self, branch: _Branch, chunk: int, x: Values, rows: NDArray[np.intp], step: int
    ) -> None:
        """Compute some tokens, at first all, and remember their velocity."""
        run, passes, row = self.run, self.passes, slice(step, step + 1)
        modulation, head = run.conditions.modulation[row], run.conditions.head_modulation[row]
        out = passes.recompute(branch.memory, chunk, x, rows, modulation)
        reading = passes.read(out, head)
        self.window.refuse_nan(passes, x, out, reading.by_component, chunk, step)
        fresh = reading.patches[0, : len(rows)]
        branch.trends[chunk] = renew_trend(branch.trends.get(chunk), rows, fresh, step)

    def _observe_latents(
        self, chunk: int, velocity: Latents, plans: Sequence[Plan], step: int
    ) -> None:
        """Show the policy in every branch how the clean latents move that this step predicts."""
        if not any(plan.wants_motion for plan in plans):
            return
        window = self.window
        latents = window.latents[:, window.frames_of(chunk)]
        clean = latents - self.run.table.sigmas[step] * velocity
        rows = patchify(clean, self.passes.config.patch_size)
        frames = rows.reshape(window.shape.frames, -1, rows.shape[2])
        for branch, plan in zip(self.branches, plans, strict=True):
            motion = measure_latent_motion(frames, branch.last_frames.get(chunk - 1))
            branch.last_frames[chunk] = frames[-1]
            if plan.wants_motion:
                branch.decisions.observe(window.row, chunk, motion)
