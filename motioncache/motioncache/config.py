"""What the configurations of the policies share: checks, and where published code is mended.

One frozen dataclass per policy, in its module. Its defaults live there alone, the command line
reads `FIELD=VALUE` by its fields (`options`).
"""

__all__ = [
    "FIXED",
    "REFERENCE",
    "Compat",
    "Switches",
    "check_number",
    "check_rescaling",
    "check_warmup",
    "switches",
]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from motioncache.policy import RunShape

Compat = Literal["fixed", "reference"]


@dataclass(frozen=True)
class Switches:
    """Where `compat="fixed"` departs from the published code, one by one.

    Attributes:
        reset_history: A new window forgets the last frames that motion is measured from. As
            published, the chunk behind the prefix is compared with a frame of the window before.
        clamp_distance: A negative rescaled distance counts as 0. As published it is subtracted
            from what has accumulated.
        force_last_step: A chunk's last step is computed in full. As published it may be reused.
        clean_pass: A finished chunk is evaluated once more at timestep 0, and later chunks see
            these keys. As published they see those of its last computed step.
    """

    reset_history: bool
    clamp_distance: bool
    force_last_step: bool
    clean_pass: bool


FIXED = Switches(True, True, True, True)
REFERENCE = Switches(False, False, False, False)
_BY_NAME = {"fixed": FIXED, "reference": REFERENCE}


def switches(compat: Compat | Switches) -> Switches:
    """Return the switches that a name stands for; a set of switches stands for itself.

    Raises:
        ValueError: There is no such name.
    """
    if isinstance(compat, Switches):
        return compat
    if compat not in _BY_NAME:
        raise ValueError(
            f"compat: expected fixed or reference, got {compat!r}. "
            "fixed mends what reference keeps as published."
        )
    return _BY_NAME[compat]


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


def check_rescaling(threshold: Any, coefficients: Sequence[Any]) -> None:
    """Refuse a threshold or a polynomial that no distance can be compared with.

    Raises:
        ValueError: With what is expected.
    """
    check_number("threshold", threshold)
    if not coefficients or not all(map(_is_finite, coefficients)):
        raise ValueError(
            "coefficients: expected finite numbers, highest power first, got "
            f"{', '.join(map(str, coefficients)) or 'none'}. "
            "Run mc-calibrate to fit them, or pass 1,0 for the distance itself."
        )


def check_warmup(warmup_steps: int, shape: RunShape) -> None:
    """Refuse a warm-up that does not end within a run.

    Raises:
        ValueError: With the largest that does.
    """
    if warmup_steps + 1 > shape.steps:
        raise ValueError(
            f"warmup_steps: expected at most {shape.steps - 1} with {shape.steps} steps, as steps "
            f"0 to warmup_steps are computed in full, got {warmup_steps}. "
            "Lower it or raise num_inference_steps."
        )
