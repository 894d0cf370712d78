"""One generation: windows one after the other, chunks decoded as they are finished.

Neighbours: `VideoPipeline.generate` checks the inputs and calls `generate_chunks`; the family's
plan cuts the video, `denoise_window` denoises a window, a `Decoder` decodes. Windows hand over
latents, never pixels.
"""

__all__ = ["Generation", "Progress", "generate_chunks"]

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.errors import EngineError
from mc_runtime.denoise import Window, denoise_window
from mc_runtime.families.family import Family
from mc_runtime.inputs import Inputs
from mc_runtime.options import Chunk
from mc_runtime.passes import Passes
from mc_runtime.run_plan import RunPlan
from mc_runtime.schedule import Window as WindowPlan
from mc_runtime.vae import Decoder, VaeState, to_uint8
from motioncache import DecisionTrace, Policy

Latents = NDArray[np.float32]


@dataclass(frozen=True)
class Progress:
    """Where a generation is, after a row of its schedule.

    Attributes:
        row: Rows that are done, of all windows.
        rows: Rows in all.
        chunk: Chunks that are finished.
        chunks: Chunks in all.
        elapsed: Seconds since the start.
    """

    row: int
    rows: int
    chunk: int
    chunks: int
    elapsed: float


class _Output:
    """Makes `Chunk`s of latents: numbers, times and decodes them in the order of the video."""

    def __init__(self, count: int, decoder: Decoder | None) -> None:
        self.count = count
        self.done = 0
        self.start = time.perf_counter()
        self._last = self.start
        self._decoder = decoder
        self._state: VaeState | None = None

    def emit(self, latents: Latents, computed: Mapping[str, int]) -> Chunk:
        begin = time.perf_counter()
        frames = None
        if self._decoder is not None:
            pixels, self._state = self._decoder.decode(latents, self._state)
            if not np.isfinite(pixels).all():
                raise EngineError(
                    "vae_decoder: expected finite values, got NaN or infinity in chunk "
                    f"{self.done}. Check the bundle with mc-inspect --verify."
                )
            frames = to_uint8(pixels)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.done += 1
        index = self.done - 1
        return Chunk(index, self.count, latents, frames, seconds, now - begin, dict(computed))


@dataclass
class Generation(Iterator[Chunk]):
    """A generation on its way: yields its chunks.

    Attributes:
        trace: What the policy decided so far.
        chunks: Where they come from.
    """

    trace: DecisionTrace
    chunks: Iterator[Chunk]

    def __next__(self) -> Chunk:
        return next(self.chunks)


def generate_chunks(
    family: Family,
    inputs: Inputs,
    plan: RunPlan,
    passes: Passes,
    decoder: Decoder | None,
    policy: Policy,
    callback: Callable[[Progress], None],
) -> Generation:
    """Denoise every window of the video.

    Args:
        family: Of the model.
        inputs: Tensors and settings.
        plan: Of the run.
        passes: Of the transformer.
        decoder: Makes frames of latents; None leaves them out.
        policy: Decides which tokens are recomputed; has accepted the shape of the run.
        callback: Called after every row of the schedule.

    Returns:
        Each chunk as soon as it is clean, first those of a given prefix. Together they are the
        video. Its iterator raises EngineError where an engine fails or computes NaN.
    """
    described = _describe(inputs, plan, policy) | family.describe(
        inputs.config, inputs.options, plan, inputs.tokens
    )
    trace = DecisionTrace.empty(plan.shape, described)
    chunks = _generate(family, inputs, plan, passes, decoder, policy, callback, trace)
    return Generation(trace, chunks)


def _describe(inputs: Inputs, plan: RunPlan, policy: Policy) -> dict[str, Any]:
    """What a trace has to say of its run."""
    return {
        "policy": {
            "name": policy.name,
            "preset": policy.preset,
            "config": None if policy.config is None else asdict(policy.config),
        },
        "clean_pass": policy.clean_pass,
        "extrapolation": policy.extrapolation,
        "switches": None if policy.switches is None else asdict(policy.switches),
        "bundle": inputs.bundle,
        "grid": list(plan.token_grid),
        "steps": plan.shape.steps,
        "windows": [asdict(window) for window in plan.windows],
        "options": asdict(inputs.options),
    }


def _generate(
    family: Family,
    inputs: Inputs,
    plan: RunPlan,
    passes: Passes,
    decoder: Decoder | None,
    policy: Policy,
    callback: Callable[[Progress], None],
    trace: DecisionTrace,
) -> Iterator[Chunk]:
    size = plan.shape.frames
    output = _Output(sum(len(_new_frames(window, size)) for window in plan.windows), decoder)
    video = inputs.noise.copy()  # what is not denoised yet is noise
    given = plan.windows[0].prefix
    video[:, :given] = inputs.prefix[:, :given]
    for first in range(0, given - given % size, size):
        yield output.emit(video[:, first : first + size].copy(), {})
    run = family.start(inputs, plan, passes, policy)
    for number, cut in enumerate(plan.windows):
        window = Window(
            _initial_latents(inputs, video, cut),
            cut.prefix,
            plan.matrices[number],
            plan.shape,
            plan.token_grid,
            trace,
            number,
            output.done - cut.prefix // size,
        )

        def after_row(row: int, before: int = plan.shape.window_start[number]) -> None:
            elapsed = time.perf_counter() - output.start
            done, rows = before + row + 1, len(plan.shape.active)
            callback(Progress(done, rows, output.done, output.count, elapsed))

        new = _new_frames(cut, size)
        steps = run.open_window(window, cut)
        for finished in denoise_window(window, steps, after_row):
            frames = new.get(finished.chunk)
            if frames is not None:
                video[:, frames] = finished.latents[:, -(frames.stop - frames.start) :]
                yield output.emit(video[:, frames].copy(), finished.computed)
        del window, steps  # its keys and activations make room for those of the next


def _new_frames(cut: WindowPlan, size: int) -> dict[int, slice]:
    """By chunk of the window: the latent frames of the video that it adds, where it adds any."""
    new = {}
    for chunk in range(cut.frames // size):
        start, stop = max(cut.skip, chunk * size), (chunk + 1) * size
        if start < stop:
            new[chunk] = slice(cut.first + start, cut.first + stop)
    return new


def _initial_latents(inputs: Inputs, video: Latents, cut: WindowPlan) -> Latents:
    """The prefix of a window, from the video, and its noise."""
    latents = inputs.noise[:, cut.first : cut.first + cut.frames].copy()
    latents[:, : cut.prefix] = video[:, cut.first : cut.first + cut.prefix]
    return latents
