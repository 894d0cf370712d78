"""TeaCache's reuse rule: all or nothing, all active chunks of a row together.

One state per branch and window. With rows r of a window from 0, the relative change d_r of the
modulation of all chunks that are active in it (`DistanceTable.of_row`) and the polynomial p, the
rows of the warm-up, r <= W, are computed in full. Else

    A <- A + p(d_r);   compute and set A to 0 if A >= threshold, reuse the residuals if not.

A chunk that takes its first step is computed in any case, and alone. Differences from the
published code for SkyReels-V2: it runs on chunk-causal passes with clean keys like every policy
here, not on bidirectional ones over the whole window; its call counter, which starts the warm-up
anew every 35 rows (it counts two branches against the steps of one), is not reproduced; a negative
p(d) counts as 0. The distance is always that of e0, so only polynomials fitted on e0 apply
(published as "ret steps"). The rule has no forced last step.

Source: TeaCache (arXiv 2411.19108); SkyReels-V2 abed76f, modules/transformer.py.
"""

__all__ = ["TeaCacheConfig", "TeaCacheState", "build", "init_state", "plan_step"]

from dataclasses import dataclass
from functools import partial

from motioncache.config import ThresholdConfig
from motioncache.policy import Plan, Policy, RunShape, Scope


@dataclass(frozen=True, kw_only=True)
class TeaCacheConfig(ThresholdConfig):
    """Settings of TeaCache, those of every policy with a threshold; W counts rows of a window."""


@dataclass(frozen=True)
class TeaCacheState:
    """Of one window in one branch.

    Attributes:
        tokens: L.
        row: The coming row, from 0.
        accumulated: A.
    """

    tokens: int
    row: int = 0
    accumulated: float = 0.0


def init_state(config: TeaCacheConfig, shape: RunShape, scope: Scope) -> TeaCacheState:
    """Return the state before the first row of a window."""
    return TeaCacheState(shape.tokens)


def plan_step(
    config: TeaCacheConfig, state: TeaCacheState, distance: float
) -> tuple[Plan, TeaCacheState]:
    """Decide on a row, for every chunk that is active in it.

    Args:
        config: Settings.
        state: From the row before.
        distance: Relative change of the modulation of the active chunks since the row before.

    Returns:
        The plan of each chunk, all or nothing, and the state after the row.
    """
    tokens, coming = state.tokens, state.row + 1
    if state.row <= config.warmup_steps:
        return Plan.full(tokens), TeaCacheState(tokens, coming)
    plan, accumulated = config.accumulate(tokens, state.accumulated, distance, clamp=True)
    return plan, TeaCacheState(tokens, coming, accumulated)


def build(config: TeaCacheConfig) -> Policy:
    """Bind a configuration.

    Args:
        config: Settings.

    Returns:
        The policy.
    """
    return Policy(
        "teacache",
        partial(init_state, config),
        partial(plan_step, config),
        check=config.check,
        scope="window",
        extrapolation=config.extrapolation,
        config=config,
    )
