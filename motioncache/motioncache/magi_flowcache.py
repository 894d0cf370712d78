"""FlowCache's reuse rule on MAGI-1: all or nothing, chunk by chunk.

With steps s from 0 and the relative change d_s of a chunk's embedded latents since the step before
(`distance.InputDistance`), a chunk is computed in full in its warm-up, s <= W. Else

    A <- A + d_s;   reused if A < threshold, else computed and A <- 0.

That is MotionCache's coarse phase, which here never ends; so is everything that `magi_motion` says
of the switches. The compression of keys is not part of the rule.

Source: FlowCache (mikeallen39/FlowCache 1fdfa57, inference/pipeline/flowcache.py).
"""

__all__ = ["MagiFlowCacheConfig", "build"]

from dataclasses import dataclass, replace

from motioncache import magi_motion
from motioncache.config import Compat, MagiSwitches, check_number, magi_switches
from motioncache.policy import Policy

_NEVER = 10**9  # steps; longer than any run


@dataclass(frozen=True, kw_only=True)
class MagiFlowCacheConfig:
    """Settings of FlowCache on MAGI-1.

    Attributes:
        threshold: Accumulated distance at which a chunk is computed again.
        warmup_steps: W; steps 0 to W are computed in full.
        compat: `fixed`, `reference`, or single switches.
    """

    threshold: float
    warmup_steps: int = 4
    compat: Compat | MagiSwitches = "fixed"

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        check_number("warmup_steps", self.warmup_steps, whole=True)
        magi_switches(self.compat)


def build(config: MagiFlowCacheConfig) -> Policy:
    """Bind a configuration.

    Args:
        config: Settings.

    Returns:
        The policy.
    """
    coarse = magi_motion.MagiMotionCacheConfig(
        threshold=0.0,
        chunk_threshold=config.threshold,
        warmup_steps=config.warmup_steps,
        coarse_steps=_NEVER,
        compat=config.compat,
    )
    return replace(magi_motion.build(coarse), name="flowcache", config=config)
