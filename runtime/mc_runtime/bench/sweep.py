"""The engines of a bundle one by one: every pass that a generation makes, and what it costs.

`list_cases` makes the calls, `take_rounds` times them in turns. Neighbours: `mc-bench run
--engines` asks, `latency_report` tells, `roofline` counts operations and bytes.

Axes: L tokens of a chunk, T text tokens, C channels.
"""

__all__ = [
    "KERNEL_SIZE",
    "SHARES",
    "Case",
    "Sweep",
    "Timed",
    "check_components",
    "list_cases",
    "take_rounds",
]

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mc_engines.run_sizes import TEXT_TOKENS
from mc_engines.runner import Array
from mc_runtime.bench.backends import Backend
from mc_runtime.bench.reference import time_kernel
from mc_runtime.bench.roofline import Call, EngineCosts
from mc_runtime.flops import ModelFlops
from mc_runtime.options import GenerationOptions
from mc_runtime.passes import Passes
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.rope import chunk_tables
from mc_runtime.text import encode_prompt

SHARES = 1.0, 0.75, 0.5, 0.4, 0.25, 0.1
WARMUP_ROUNDS = 2
KERNEL_SIZE = 256  # of the reference kernel: short beside a pass
_TIMESTEP, _FPS = 500, 24
_MILLISECONDS = 1e3
# What is timed by the part of the bundle that it is of.
_COMPONENTS = {
    "transformer": ("block", "head", "context"),
    "text_encoder": ("text_layer",),
    "vae": ("vae_decoder_next", "vae_encoder_next"),
}


@dataclass(frozen=True)
class Case:
    """A call of one or more engines that is timed.

    Attributes:
        name: What is done.
        component: The engine that takes most of it.
        run: Does it, and waits for it.
        tokens: That go through the engine.
        keys: That they see, their own included; 0 where there are none.
        cost: Operations and bytes; None where they are not counted: text encoder and VAE.
        on_gpu: Whether the reference kernel, which is the CPU's, says nothing about it.
    """

    name: str
    component: str
    run: Callable[[], Any]
    tokens: int
    keys: int = 0
    cost: Call | None = None
    on_gpu: bool = False


class Timed(NamedTuple):
    """A sample, together with what it is held against: an interrupt leaves both or none.

    Attributes:
        taken_ms: Of the call.
        reference_ms: Of the reference kernel just before; None where it says nothing.
    """

    taken_ms: float
    reference_ms: float | None


@dataclass
class Sweep:
    """What was timed.

    Attributes:
        samples: Of each case by its number, one per round.
        warmup: Of the rounds before.
    """

    samples: dict[int, list[Timed]] = field(default_factory=dict)
    warmup: dict[int, list[Timed]] = field(default_factory=dict)


def check_components(config: Mapping[str, Any], asked: Sequence[str]) -> tuple[str, ...]:
    """Choose the components that are timed, before anything is opened.

    Args:
        config: Of the bundle's manifest.
        asked: Names; none: everything that the bundle has.

    Returns:
        The names.

    Raises:
        ValueError: One that the bundle lacks, or that is not timed.
    """
    known = [name for part, names in _COMPONENTS.items() if part in config for name in names]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(
            f"component: expected some of {', '.join(known)}, got {', '.join(unknown)}. "
            "Name what the bundle has and mc-bench times."
        )
    return tuple(asked or known)


def list_cases(
    backend: Backend, options: GenerationOptions, components: Sequence[str] = ()
) -> list[Case]:
    """Make every call that is timed of some components, and open what they need and no more.

    Args:
        backend: What runs them.
        options: Size of the video and of its chunks.
        components: As for `check_components`.

    Returns:
        Passes of the transformer at every place of a window, and with a share of the tokens at the
        last; a reuse step; the keys of a prompt; the text encoder; a step of the VAE's decoder, two
        of its encoder.

    Raises:
        ValueError: A size that cannot be generated, or a component that the bundle lacks.
    """
    config = backend.pipeline.bundle.manifest.config
    wanted = check_components(config, components)
    text_tokens = config.get("text_encoder", {}).get("max_tokens", TEXT_TOKENS)
    cases: list[Case] = []
    if {"block", "head", "context"} & {*wanted}:
        cases += _transformer_cases(backend, options, text_tokens, wanted)
    if "text_layer" in wanted:
        cases.append(_text_case(backend, text_tokens))
    makers = {"vae_decoder_next": _decoder_case, "vae_encoder_next": _encoder_case}
    cases += [make(backend, options) for name, make in makers.items() if name in wanted]
    return cases


def _transformer_cases(
    backend: Backend, options: GenerationOptions, text_tokens: int, wanted: Sequence[str]
) -> Iterator[Case]:
    """Passes, which share a window, and the keys of a prompt, which need none."""
    passes, plan = backend.pipeline.passes, backend.pipeline.plan(options)
    chunks = plan.shape.active.shape[1]
    size = backend.value_bytes
    flops = ModelFlops.from_manifest(backend.pipeline.bundle.manifest.config["transformer"])
    costs = EngineCosts(flops, plan.shape.tokens * chunks, size, size)
    shape = 1, text_tokens, passes.config.text_dim
    embedding = np.random.default_rng(0).standard_normal(shape, np.float32)
    if {"block", "head"} & {*wanted}:
        window = _Window(passes, options, plan.token_grid, chunks, embedding)
        cases = _pass_cases(window, chunks, costs, text_tokens, backend.on_gpu)
        yield from (case for case in cases if case.component in wanted)
    if "context" in wanted:
        yield Case(
            "keys of a prompt",
            "context",
            lambda: passes.encode_context(embedding),
            text_tokens,
            cost=costs.context(text_tokens),
            on_gpu=backend.on_gpu,
        )


def _pass_cases(
    window: "_Window", chunks: int, costs: EngineCosts, text_tokens: int, on_gpu: bool
) -> Iterator[Case]:
    length, last = window.length, chunks - 1

    def price(tokens: int, chunk: int) -> Call:
        blocks = costs.block(tokens, (chunk + 1) * length, text_tokens).times(costs.flops.layers)
        ends = costs.combine(length, tokens) + costs.embed(length) + costs.head(length)
        return (blocks if tokens else Call()) + ends

    def case(name: str, chunk: int, tokens: int) -> Case:
        rows = np.linspace(0, length - 1, tokens).round().astype(np.intp)
        padded = window.passes.bucket(tokens, length)
        return Case(
            name,
            "block" if tokens else "head",
            partial(window.compute, chunk, rows),
            padded,
            (chunk + 1) * length,
            price(padded, chunk),
            on_gpu,
        )

    for chunk in range(chunks):
        yield case(f"full pass, chunk {chunk + 1}", chunk, length)
    for share in SHARES[1:]:
        yield case(f"{share:.0%} of the tokens, chunk {chunks}", last, math.ceil(share * length))
    yield case("reuse step", last, 0)


class _Window:
    """A branch whose every chunk has been computed once, so that any pass can be made again."""

    def __init__(
        self,
        passes: Passes,
        options: GenerationOptions,
        grid: tuple[int, int],
        chunks: int,
        embedding: Array,
    ) -> None:
        self.passes, config = passes, passes.config
        frames = options.causal_block_size
        self.length = frames * math.prod(grid)
        timesteps = np.array([_TIMESTEP])
        self.conditions = passes.encode_timesteps(timesteps, _FPS)
        patch = config.in_channels * math.prod(config.patch_size)
        shape = 1, self.length, patch
        self.patches = np.random.default_rng(1).standard_normal(shape, np.float32)
        angles = chunk_tables(config.rope, chunks, frames, grid)
        self.branch = passes.open_branch(passes.encode_context(embedding), angles)
        for chunk in range(chunks):
            self.compute(chunk, np.arange(self.length))

    def compute(self, chunk: int, rows: Array) -> None:
        """Make a pass as a step does: embed, blocks for these rows, head, velocity to the host."""
        x = self.passes.embed(self.patches)
        out = self.passes.evaluate(self.branch, chunk, x, rows, self.conditions.modulation[:1])
        self.passes.read(out, self.conditions.head_modulation[:1])


def _text_case(backend: Backend, tokens: int) -> Case:
    encoder, prompt = backend.pipeline.text_encoder, " ".join(["a"] * tokens)
    run = partial(encode_prompt, prompt, encoder, tokens)
    return Case("text encoder", "text_layer", run, tokens, on_gpu=backend.on_gpu)


def _latent_size(pipeline: VideoPipeline, options: GenerationOptions) -> tuple[int, int]:
    factor = pipeline.grid.spatial_factor
    return options.height // factor, options.width // factor


def _decoder_case(backend: Backend, options: GenerationOptions) -> Case:
    """A later step of the decoder, with the state of the one before."""
    pipeline = backend.pipeline
    size = _latent_size(pipeline, options)
    channels = pipeline.bundle.manifest.config["vae"]["z_dim"]
    latents = np.random.default_rng(0).standard_normal((channels, 1, *size), np.float32)
    decoder = pipeline.decoder
    _, state = decoder.decode(latents)
    return Case(
        "VAE decoder, a latent frame",
        "vae_decoder_next",
        lambda: decoder.decode(latents, state),
        math.prod(size),
        on_gpu=backend.on_gpu,
    )


def _encoder_case(backend: Backend, options: GenerationOptions) -> Case:
    """The first and a later step of the encoder, of which only both together can be called."""
    pipeline = backend.pipeline
    shape = 1 + pipeline.grid.temporal_factor, options.height, options.width, 3
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return Case(
        "VAE encoder, a video of two latent frames",
        "vae_encoder_next",
        partial(pipeline.encoder.encode, frames),
        2 * math.prod(_latent_size(pipeline, options)),
        on_gpu=backend.on_gpu,
    )


def take_rounds(
    cases: Sequence[Case],
    rounds: int,
    sweep: Sweep,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Time every case once per round, each beside the reference kernel.

    Args:
        cases: Every round begins with the next of them.
        rounds: How many, after a warm-up that is kept apart.
        sweep: Is filled, so that what was measured is there after an interrupt.
        advance: Called after every call.
    """
    for number in range(-WARMUP_ROUNDS, rounds):
        kept = sweep.warmup if number < 0 else sweep.samples
        first = number % len(cases)
        for index in [*range(first, len(cases)), *range(first)]:
            case = cases[index]
            reference = None if case.on_gpu else time_kernel(KERNEL_SIZE)
            start = time.perf_counter()
            case.run()
            taken = _MILLISECONDS * (time.perf_counter() - start)
            kept.setdefault(index, []).append(Timed(taken, reference))
            advance()
