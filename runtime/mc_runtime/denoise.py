"""The loop: chunks of a window move from noise to latents, each as soon as its turn comes.

Neighbours: `step_matrix` says which chunk takes which step in a row; what a step is, the family
says (`mc_runtime.families`): it asks the policy which tokens are recomputed, `Passes` to compute
them, and its sampler to move the latents. `generate_chunks` feeds windows in and decodes what comes
out.

A chunk sees its own keys and those of the chunks before it. When it is finished, one clean pass
writes its keys for good. A prefix gets that pass first.
"""

__all__ = ["FinishedChunk", "Steps", "Window", "denoise_window"]

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mc_engines.errors import EngineError
from mc_engines.runner import Arrays
from mc_engines.timed_runner import Clock
from mc_runtime.passes import Passes, Values
from mc_runtime.schedule import StepMatrix
from motioncache import DecisionTrace, Mode, RunShape

Latents = NDArray[np.float32]


@dataclass(frozen=True)
class FinishedChunk:
    """A chunk of a window that has taken its last step.

    Attributes:
        chunk: Its position in the window.
        latents: shape (c, F, h, w).
        computed: Passes by kind since the chunk before, clean ones of earlier chunks among them,
            and tokens that the blocks computed.
    """

    chunk: int
    latents: Latents
    computed: Mapping[str, int]


@dataclass
class Window:
    """The state of one window that all families share; belongs to one generation.

    Attributes:
        latents: Prefix and noise at first, shape (c, frames, h, w); changed step by step.
        prefix: Latent frames at its start that are given.
        matrix: Which chunk takes which step in which row.
        shape: Of the run.
        token_grid: Tokens of a latent frame along height and width.
        trace: Of the run; every pass and decision is written into it.
        number: Of the window in the run.
        first_chunk: Number in the video of the window's first chunk, for messages.
        clock: Time in engines.
        row: Of the run, that is being computed.
        frozen: Chunks whose keys are final.
    """

    latents: Latents
    prefix: int
    matrix: StepMatrix
    shape: RunShape
    token_grid: tuple[int, int]
    trace: DecisionTrace
    number: int
    first_chunk: int
    clock: Clock = field(default_factory=Clock)
    row: int = field(init=False)
    frozen: int = 0

    def __post_init__(self) -> None:
        self.row = self.shape.window_start[self.number]

    @property
    def chunks(self) -> int:
        """Chunks of the window."""
        return int(self.matrix.update.shape[1])

    def frames_of(self, chunk: int) -> slice:
        """The latent frames of a chunk."""
        size = self.shape.frames
        return slice(chunk * size, (chunk + 1) * size)

    def is_given(self, chunk: int) -> bool:
        """Whether a chunk is of the prefix."""
        return (chunk + 1) * self.shape.frames <= self.prefix

    @contextmanager
    def timed(self, branch: int, chunk: int) -> Generator[None]:
        """Add what passes to the trace of a chunk, in engines and elsewhere."""
        at = self.row, branch, chunk
        start, engines = time.perf_counter(), self.clock.seconds
        try:
            yield
        finally:
            spent = self.clock.seconds - engines
            self.trace.engine_ms[at] += 1e3 * spent
            self.trace.host_ms[at] += 1e3 * (time.perf_counter() - start - spent)

    def write_pass(self, branch: int, chunk: int, mode: Mode, tokens: int) -> None:
        """Write down which pass is made, and how many tokens go through the blocks."""
        self.trace.mode[self.row, branch, chunk] = mode
        self.trace.bucket[self.row, branch, chunk] = tokens

    def refuse_nan(
        self, passes: Passes, x: Values, out: Values, read: Arrays, chunk: int, step: int
    ) -> None:
        """Stop where a pass computed NaN or infinity, and say which component did first.

        Args:
            passes: Of the family.
            x: The embedded chunk.
            out: Block output.
            read: What was made of it, by component; on the host, so that looking costs little.
            chunk: Of the window.
            step: From 0.

        Raises:
            EngineError: With the component.
        """
        if all(np.isfinite(value).all() for value in read.values()):
            return
        values = {"embed": passes.to_host(x), "block": passes.to_host(out), **read}
        component = next(name for name, value in values.items() if not np.isfinite(value).all())
        raise EngineError(
            f"{component}: expected finite values, got NaN or infinity in chunk "
            f"{self.first_chunk + chunk}, step {step + 1}. Check the bundle with mc-inspect "
            "--verify, and the latents."
        )


class Steps(Protocol):
    """What a family's model does in a window; remembers keys, residuals, the policy's states."""

    def freeze(self, chunk: int) -> None:
        """Write the keys of a chunk of the prefix, or of a finished one, for good."""
        ...

    def take_step(self, chunk: int, active: Mapping[int, int]) -> None:
        """Move the latents of a chunk by one step.

        Args:
            chunk: Of the window.
            active: The step of every chunk that is active in this row, from 0.
        """
        ...


def denoise_window(
    window: Window, steps: Steps, after_row: Callable[[int], None] = lambda row: None
) -> Iterator[FinishedChunk]:
    """Denoise the chunks of a window that are not its prefix.

    Args:
        window: Its latents are changed in place.
        steps: Of the window.
        after_row: Called with the number of every row that is done.

    Yields:
        Each chunk right after its last step, in the order of time.

    Raises:
        EngineError: An engine failed, or computed NaN; the message names component, chunk, step.
    """
    count, counted = window.shape.steps, window.row
    for row, (step, update) in enumerate(
        zip(window.matrix.step, window.matrix.update, strict=True)
    ):
        while step[window.frozen] > count:
            steps.freeze(window.frozen)
            window.frozen += 1
        active = {chunk: int(step[chunk]) - 1 for chunk in _numbers(update)}
        for chunk in active:
            steps.take_step(chunk, active)
        window.row += 1
        after_row(row)
        for chunk in _numbers(update & (step == count)):
            latents = window.latents[:, window.frames_of(chunk)].copy()
            yield FinishedChunk(chunk, latents, window.trace.count(slice(counted, window.row)))
            counted = window.row


def _numbers(chosen: NDArray[np.bool_]) -> list[int]:
    return [int(number) for number in np.flatnonzero(chosen)]
