"""Cache policies for autoregressive video diffusion: pure functions over explicit state."""

__all__ = [
    "DecisionTrace",
    "DistanceTable",
    "InputDistance",
    "Mode",
    "Plan",
    "Policy",
    "Preset",
    "RunShape",
    "Scope",
    "choose_policy",
    "make_policy",
    "none",
    "replay",
]

from motioncache.distance import DistanceTable, InputDistance
from motioncache.policy import Plan, Policy, RunShape, Scope, none
from motioncache.presets import Preset, choose_policy, make_policy
from motioncache.replay import replay
from motioncache.trace import DecisionTrace, Mode
