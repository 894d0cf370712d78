"""MotionCache's reuse rule on MAGI-1: first chunks as a whole wait, later tokens that stand still.

One state per chunk; what is decided holds for all guidance branches, as it rests on what they
share. d_s is the relative change of the chunk's embedded latents since the step before
(`distance.InputDistance`), so it depends on the content and is unknown before the run. With steps s
from 0, a chunk goes through

    warm-up         s <= W: computed in full
    coarse phase    W < s <= W + K:   A <- A + d_s;   reused if A < chunk_threshold,
                    else computed in full and A <- 0
    fine phase      every token t for itself:   A[t] <- A[t] + d_s * w[t];
                    reused if A[t] < threshold, else computed and A[t] <- 0

and, in the fine phase and if they are switched on, through two limits in this order:

    cap             a share r of the tokens may be reused at most, those with the smallest A; r
                    moves from `first_reuse_cap` to `last_reuse_cap` over the rows of the run
    vote            where more than `vote_frames` of the F frames of a position are computed, all
                    are; A of the frames that the vote adds is kept

The weights w come from the motion of the latents x after each step, still noisy as they are, with
c running over the latents of a token:

    motion[f, p]  = mean_c |x[f] - x[f-1]|
    n[f, p]       = (motion[f, p] - min_p) / (max_p - min_p)
    w[f, p]       = floor + (1 - floor) * n[f, p] ** power,   1 in a frame that moves evenly

A chunk's first frame is compared with the last frame of the chunk before; that of the video has
weight 1. (Eq. 9 of the paper copies the second frame's instead.)

`compat="fixed"` departs from the published code by the switches of `config.MagiSwitches`; of these
`force_last_step` is settled here. As published nothing is decided in the last row of the run: a
chunk in its fine phase repeats the choice of the row before, any other is computed.

Source: MotionCache (ywlq/MotionCache a8d2a47, MotionCache4MAGI-1); equations 9 to 13 of the paper.
"""

__all__ = [
    "MagiMotionCacheConfig",
    "MagiMotionCacheState",
    "build",
    "init_state",
    "motion_weights",
    "observe",
    "plan_step",
]

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from motioncache.config import (
    Compat,
    MagiSwitches,
    check_number,
    check_warmup,
    magi_switches,
)
from motioncache.distance import InputDistance
from motioncache.policy import Plan, Policy, RunShape, Scope


@dataclass(frozen=True, kw_only=True)
class MagiMotionCacheConfig:
    """Settings of MotionCache on MAGI-1.

    Attributes:
        threshold: Accumulated weighted distance at which a token is computed again.
        chunk_threshold: Accumulated distance at which a whole chunk is, in the coarse phase.
        warmup_steps: W; steps 0 to W are computed in full.
        coarse_steps: K; steps of the coarse phase.
        weight_floor: Weight of the token that moves least, 0 to 1. At 1 nothing is weighted.
        weight_power: Exponent of the normalised motion, above 0.
        token_distance: Whether the fine phase takes each token's own relative change for d_s.
        first_reuse_cap: Share of a chunk's tokens that may be reused in the first step of the fine
            phase, 0 to 1; 1 for no cap.
        last_reuse_cap: The same in the last row of the run.
        vote_frames: Frames that outvote the others, as described above; None for no vote.
        compat: `fixed`, `reference`, or single switches.
    """

    threshold: float
    chunk_threshold: float
    warmup_steps: int = 4
    coarse_steps: int = 20
    weight_floor: float = 0.6
    weight_power: float = 1.0
    token_distance: bool = False
    first_reuse_cap: float = 1.0
    last_reuse_cap: float = 1.0
    vote_frames: int | None = None
    compat: Compat | MagiSwitches = "fixed"

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        check_number("chunk_threshold", self.chunk_threshold)
        check_number("warmup_steps", self.warmup_steps, whole=True)
        check_number("coarse_steps", self.coarse_steps, whole=True)
        check_number("weight_floor", self.weight_floor, high=1)
        check_number("weight_power", self.weight_power)
        check_number("first_reuse_cap", self.first_reuse_cap, high=1)
        check_number("last_reuse_cap", self.last_reuse_cap, high=1)
        if self.vote_frames is not None:
            check_number("vote_frames", self.vote_frames, whole=True)
        magi_switches(self.compat)

    @property
    def coarse_end(self) -> int:
        """First step of the fine phase."""
        return self.warmup_steps + 1 + self.coarse_steps


@dataclass(frozen=True)
class MagiMotionCacheState:
    """Of one chunk.

    Attributes:
        shape: Of the run.
        first_row: Row of the run in which the chunk takes its first step.
        first_frame: Whether its first latent frame is that of the video.
        step: The coming step, from 0.
        chunk_accumulated: A of the coarse phase.
        accumulated: A of the fine phase, shape (L,).
        weights: w, shape (L,).
        recompute: The choice of the step before, shape (L,).
    """

    shape: RunShape
    first_row: int
    first_frame: bool
    step: int
    chunk_accumulated: float
    accumulated: NDArray[np.float32]
    weights: NDArray[np.float32]
    recompute: NDArray[np.bool_]


def init_state(
    config: MagiMotionCacheConfig, shape: RunShape, scope: Scope
) -> MagiMotionCacheState:
    """Return the state before the first step of a chunk."""
    tokens = shape.tokens
    active = shape.active[shape.rows_of(scope.window), scope.chunk]
    return MagiMotionCacheState(
        shape,
        shape.window_start[scope.window] + int(np.argmax(active)),
        scope.window == 0 and scope.chunk == 0,
        0,
        0.0,
        np.zeros(tokens, np.float32),
        np.ones(tokens, np.float32),
        np.ones(tokens, np.bool_),
    )


def plan_step(
    config: MagiMotionCacheConfig, state: MagiMotionCacheState, distance: InputDistance
) -> tuple[Plan, MagiMotionCacheState]:
    """Decide which tokens of a chunk are recomputed in a step.

    Args:
        config: Settings.
        state: From the step before, with its motion observed where the plan wanted it.
        distance: Of the embedded latents since the step before.

    Returns:
        The plan, and the state after the step.
    """
    shape, step = state.shape, state.step
    coming = replace(state, step=step + 1)
    wants_motion = step + 1 >= config.coarse_end
    if _is_last(config, state):
        if magi_switches(config.compat).force_last_step or step < config.coarse_end:
            return Plan.full(shape.tokens, wants_motion), coming
        nothing = np.full(shape.tokens, np.nan, np.float32)  # was compared, token by token
        return Plan(state.recompute, accumulated=nothing, wants_motion=wants_motion), coming
    if step <= config.warmup_steps:
        return Plan.full(shape.tokens, wants_motion), coming
    if step < config.coarse_end:
        accumulated = state.chunk_accumulated + distance.chunk
        compute = accumulated >= config.chunk_threshold
        plan = Plan(np.full(shape.tokens, compute), distance.chunk, accumulated, wants_motion)
        left = 0.0 if compute else accumulated
        return plan, replace(coming, chunk_accumulated=left, recompute=plan.recompute)
    return _plan_tokens(config, state, distance)


def _is_last(config: MagiMotionCacheConfig, state: MagiMotionCacheState) -> bool:
    """Whether the rule leaves the coming step out: the last of the chunk, or of the run."""
    if magi_switches(config.compat).force_last_step:
        return state.step + 1 == state.shape.steps
    return state.first_row + state.step + 1 == len(state.shape.active)


def _plan_tokens(
    config: MagiMotionCacheConfig, state: MagiMotionCacheState, distance: InputDistance
) -> tuple[Plan, MagiMotionCacheState]:
    """Decide token by token."""
    moved = distance.tokens if config.token_distance else np.float32(distance.chunk)
    accumulated = state.accumulated + moved * state.weights
    reuse = _cap(config, state, accumulated, accumulated < np.float32(config.threshold))
    recompute = ~reuse
    if config.vote_frames is not None:
        framed = recompute.reshape(state.shape.frames, -1)
        framed = framed | (framed.sum(axis=0) > config.vote_frames)
        recompute = framed.reshape(-1)
    coming = replace(
        state,
        step=state.step + 1,
        chunk_accumulated=0.0,
        accumulated=np.where(reuse, accumulated, np.float32(0)),
        recompute=recompute,
    )
    return Plan(recompute, distance.chunk, accumulated, wants_motion=True), coming


def _cap(
    config: MagiMotionCacheConfig,
    state: MagiMotionCacheState,
    accumulated: NDArray[np.float32],
    reuse: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Leave at most a share of the tokens reused: those that have accumulated least."""
    start = config.coarse_end
    progress = (state.step - start) / max(len(state.shape.active) - start, 1)
    cap = config.first_reuse_cap + progress * (config.last_reuse_cap - config.first_reuse_cap)
    most = int(cap * len(reuse))
    if reuse.sum() <= most:
        return reuse
    if most == 0:
        return np.zeros_like(reuse)
    least = np.partition(accumulated[reuse], most - 1)[most - 1]
    kept: NDArray[np.bool_] = reuse & (accumulated <= least)
    return kept


def observe(
    config: MagiMotionCacheConfig, state: MagiMotionCacheState, motion: NDArray[np.float32]
) -> MagiMotionCacheState:
    """Take new weights from the motion that a step leaves.

    Args:
        config: Settings.
        state: After `plan_step`.
        motion: Change from frame to frame, shape (F, P).

    Returns:
        The state with the weights of the coming step.
    """
    weights = motion_weights(motion, config.weight_floor, config.weight_power)
    if state.first_frame:
        weights[0] = 1
    return replace(state, weights=weights.reshape(-1))


def motion_weights(motion: NDArray[np.float32], floor: float, power: float) -> NDArray[np.float32]:
    """Spread the motion of each frame over the range from floor to 1.

    Args:
        motion: Shape (F, P), 0 or above.
        floor: Weight of the position that moves least.
        power: Exponent of the normalised motion.

    Returns:
        Shape (F, P); 1 everywhere in a frame that moves evenly.

    Example:
        >>> motion = np.array([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]], np.float32)
        >>> motion_weights(motion, 0.5, 2).tolist()
        [[0.5, 0.625, 1.0], [1.0, 1.0, 1.0]]
    """
    low, high = motion.min(axis=1, keepdims=True), motion.max(axis=1, keepdims=True)
    even = high == low
    relative = (motion - low) / np.where(even, np.float32(1), high - low)
    weights = np.float32(floor) + np.float32(1 - floor) * relative ** np.float32(power)
    return np.where(even, np.float32(1), weights).astype(np.float32)


def build(config: MagiMotionCacheConfig) -> Policy:
    """Bind a configuration.

    Args:
        config: Settings.

    Returns:
        The policy.
    """
    chosen = magi_switches(config.compat)
    return Policy(
        "motioncache",
        partial(init_state, config),
        partial(plan_step, config),
        partial(observe, config),
        weights=lambda state: state.weights if state.step >= config.coarse_end else None,
        check=partial(check_warmup, config.warmup_steps),
        clean_pass=chosen.clean_pass,
        motion="latents",
        config=config,
        switches=chosen,
    )
