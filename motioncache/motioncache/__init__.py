"""Cache policies for autoregressive video diffusion: pure functions over explicit state."""

__all__ = ["POLICIES", "Plan", "Policy", "none"]

from motioncache.policy import POLICIES, Plan, Policy, none
