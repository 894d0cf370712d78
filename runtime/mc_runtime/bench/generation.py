"""A generation as its user feels it: until the first chunk, between chunks, and in memory.

`time_generations` runs the policies of every backend in turns. Neighbours: `mc-bench run
--generation` asks, `latency_report` tells; `policies` compares policies by denoising alone.
"""

__all__ = ["Generated", "Runner", "policy_runner", "time_generations"]

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mc_runtime.bench.backends import Backend
from mc_runtime.bench.machine import Monitor
from mc_runtime.bench.policies import REST_SECONDS
from mc_runtime.bench.reference import time_kernel
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from motioncache import DecisionTrace, Policy


@dataclass(frozen=True)
class Generated:
    """One video.

    Attributes:
        first_chunk_ms: From the call with the prompt to the first chunk's frames.
        inter_chunk_ms: Of each later chunk, since the one before.
        decode_ms: The part of all of them in the VAE.
        total_ms: From the call to the last chunk.
        peaks: Largest resident bytes of this process by kind.
        trace: What was decided.
        reference_ms: Of the reference kernel just before; None where that, a product of the CPU,
            says nothing.
    """

    first_chunk_ms: float
    inter_chunk_ms: list[float]
    decode_ms: float
    total_ms: float
    peaks: Mapping[str, int]
    trace: DecisionTrace
    reference_ms: float | None


Runner = Callable[[], Generated]


def policy_runner(
    backend: Backend,
    policy: Policy,
    options: GenerationOptions,
    texts: Mapping[str, Any],
    device: int = 0,
    note: Callable[[str], None] = lambda _: None,
) -> Runner:
    """Make a runner that generates a whole video, text encoder and decoding included.

    Args:
        backend: What runs it. Its parts are opened.
        policy: Of the cache.
        options: Of the generation.
        texts: `prompt`, or `prompt_embeds` and its negative, as `VideoPipeline.generate` takes.
        device: Number of the GPU whose memory is watched.
        note: Called by every run with what the user should know, such as that a prompt was cut.

    Returns:
        The runner.

    Raises:
        BundleError: The bundle lacks what the texts need.
        EngineError: An engine is missing.
    """
    pipeline = backend.pipeline
    decode = "vae" in pipeline.bundle.manifest.config
    _open_parts(pipeline, decode, encode="prompt" in texts)

    def run() -> Generated:
        reference = None if backend.on_gpu else time_kernel()
        with Monitor(device) as monitor:
            start = time.perf_counter()
            generation = pipeline.generate(
                **texts, policy=policy, decode=decode, note=note, options=options
            )
            ends, decoding = [], 0.0
            for chunk in generation:
                ends.append(1e3 * (time.perf_counter() - start))
                decoding += 1e3 * chunk.decode_seconds
        return Generated(
            ends[0],
            [later - earlier for earlier, later in pairwise(ends)],
            decoding,
            ends[-1],
            monitor.peaks,
            generation.trace,
            reference,
        )

    return run


def _open_parts(pipeline: VideoPipeline, decode: bool, encode: bool) -> None:
    """Load everything that a generation needs: what is missing fails before anything is timed."""
    _ = pipeline.passes
    if decode:
        _ = pipeline.decoder
    if encode:
        _ = pipeline.text_encoder


def time_generations(
    runners: Sequence[Runner],
    rounds: int,
    taken: dict[int, list[Generated]],
    warmup: dict[int, Generated],
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Run everything in turns, after a warm-up of each that is kept apart.

    Args:
        runners: Every round begins with the next of them.
        rounds: How often each runs.
        taken: Is filled by number of the runner, so that it is there after an interrupt.
        warmup: Is filled likewise.
        advance: Called after every run.
    """
    for index, runner in enumerate(runners):
        warmup[index] = runner()
        advance()
    for number in range(rounds):
        first = number % len(runners)
        for index in [*range(first, len(runners)), *range(first)]:
            time.sleep(REST_SECONDS)
            taken.setdefault(index, []).append(runners[index]())
            advance()
