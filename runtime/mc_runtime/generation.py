"""One generation: windows one after the other, chunks decoded as they are finished.

Neighbours: `VideoPipeline.generate` checks the inputs and calls `generate_chunks`; `plan_run`
cuts the video, `denoise_window` denoises a window, `VaeDecoder` decodes. Windows hand over
latents, never pixels.
"""

__all__ = ["Generation", "Inputs", "Progress", "generate_chunks"]

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.errors import EngineError
from mc_runtime.denoise import Request, Window, denoise_window
from mc_runtime.options import Chunk, GenerationOptions
from mc_runtime.passes import Passes
from mc_runtime.run_plan import RunPlan
from mc_runtime.sampler import sampler_table
from mc_runtime.schedule import Window as WindowPlan
from mc_runtime.vae import VaeDecoder, VaeState, to_uint8
from motioncache import DecisionTrace, DistanceTable, Policy

CLEAN_TIMESTEP = 0
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


@dataclass(frozen=True)
class Inputs:
    """The tensors and settings of a generation; all of them are checked.

    Attributes:
        embeddings: Of the prompt, and of the negative prompt with guidance, each (1, T, text_dim).
        noise: Latent frame i of the video starts from noise[:, i]; shape (c, frames, h, w).
        prefix: Latents that the video begins with, shape (c, n, h, w); n may be 0.
        options: Accepted by `validate_options`.
        bundle: Identity of the model, for the trace.
    """

    embeddings: tuple[NDArray[np.float32], ...]
    noise: Latents
    prefix: Latents
    options: GenerationOptions
    bundle: str


class _Output:
    """Makes `Chunk`s of latents: numbers, times and decodes them in the order of the video."""

    def __init__(self, count: int, decoder: VaeDecoder | None) -> None:
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
    inputs: Inputs,
    plan: RunPlan,
    passes: Passes,
    decoder: VaeDecoder | None,
    policy: Policy,
    callback: Callable[[Progress], None],
) -> Generation:
    """Denoise every window of the video.

    Args:
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
    trace = DecisionTrace.empty(plan.shape, _describe(inputs, plan, policy))
    chunks = _generate(inputs, plan, passes, decoder, policy, callback, trace)
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
        "bundle": inputs.bundle,
        "grid": list(plan.token_grid),
        "steps": plan.shape.steps,
        "text_tokens": [embedding.shape[1] for embedding in inputs.embeddings],
        "windows": [asdict(window) for window in plan.windows],
        "options": asdict(inputs.options),
    }


def _generate(
    inputs: Inputs,
    plan: RunPlan,
    passes: Passes,
    decoder: VaeDecoder | None,
    policy: Policy,
    callback: Callable[[Progress], None],
    trace: DecisionTrace,
) -> Iterator[Chunk]:
    size = inputs.options.causal_block_size
    output = _Output(sum(len(_new_frames(window, size)) for window in plan.windows), decoder)
    video = inputs.noise.copy()  # what is not denoised yet is noise
    given = plan.windows[0].prefix
    video[:, :given] = inputs.prefix[:, :given]
    for first in range(0, given, size):
        yield output.emit(video[:, first : first + size].copy(), {})
    request = _request(inputs, plan, passes, policy, trace)
    histories: list[dict[int, NDArray[np.float32]]] = [{} for _ in inputs.embeddings]
    for number, cut in enumerate(plan.windows):
        if policy.reset_history:
            histories = [{} for _ in inputs.embeddings]
        first_chunk = output.done - cut.prefix // size
        window = Window(
            request,
            _initial_latents(inputs, video, cut),
            _show_prefix(inputs, video, number, cut),
            plan.matrices[number],
            first_chunk,
            number,
            histories,
        )

        def after_row(row: int, before: int = plan.shape.window_start[number]) -> None:
            elapsed = time.perf_counter() - output.start
            done, rows = before + row + 1, len(plan.shape.active)
            callback(Progress(done, rows, output.done, output.count, elapsed))

        new = _new_frames(cut, size)
        for finished in denoise_window(window, after_row):
            frames = new.get(finished.chunk)
            if frames is not None:
                video[:, frames] = finished.latents[:, -(frames.stop - frames.start) :]
                yield output.emit(video[:, frames].copy(), finished.computed)
        del window  # its keys and activations make room for those of the next


def _new_frames(cut: WindowPlan, size: int) -> dict[int, slice]:
    """By chunk of the window: the latent frames of the video that it adds, where it adds any."""
    new = {}
    for chunk in range(cut.frames // size):
        start, stop = max(cut.skip, chunk * size), (chunk + 1) * size
        if start < stop:
            new[chunk] = slice(cut.first + start, cut.first + stop)
    return new


def _request(
    inputs: Inputs,
    plan: RunPlan,
    passes: Passes,
    policy: Policy,
    trace: DecisionTrace,
) -> Request:
    """What all windows share; the prompt's keys and the modulation are computed here, once."""
    options = inputs.options
    table = sampler_table(
        options.num_inference_steps, options.flow_shift, options.sigma_table, options.first_sample
    )
    timesteps = np.append(table.timesteps, [CLEAN_TIMESTEP, options.addnoise_condition])
    conditions = passes.encode_timesteps(timesteps, options.fps)
    return Request(
        passes,
        policy,
        [passes.encode_context(embedding) for embedding in inputs.embeddings],
        options.guidance_scale,
        table,
        conditions,
        options.causal_block_size,
        DistanceTable.from_modulation(conditions.modulation[: len(table.timesteps)]),
        plan.shape,
        trace,
    )


def _initial_latents(inputs: Inputs, video: Latents, cut: WindowPlan) -> Latents:
    """The prefix of a window, from the video, and its noise."""
    latents = inputs.noise[:, cut.first : cut.first + cut.frames].copy()
    latents[:, : cut.prefix] = video[:, cut.first : cut.first + cut.prefix]
    return latents


def _show_prefix(inputs: Inputs, video: Latents, number: int, cut: WindowPlan) -> Latents:
    """The prefix of a window as the model sees it: with noise, drawn once per window."""
    prefix = video[:, cut.first : cut.first + cut.prefix]
    share = np.float32(0.001 * inputs.options.addnoise_condition)
    drawn = np.random.default_rng([inputs.options.seed, number + 1])
    noise = drawn.standard_normal(prefix.shape, np.float32)
    return (1 - share) * prefix + share * noise
