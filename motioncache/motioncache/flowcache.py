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

from motioncache.config import Compat, Switches, ThresholdConfig, switches
from motioncache.policy import Plan, Policy, RunShape, Scope


@dataclass(frozen=True, kw_only=True)
class FlowCacheConfig(ThresholdConfig):
    """Settings of FlowCache, besides those of every policy with a threshold.

    Attributes:
        compat: `fixed`, `reference`, or single switches.
    """

    compat: Compat | Switches = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
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
    if state.step <= config.warmup_steps or coming == shape.steps:
        return Plan.full(shape.tokens), FlowCacheState(shape, coming)
    clamp = switches(config.compat).clamp_distance
    plan, accumulated = config.accumulate(shape.tokens, state.accumulated, distance, clamp)
    return plan, FlowCacheState(shape, coming, accumulated)


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
        check=config.check,
        clean_pass=switches(config.compat).clean_pass,
        extrapolation=config.extrapolation,
        config=config,
    )
