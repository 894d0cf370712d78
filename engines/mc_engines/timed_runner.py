"""Counting the time spent in engines, apart from everything around them.

Neighbours: the loop wraps its runners once per window and reads the clock before and after a step.
"""

__all__ = ["Clock", "TimedRunner"]

import time
from dataclasses import dataclass

from mc_engines.runner import Array, Arrays, Runner
from mc_engines.specs import GraphSpec


@dataclass
class Clock:
    """Adds up what its runners take; belongs to one thread.

    Attributes:
        seconds: In engines so far.
    """

    seconds: float = 0.0


@dataclass(frozen=True)
class TimedRunner:
    """A runner whose calls are added to a clock.

    Attributes:
        runner: What runs.
        clock: What its time is added to.
    """

    runner: Runner
    clock: Clock

    @property
    def graph(self) -> GraphSpec:
        """The tensors the runner takes and gives."""
        return self.runner.graph

    def run(self, inputs: Arrays, weights: Arrays | None = None) -> dict[str, Array]:
        """Compute the outputs of the graph; see `Runner.run`."""
        start = time.perf_counter()
        try:
            return self.runner.run(inputs, weights)
        finally:
            self.clock.seconds += time.perf_counter() - start
