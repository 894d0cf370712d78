"""The steps of MAGI-1: branches with weights by timestep, Euler steps, reuse of the velocity.

Neighbours: `magi` starts a run, `magi_schedule` has its timesteps, key ranges and guidance;
`denoise_window` asks for the steps.

The distance of a step is how far the chunk's embedded latents have moved, so the policy decides
once for all branches; what is computed of a token is the guided velocity, and a reused token keeps
it. A finished chunk's clean pass is made nearly clean and without the prompt. With three branches
the one with the prompt sees finished chunks as the history branch wrote them, except in the row of
the clean pass itself, in which it has made its own.

Chunks that a prefix fills have that pass first. Where it ends within a chunk, the frames that it
gives go through every pass as they are, at the time of the chunk, and are never moved; published
image-to-video leaves its first frame as the last step moved it.

Source: SandAI-org/MAGI-1 6ff822e, inference/pipeline/video_generate.py; the defects that
`MagiSwitches` can bring back are those of ywlq/MotionCache a8d2a47, MotionCache4MAGI-1.
"""

__all__ = ["MagiRun", "MagiSteps", "MagiTexts"]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_runtime.decisions import Decisions
from mc_runtime.denoise import Window
from mc_runtime.families.magi_schedule import MagiBranch, MagiSchedule
from mc_runtime.latent_motion import measure_latent_motion
from mc_runtime.passes import Passes, Values, View
from mc_runtime.patches import patchify, unpatchify
from mc_runtime.rope import chunk_tables
from mc_runtime.schedule import Window as WindowPlan
from motioncache import InputDistance, Mode, Plan, Policy
from motioncache.config import MAGI_FIXED, MagiSwitches

_CLEAN = -1  # behind the steps, in the tables of a run
Rows = NDArray[np.float32]  # patches of velocity, shape (tokens, ph*pw*c)


@dataclass(frozen=True)
class MagiTexts:
    """Keys and values of what the branches attend to.

    Attributes:
        null: Of the null caption.
        by_duration: Of the prompt, for 1, 2 and more chunks left; the last holds beyond.
    """

    null: Any
    by_duration: Sequence[Any]

    def of(self, branch: MagiBranch, left: int) -> Any:
        """What a branch sees while a number of chunks is left."""
        return self.by_duration[:left][-1] if branch.prompted else self.null


@dataclass(frozen=True)
class MagiRun:
    """What a generation computes once.

    Attributes:
        passes: Of the transformer.
        policy: Decides which tokens are recomputed.
        schedule: Of the run.
        texts: Keys and values of the prompt and of the null caption.
        modulation: By row of the null caption, of every step and of the clean pass behind them,
            each shape (N + 1, E).
        chunks: Of the video.
    """

    passes: Passes
    policy: Policy
    schedule: MagiSchedule
    texts: MagiTexts
    modulation: Sequence[NDArray[np.float32]]
    chunks: int

    @property
    def switches(self) -> MagiSwitches:
        """Where the policy has its own way."""
        return self.policy.switches or MAGI_FIXED

    def open_window(self, window: Window, cut: WindowPlan) -> "MagiSteps":
        """Begin the window.

        Args:
            window: Its state.
            cut: Where it lies in the video.

        Returns:
            Its steps.
        """
        return MagiSteps(self, window)


@dataclass
class MagiSteps:
    """The steps of the window.

    Attributes:
        run: Of the generation.
        window: Its latents are moved.
        passes: The run's, on the window's clock.
        guidance: The run's schedule, without the guidance that the policy drops.
        memories: Keys and values by branch, where the engines run.
        decisions: What the policy makes of the run.
        embedded: By chunk, its embedded latents in the step before.
        kept: By chunk, what a reused token moves by: velocities, or as published increments.
        started: Branches that see a chunk alone and have computed it, with that chunk.
        borrowed: Rows in which a branch with the prompt made its own keys of a finished chunk, each
            with the chunk.
        waiting: As published: a row, and the share and the nearly clean velocities that wait in it
            for the first chunk that is computed.
    """

    run: MagiRun
    window: Window
    passes: Passes = field(init=False)
    guidance: MagiSchedule = field(init=False)
    memories: list[Any] = field(init=False)
    decisions: Decisions = field(init=False)
    embedded: dict[int, Values] = field(default_factory=dict)
    kept: dict[int, Rows] = field(default_factory=dict)
    started: set[tuple[int, int]] = field(default_factory=set)
    borrowed: list[tuple[int, int]] = field(default_factory=list)
    waiting: tuple[int, np.float32, Rows] | None = None

    def __post_init__(self) -> None:
        run, window = self.run, self.window
        self.passes = run.passes.timed(window.clock)
        size, schedule, rope = window.shape.frames, run.schedule, self.passes.config.rope
        angles = chunk_tables(rope, window.chunks, size, window.token_grid)
        self.guidance = schedule
        if schedule.nearly_clean_timestep is not None and (
            not run.switches.nearly_clean or self._mixes_elsewhere
        ):
            self.guidance = replace(schedule, nearly_clean_timestep=math.inf)  # no time is beyond
        self.memories = [
            self.passes.open_branch(run.texts.null, angles, kept)
            for kept in schedule.slots(window.chunks, window.prefix // size)
        ]
        self.decisions = Decisions(run.policy, None, window.shape, window.trace, window.number, 0)

    def freeze(self, chunk: int) -> None:
        """Write the keys of a chunk for good; see `Steps.freeze`.

        A policy without clean passes leaves a finished chunk the keys of its last computed step.
        """
        run, window = self.run, self.window
        given = window.is_given(chunk)
        if given or run.policy.clean_pass:
            with window.timed(0, chunk):
                x = self._embed(chunk)
            seen, tokens = run.schedule.visible_clean(chunk, given), self._tokens
            for number in run.schedule.clean_branches(given):
                window.write_pass(number, chunk, Mode.CLEAN, self._padded(window.shape.tokens))
                with window.timed(number, chunk):
                    self._compute(number, chunk, x, tokens, _CLEAN, View(seen, run.texts.null))
        if given:
            self._hand_over(chunk)
        else:
            self.borrowed.append((window.row, chunk))
        self.embedded.pop(chunk, None)
        self.kept.pop(chunk, None)

    def take_step(self, chunk: int, active: Mapping[int, int]) -> None:
        """Take one Euler step of a chunk, with guidance; see `Steps.take_step`."""
        window, step = self.window, active[chunk]
        self._give_back_keys()
        with window.timed(0, chunk):
            x = self._embed(chunk)
            measured = self._measure(chunk, x)
            plan = self.decisions.plan(window.row, chunk, active, measured)
        rows = np.flatnonzero(plan.recompute)
        velocity = self._guide(chunk, x, rows, active)
        if self._mixes_elsewhere:
            velocity, rows = self._mix_published(chunk, x, plan, velocity, active)
        with window.timed(0, chunk):
            self._move(chunk, velocity, rows, step)
            if plan.wants_motion:
                self.decisions.observe(window.row, chunk, self._motion(chunk))

    def _give_back_keys(self) -> None:
        """After the row of a clean pass, take over what the branch without the prompt wrote."""
        while self.borrowed and self.borrowed[0][0] < self.window.row:
            self._hand_over(self.borrowed.pop(0)[1])

    def _hand_over(self, chunk: int) -> None:
        """Give the branches with the prompt the keys that the one without it has of a chunk."""
        numbers = self.run.schedule.clean_branches(given=False)
        *prompted, plain = (self.memories[number] for number in numbers)
        for memory in prompted:
            self.passes.copy_keys(plain, memory, chunk)

    def _embed(self, chunk: int) -> Values:
        latents = self.window.latents[:, self.window.frames_of(chunk)]
        return self.passes.embed(patchify(latents, self.passes.config.patch_size))

    def _padded(self, tokens: int) -> int:
        return self.passes.bucket(tokens, self.window.shape.tokens)

    def _measure(self, chunk: int, x: Values) -> InputDistance | None:
        """How far the embedded latents have moved since the step before, if there was one."""
        before, now = self.embedded.get(chunk), self.passes.to_host(x)
        self.embedded[chunk] = now
        return None if before is None else InputDistance(now, before)

    def _guide(
        self, chunk: int, x: Values, rows: NDArray[np.intp], active: Mapping[int, int]
    ) -> Rows:
        """The guided velocity of the tokens that are recomputed, shape (K, ph*pw*c)."""
        window, schedule = self.window, self.guidance
        weights = schedule.weights(active[chunk], chunk == min(active))
        guided = np.zeros((len(rows), 1), np.float32)
        for number, branch in enumerate(schedule.branches):
            if not schedule.takes_part(number, chunk, active):
                continue
            due = rows
            if branch.alone and len(rows) and (number, chunk) not in self.started:
                self.started.add((number, chunk))
                due = self._tokens  # as it has no keys of the chunk yet
            mode = Mode.of(len(due), window.shape.tokens)
            window.write_pass(number, chunk, mode, self._padded(len(due)))
            self.decisions.repeat(window.row, chunk, number)
            window.trace.recompute[window.row, number, chunk, due] = 1
            if len(rows):
                with window.timed(number, chunk):
                    velocity = self._velocity(number, branch, chunk, x, due, active)
                velocity = velocity if len(due) == len(rows) else velocity[rows]
                guided = guided + np.float32(weights[number]) * velocity
        return guided

    @property
    def _mixes_elsewhere(self) -> bool:
        """Whether nearly clean velocities go where the published cache puts them."""
        chosen = self.run.switches
        guided = len(self.run.schedule.branches) == 2
        return guided and chosen.nearly_clean and not chosen.mix_own_chunk

    def _mix_published(
        self, chunk: int, x: Values, plan: Plan, velocity: Rows, active: Mapping[int, int]
    ) -> tuple[Rows, NDArray[np.intp]]:
        """Mix the oldest chunk's nearly clean velocity into the first chunk that is computed.

        Of a chunk that was reused as a whole it is not made; where only its tokens were, it is.

        Returns:
            Velocities, and which tokens of the chunk count as computed.
        """
        window, schedule, rows = self.window, self.run.schedule, np.flatnonzero(plan.recompute)
        tokens, oldest = self._tokens, chunk == min(active)
        _, alone = schedule.weights(active[chunk], oldest)
        if alone and (len(rows) or np.ndim(plan.accumulated)):
            view = View([chunk], self.run.texts.of(schedule.branches[1], self.run.chunks - chunk))
            window.write_pass(1, chunk, Mode.FULL, self._padded(len(tokens)))
            window.trace.recompute[window.row, 1, chunk] = 1
            with window.timed(1, chunk):
                copy = self._compute(1, chunk, x, tokens, active[chunk], view)
            self.waiting = window.row, np.float32(alone), copy
        if self.waiting is None or self.waiting[0] != window.row or not len(rows):
            return velocity, rows
        _, share, copy = self.waiting
        mixed = share * copy
        mixed[rows] += (1 - share) * velocity
        self.waiting = None
        return mixed, tokens

    def _velocity(
        self,
        number: int,
        branch: MagiBranch,
        chunk: int,
        x: Values,
        rows: NDArray[np.intp],
        active: Mapping[int, int],
    ) -> Rows:
        """The velocity of some tokens in a branch."""
        run, step = self.run, active[chunk]
        context = run.texts.of(branch, run.chunks - chunk)
        seen: Sequence[int] = [chunk]
        if not branch.alone:
            seen = self._visible(chunk, active, len(rows) < self.window.shape.tokens)
        return self._compute(number, chunk, x, rows, step, View(seen, context))

    @property
    def _tokens(self) -> NDArray[np.intp]:
        """All tokens of a chunk."""
        return np.arange(self.window.shape.tokens)

    def _visible(self, chunk: int, active: Mapping[int, int], partial: bool) -> Sequence[int]:
        """Chunks whose keys a pass sees: its own range, or as published the oldest chunk's."""
        place = min(active) if partial and not self.run.switches.own_keys else chunk
        return self.run.schedule.visible(place, active[place])

    def _compute(
        self,
        number: int,
        chunk: int,
        x: Values,
        rows: NDArray[np.intp],
        step: int,
        view: View,
    ) -> Rows:
        """Run the model in a branch on some tokens of a chunk; the clean pass gives nothing."""
        passes, null_row = self.passes, self.run.schedule.branches[number].null_row
        modulation = self.run.modulation[null_row][step][None]
        out = passes.recompute(self.memories[number], chunk, x, rows, modulation, view)
        if step == _CLEAN:
            return np.zeros((0, 1), np.float32)
        patches = passes.read(out, np.zeros((1, 0), np.float32)).patches[0, : len(rows)]
        self.window.refuse_nan(passes, x, out, {"head": patches}, chunk, step)
        return patches

    def _move(self, chunk: int, velocity: Rows, rows: NDArray[np.intp], step: int) -> None:
        """Move the latents of a chunk by one step: computed tokens by their new velocity."""
        run, window = self.run, self.window
        length = run.schedule.timesteps[step + 1] - run.schedule.timesteps[step]
        if run.switches.reuse_velocity:
            kept = self._renew(chunk, velocity, rows)
            moved = kept * length
        else:
            kept = moved = self._renew(chunk, velocity * length, rows)
        self.kept[chunk] = kept
        config, frames = self.passes.config, window.frames_of(chunk)
        shape = config.out_channels, window.shape.frames, *window.latents.shape[2:]
        given = max(window.prefix - frames.start, 0)  # frames of the chunk that stay
        free = slice(frames.start + given, frames.stop)
        window.latents[:, free] += unpatchify(moved, config.patch_size, shape)[:, given:]

    def _renew(self, chunk: int, fresh: Rows, rows: NDArray[np.intp]) -> Rows:
        """What every token of a chunk moves by, with that of the computed ones renewed."""
        if len(rows) == self.window.shape.tokens:
            return fresh
        renewed = self.kept[chunk].copy()
        renewed[rows] = fresh
        return renewed

    def _motion(self, chunk: int) -> NDArray[np.float32]:
        """How the latents of a chunk move from frame to frame, after its step."""
        window, patch = self.window, self.passes.config.patch_size
        size = window.shape.frames
        first = max(chunk * size - 1, 0)
        latents = window.latents[:, first : (chunk + 1) * size]
        rows = patchify(latents, patch).reshape(latents.shape[1], window.shape.positions, -1)
        return measure_latent_motion(rows[-size:], rows[0] if chunk else None)
