"""What the configurations of the policies share: checks, and where published code is mended.

One frozen dataclass per policy, in its module. Its defaults live there alone, the command line
reads `FIELD=VALUE` by its fields (`options`).
"""

__all__ = [
    "FIXED",
    "MAGI_FIXED",
    "MAGI_REFERENCE",
    "REFERENCE",
    "Compat",
    "MagiSwitches",
    "Switches",
    "ThresholdConfig",
    "check_number",
    "check_warmup",
    "magi_switches",
    "switches",
]

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from motioncache.distance import rescale
from motioncache.policy import Plan, RunShape

Compat = Literal["fixed", "reference"]
_Set = TypeVar("_Set")  # of switches


@dataclass(frozen=True)
class Switches:
    """Where `compat="fixed"` departs from the published code for SkyReels-V2, one by one.

    Attributes:
        reset_history: A new window forgets the last frames that motion is measured from. As
            published, the chunk behind the prefix is compared with a frame of the window before.
        clamp_distance: A negative rescaled distance counts as 0. As published it is subtracted
            from what has accumulated.
        force_last_step: A chunk's last step is computed in full. As published it may be reused.
        clean_pass: A finished chunk is evaluated once more at timestep 0, and later chunks see
            these keys. As published they see those of its last computed step.
        latent_motion: Motion is that of the clean latents that a step predicts. As published it
            is that of the block output, in which noise drowns it.
    """

    reset_history: bool
    clamp_distance: bool
    force_last_step: bool
    clean_pass: bool
    latent_motion: bool


@dataclass(frozen=True)
class MagiSwitches:
    """Where `compat="fixed"` departs from the published code for MAGI-1, one by one.

    Attributes:
        own_keys: A pass over some tokens of a chunk sees the keys of that chunk's own range. As
            published it sees those of the oldest active chunk's range, where its own are missing.
        reuse_velocity: A reused token moves by its last velocity times the coming step. As
            published it moves by its last increment, whatever the steps' lengths, which grow.
        force_last_step: A chunk's last step, the longest, is computed in full. As published it may
            be reused.
        clean_pass: A finished chunk is evaluated once more as nearly clean, without the prompt, and
            later chunks see these keys. As published they see those of its last computed step.
        nearly_clean: Distilled models mix in what the oldest active chunk makes of itself alone,
            as they do without a cache. As published that guidance is dropped.
        mix_own_chunk: It is mixed into that chunk, at the tokens that are computed. As published,
            where it is not dropped, it goes into the oldest chunk that is computed, whose reused
            tokens then count as computed with a velocity of 0.
    """

    own_keys: bool
    reuse_velocity: bool
    force_last_step: bool
    clean_pass: bool
    nearly_clean: bool
    mix_own_chunk: bool


FIXED = Switches(True, True, True, True, True)
REFERENCE = Switches(False, False, False, False, False)
MAGI_FIXED = MagiSwitches(True, True, True, True, True, True)
MAGI_REFERENCE = MagiSwitches(False, False, False, False, False, False)


def switches(compat: Compat | Switches) -> Switches:
    """Return the switches that a name stands for; a set of switches stands for itself.

    Raises:
        ValueError: There is no such name.
    """
    return compat if isinstance(compat, Switches) else _find(compat, FIXED, REFERENCE)


def magi_switches(compat: Compat | MagiSwitches) -> MagiSwitches:
    """Do as `switches` does, for MAGI-1."""
    if isinstance(compat, MagiSwitches):
        return compat
    return _find(compat, MAGI_FIXED, MAGI_REFERENCE)


def _find(compat: Any, fixed: _Set, reference: _Set) -> _Set:
    by_name = {"fixed": fixed, "reference": reference}
    if compat not in by_name:
        raise ValueError(
            f"compat: expected fixed or reference, got {compat!r}. "
            "fixed mends what reference keeps as published."
        )
    return by_name[compat]


def check_number(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, whole: bool = False
) -> None:
    """Refuse a number that is not finite, out of bounds, or not whole where it must be.

    Raises:
        ValueError: With the bounds.
    """
    if _is_finite(value) and low <= value <= high and (isinstance(value, int) or not whole):
        return
    wanted = "a whole number" if whole else "a finite number"
    bounds = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
    raise ValueError(f"{name}: expected {wanted}, got {value!r}. Use {bounds}.")


def _is_finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def check_warmup(warmup_steps: int, shape: RunShape) -> None:
    """Refuse a run within which the warm-up does not end.

    Raises:
        ValueError: With the largest warm-up that does.
    """
    if warmup_steps + 1 > shape.steps:
        raise ValueError(
            f"warmup_steps: expected at most {shape.steps - 1} with {shape.steps} steps, as "
            f"steps 0 to warmup_steps are computed in full, got {warmup_steps}. "
            "Lower it or raise num_inference_steps."
        )


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """What every policy that accumulates a distance is set by.

    Attributes:
        threshold: Accumulated rescaled distance at which it computes again.
        coefficients: Of the polynomial p that rescales a distance, highest power first.
        warmup_steps: W; steps 0 to W are computed in full.
        extrapolation: What a reused token goes by: its velocity, moved on by this share of the rate
            at which it last changed, for as many steps as it took to change; 0 keeps the velocity
            as it is. None keeps the residual of the blocks, as published.
    """

    threshold: float
    coefficients: tuple[float, ...]
    warmup_steps: int = 4
    extrapolation: float | None = None

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold)
        if not self.coefficients or not all(map(_is_finite, self.coefficients)):
            raise ValueError(
                "coefficients: expected finite numbers, highest power first, got "
                f"{', '.join(map(str, self.coefficients)) or 'none'}. "
                "Run mc-calibrate to fit them, or pass 1,0 for the distance itself."
            )
        check_number("warmup_steps", self.warmup_steps, whole=True)
        if self.extrapolation is not None:
            check_number("extrapolation", self.extrapolation)

    def check(self, shape: RunShape) -> None:
        """Refuse a run within which the warm-up does not end.

        Raises:
            ValueError: With the largest warm-up that does.
        """
        check_warmup(self.warmup_steps, shape)

    def accumulate(
        self, tokens: int, accumulated: float, distance: float, clamp: bool
    ) -> tuple[Plan, float]:
        """Add a distance up, all or nothing: compute and start anew at the threshold, else reuse.

        Args:
            tokens: L.
            accumulated: Up to the step before.
            distance: Relative change of the modulation.
            clamp: Whether a negative rescaled distance counts as 0.

        Returns:
            The plan, and what has accumulated after the step.
        """
        rescaled = rescale(self.coefficients, distance, clamp)
        accumulated += rescaled
        compute = accumulated >= self.threshold
        return Plan(
            np.full(tokens, compute), rescaled, accumulated
        ), 0.0 if compute else accumulated
