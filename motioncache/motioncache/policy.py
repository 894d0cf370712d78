"""What a cache policy is: pure functions that decide which tokens are recomputed.

A policy keeps one state per branch and chunk. A new window starts with a new state; nothing is
ever cleared. Neighbour: the loop in `mc_runtime.denoise` asks `plan_step` before every step of a
chunk and computes what the plan says.
"""

__all__ = ["POLICIES", "Plan", "Policy", "none"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Plan:
    """What to do in one step of one chunk.

    Attributes:
        recompute: True where the blocks run for the token; False where its residual is reused.
            Shape (L,), bool.
    """

    recompute: NDArray[np.bool_]


class Policy(NamedTuple):
    """A pair of pure functions over explicit state.

    Attributes:
        name: As the command line knows it.
        init_state: From the number L of a chunk's tokens to the state before its first step.
        plan_step: From a state to the plan of the coming step and the state after it. The plan of
            a chunk's first step recomputes every token: there is no residual yet.
    """

    name: str
    init_state: Callable[[int], Any]
    plan_step: Callable[[Any], tuple[Plan, Any]]


def none() -> Policy:
    """Recompute every token in every step: the baseline of every measurement.

    Returns:
        The policy; its state is the number of tokens.

    Example:
        >>> policy = none()
        >>> plan, state = policy.plan_step(policy.init_state(4))
        >>> plan.recompute.tolist()
        [True, True, True, True]
    """
    return Policy("none", int, lambda tokens: (Plan(np.ones(tokens, np.bool_)), tokens))


POLICIES: dict[str, Callable[[], Policy]] = {"none": none}
