"""Kinds and bounds of the settings of a generation, of every family alike.

Neighbours: `schedule.validate_options` and the plan of MAGI-1 begin with it; what settings have to
do with each other they check themselves.
"""

__all__ = ["check_values"]

import math
from numbers import Real
from typing import Any, get_args

import numpy as np

from mc_runtime.options import FirstSample, SigmaTable
from mc_runtime.sampler import TRAIN_TIMESTEPS

_WHOLE_NUMBERS: dict[str, tuple[int, int | None]] = {
    "num_frames": (1, None),
    "height": (1, None),
    "width": (1, None),
    "num_inference_steps": (1, TRAIN_TIMESTEPS),
    "fps": (1, None),
    "seed": (0, None),
    "ar_step": (0, None),
    "causal_block_size": (1, None),
    "base_num_frames": (1, None),
    "overlap_history": (1, None),
    "addnoise_condition": (0, TRAIN_TIMESTEPS - 1),
}
_POSITIVE_NUMBERS = ("guidance_scale", "flow_shift")
_CHOICES = {
    "sigma_table": get_args(SigmaTable),
    "first_sample": get_args(FirstSample),
    "nearly_clean": (True, False),
}


def check_values(options: Any) -> None:
    """Check the kind and the bounds of every number, and every choice.

    Args:
        options: Of a family; settings that it does not have are left out.

    Raises:
        ValueError: With the bounds or the choices.
    """
    for name, (low, high) in _WHOLE_NUMBERS.items():
        value = getattr(options, name, low)
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < low or (high is not None and value > high):
            bounds = f"{low} or more" if high is None else f"{low} to {high}"
            raise ValueError(f"{name}: expected a whole number, got {value!r}. Use {bounds}.")
    for name in _POSITIVE_NUMBERS:
        value = getattr(options, name, 1.0)
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name}: expected a finite number, got {value!r}. Use one above 0.")
    for name, choices in _CHOICES.items():
        value = getattr(options, name, choices[0])
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            listed = " or ".join(map(str, choices))
            raise ValueError(f"{name}: expected {listed}, got {value!r}. Use one of these.")
