"""FlowCache's reuse rule on SkyReels-V2: all or nothing, chunk by chunk.

With steps s from 0, the distance d_s of `distance.DistanceTable` and the polynomial p, a chunk of
a branch is computed in full in its warm-up, s <= W, and in its last step. Else

    A <- A + p(d_s);   compute and set A to 0 if A >= threshold, reuse the residual if not.

Differences from the published code: W counts as in MotionCache (published ret_steps is W + 1), and
`compat="fixed"` sets two of the switches, `clamp_distance` and `clean_pass`; the last step is
computed in either case. The compression of keys is not part of the rule.

Source: FlowCache (mikeallen39/FlowCache 1fdfa57, skyreels_v2_infer/modules/
transformer_flowcache.py).
"""

__all__ = ["FlowCacheConfig", "FlowCacheState", "build", "init_state", "plan_step"]

from dataclasses import dataclass
from functools import partial

import numpy as np

from motioncache.config import (
    Compat,
    Switches,
    check_number,
    check_rescaling,
    check_warmup,
    switches,
)
from motioncache.distance import rescale
from motioncache.policy import Plan, Policy, RunShape, Scope


@dataclass(frozen=True, kw_only=True)
class FlowCacheConfig:
    """Settings of FlowCache.

    Attributes:
        threshold: Accumulated rescaled distance at which a chunk is computed again.
        coefficients: Of the polynomial p, highest power first.
        warmup_steps: W; steps 0 to W are computed in full.
        compat: `fixed`, `reference`, or single switches.
    """

    threshold: float
    coefficients: tuple[float, ...]
    warmup_steps: int = 4
    compat: Compat | Switches = "fixed"

    def __post_init__(self) -> None:
        check_rescaling(self.threshold, self.coefficients)
        check_number("warmup_steps", self.warmup_steps, whole=True)
        switches(self.compat)


@dataclass(frozen=True)
class FlowCacheState:
    """Of one chunk in one branch.

    Attributes:
        shape: Of the run.
        step: The coming step, from 0.
        accumulated: A.
    """

    shape: RunShape
    step: int = 0
    accumulated: float = 0.0


def init_state(config: FlowCacheConfig, shape: RunShape, scope: Scope) -> FlowCacheState:
    """Return the state before the first step of a chunk."""
    return FlowCacheState(shape)


def plan_step(
    config: FlowCacheConfig, state: FlowCacheState, distance: float
) -> tuple[Plan, FlowCacheState]:
    """Decide on a step of a chunk.

    Args:
        config: Settings.
        state: From the step before.
        distance: Relative change of the modulation since the step before.

    Returns:
        The plan, all or nothing, and the state after the step.
    """
    shape, coming = state.shape, state.step + 1
    forced = state.step <= config.warmup_steps or coming == shape.steps
    if forced:
        return Plan(np.ones(shape.tokens, np.bool_)), FlowCacheState(shape, coming)
    rescaled = rescale(config.coefficients, distance, switches(config.compat).clamp_distance)
    accumulated = state.accumulated + rescaled
    compute = accumulated >= config.threshold
    plan = Plan(np.full(shape.tokens, compute), rescaled, accumulated)
    return plan, FlowCacheState(shape, coming, 0.0 if compute else accumulated)


def build(config: FlowCacheConfig) -> Policy:
    """Bind a configuration.

    Args:
        config: Settings.

    Returns:
        The policy.
    """
    return Policy(
        "flowcache",
        partial(init_state, config),
        partial(plan_step, config),
        check=partial(check_warmup, config.warmup_steps),
        clean_pass=switches(config.compat).clean_pass,
        config=config,
    )
