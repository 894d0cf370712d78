"""MotionCache's reuse rule on SkyReels-V2: moving tokens are recomputed, still ones wait.

One state per branch and chunk. With steps s from 0, the distance d_s of `distance.DistanceTable`,
the polynomial p and a motion weight w of every token, a chunk goes through

    warm-up         s <= W: computed in full; A = 0, w = 1
    coarse phase    w stays 1, so the rule below is all or nothing; ends with the K-th step that
                    recomputes anything (with the warm-up where K = 0)
    fine phase      w = the motion weights of the step before, renewed by every step, reused or not

and each step after the warm-up follows one rule:

    A <- A + p(d_s) * w
    a token needs an update if A >= threshold
    vote      at each position: all F frames are updated if more than a share v of them need it,
              else none of them is
    hold      if fewer than a share m of the chunk's tokens are to be updated, none is, and every A
              is kept
    A <- 0 where updated

The weights come from motion between latent frames, of the clean latents m = x - sigma*v that a step
predicts for sample x with the guided velocity v, c running over the latents of a token:

    motion[f, p]  = mean_c |m[f] - m[f-1]|
    w[f, p]       = floor + (1 - floor) * (motion[f, p] - min_p) / (max_p - min_p + 1e-8)

or, as published, of the block output h of each branch, which carries the noise of every frame:

    motion[f, p]  = mean_c |h[f] - h[f-1]| / max(mean_c |h[f-1]|, 1e-8)

min and max over the positions of a frame. A chunk's first frame is compared with the last frame of
the chunk before (which is `ar_step` steps ahead, so less noisy); without one it takes the motion
of the second frame. (The published code adds 1e-8 to the mean, and gives a first frame without a
chunk before it ones, unless it is the window's first.)

Where paper and published code differ, the rule is the code's: A >= threshold (paper: >), the vote
and the hold (paper: not mentioned), motion of the block output (paper: of the latents), the
residual of the block stack (paper: of the latent). In the code K counts steps with an update, not
steps. `compat="fixed"` sets the five switches of `config.Switches`.

Source: MotionCache (ywlq/MotionCache a8d2a47, MotionCache4SkyReels-V2, modules/
transformer_motion.py); equations 9 to 13 of the paper.
"""

__all__ = [
    "MotionCacheConfig",
    "MotionCacheState",
    "build",
    "init_state",
    "motion_weights",
    "observe",
    "plan_step",
    "vote",
]

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from motioncache.config import Compat, Switches, ThresholdConfig, check_number, switches
from motioncache.distance import EPSILON, rescale
from motioncache.policy import Plan, Policy, RunShape, Scope


@dataclass(frozen=True, kw_only=True)
class MotionCacheConfig(ThresholdConfig):
    """Settings of MotionCache, besides those of every policy with a threshold.

    Attributes:
        coarse_updates: K; updates before the motion weights count.
        weight_floor: Weight of the token that moves least, 0 to 1. At 1 nothing is weighted.
        vote_threshold: v, 0 to below 1; None switches voting off.
        min_update_ratio: m, 0 to 1.
        compat: `fixed`, `reference`, or single switches.
    """

    coarse_updates: int = 6
    weight_floor: float = 0.6
    vote_threshold: float | None = 0.5
    min_update_ratio: float = 0.4
    compat: Compat | Switches = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("coarse_updates", self.coarse_updates, whole=True)
        check_number("weight_floor", self.weight_floor, high=1)
        if self.vote_threshold is not None:
            check_number("vote_threshold", self.vote_threshold, high=1)
            if self.vote_threshold == 1:
                raise ValueError(
                    "vote_threshold: expected a share below 1, which no vote can exceed, got 1. "
                    "Use none to switch voting off."
                )
        check_number("min_update_ratio", self.min_update_ratio, high=1)
        if self.extrapolation is not None and not switches(self.compat).latent_motion:
            raise ValueError(
                "extrapolation: expected none where motion is that of the block output, which "
                f"reused tokens then do not have, got {self.extrapolation:g}. Use compat=fixed."
            )
        switches(self.compat)


@dataclass(frozen=True)
class MotionCacheState:
    """Of one chunk in one branch.

    Attributes:
        shape: Of the run.
        step: The coming step, from 0.
        accumulated: A, shape (L,).
        updates: Steps after the warm-up that recomputed anything, in the coarse phase.
        fine: Whether the coarse phase is over.
        weights: w, shape (L,); ones until the coarse phase is over.
    """

    shape: RunShape
    step: int
    accumulated: NDArray[np.float32]
    updates: int
    fine: bool
    weights: NDArray[np.float32]


def init_state(config: MotionCacheConfig, shape: RunShape, scope: Scope) -> MotionCacheState:
    """Return the state before the first step of a chunk."""
    zeros, ones = np.zeros(shape.tokens, np.float32), np.ones(shape.tokens, np.float32)
    return MotionCacheState(shape, 0, zeros, 0, False, ones)


def plan_step(
    config: MotionCacheConfig, state: MotionCacheState, distance: float
) -> tuple[Plan, MotionCacheState]:
    """Decide which tokens of a chunk are recomputed in a step.

    Args:
        config: Settings.
        state: From the step before, with its motion observed where the plan wanted it.
        distance: Relative change of the modulation since the step before.

    Returns:
        The plan, and the state after the step.
    """
    chosen = switches(config.compat)
    coming = replace(state, step=state.step + 1)
    last = chosen.force_last_step and coming.step == state.shape.steps
    if state.step <= config.warmup_steps or last:
        fine = state.fine or (state.step == config.warmup_steps and config.coarse_updates == 0)
        return Plan.full(state.shape.tokens, fine), replace(coming, fine=fine)
    rescaled = rescale(config.coefficients, distance, chosen.clamp_distance)
    accumulated = state.accumulated + np.float32(rescaled) * state.weights
    recompute = _choose_tokens(config, state.shape.frames, accumulated)
    updates = state.updates + bool(recompute.any())
    fine = state.fine or (updates > state.updates and updates >= config.coarse_updates)
    coming = replace(
        coming,
        accumulated=np.where(recompute, np.float32(0), accumulated),
        updates=updates,
        fine=fine,
    )
    return Plan(recompute, rescaled, accumulated, wants_motion=fine), coming


def _choose_tokens(
    config: MotionCacheConfig, frames: int, accumulated: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Threshold, vote, hold."""
    recompute = accumulated >= np.float32(config.threshold)
    if config.vote_threshold is not None:
        recompute = vote(recompute, frames, config.vote_threshold)
    if recompute.mean() < config.min_update_ratio:
        return np.zeros_like(recompute)
    return recompute


def vote(recompute: NDArray[np.bool_], frames: int, threshold: float) -> NDArray[np.bool_]:
    """Let the frames of a chunk decide together, position by position.

    Args:
        recompute: Shape (L,), bool.
        frames: F.
        threshold: Share of the frames that has to be exceeded.

    Returns:
        The verdict of each position for all its frames, shape (L,), bool.

    Example:
        >>> vote(np.array([True, False, True, False, False, False]), 3, 0.5).tolist()
        [True, False, True, False, True, False]
    """
    shares = recompute.reshape(frames, -1).mean(axis=0)
    return np.tile(shares > threshold, frames)


def observe(
    config: MotionCacheConfig, state: MotionCacheState, motion: NDArray[np.float32]
) -> MotionCacheState:
    """Take new weights from the motion that a step shows.

    Args:
        config: Settings.
        state: After `plan_step`.
        motion: Change from frame to frame, shape (F, P).

    Returns:
        The state with the weights of the coming step.
    """
    return replace(state, weights=motion_weights(motion, config.weight_floor).reshape(-1))


def motion_weights(motion: NDArray[np.float32], floor: float) -> NDArray[np.float32]:
    """Spread the motion of each frame over the range from floor to 1.

    Args:
        motion: Shape (F, P), 0 or above.
        floor: Weight of the position that moves least.

    Returns:
        Shape (F, P); the floor everywhere in a frame that moves evenly.

    Example:
        >>> motion_weights(np.array([[0.0, 1.0, 2.0]], np.float32), 0.5).tolist()
        [[0.5, 0.75, 1.0]]
    """
    low, high = motion.min(axis=1, keepdims=True), motion.max(axis=1, keepdims=True)
    relative: NDArray[np.float32] = (motion - low) / (high - low + np.float32(EPSILON))
    return np.float32(floor) + np.float32(1 - floor) * relative


def build(config: MotionCacheConfig) -> Policy:
    """Bind a configuration.

    Args:
        config: Settings.

    Returns:
        The policy.
    """
    chosen = switches(config.compat)
    return Policy(
        "motioncache",
        partial(init_state, config),
        partial(plan_step, config),
        partial(observe, config),
        weights=lambda state: state.weights if state.fine else None,
        check=config.check,
        clean_pass=chosen.clean_pass,
        reset_history=chosen.reset_history,
        motion="latents" if chosen.latent_motion else "output",
        extrapolation=config.extrapolation,
        config=config,
    )
