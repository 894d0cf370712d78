"""The engines of a bundle one by one: every pass that a generation makes, and what it costs.

`list_cases` makes the calls, `take_rounds` times them in turns. Neighbours: `mc-bench run
--engines` asks, `latency_report` tells, `roofline` counts operations and bytes.

Axes: L tokens of a chunk, T text tokens, C channels.
"""

__all__ = ["SHARES", "Case", "Sweep", "list_cases", "take_rounds"]

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mc_engines.run_sizes import TEXT_TOKENS
from mc_engines.runner import Array
from mc_runtime.bench.reference import time_kernel
from mc_runtime.bench.roofline import Call, EngineCosts
from mc_runtime.flops import ModelFlops
from mc_runtime.options import GenerationOptions
from mc_runtime.passes import Passes
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.rope import rope_tables
from mc_runtime.text import encode_prompt

SHARES = 1.0, 0.75, 0.5, 0.4, 0.25, 0.1
WARMUP_ROUNDS = 2
_TIMESTEP, _FPS = 500, 24
_MILLISECONDS = 1e3
_KERNEL_SIZE = 256  # of the reference kernel: short beside a pass


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
    """

    name: str
    component: str
    run: Callable[[], Any]
    tokens: int
    keys: int = 0
    cost: Call | None = None


@dataclass
class Sweep:
    """What was timed, in milliseconds.

    Attributes:
        samples: Of each case by its number, one per round.
        warmup: Of the rounds before.
        reference: Of the reference kernel, before each case of each round.
    """

    samples: dict[int, list[float]] = field(default_factory=dict)
    warmup: dict[int, list[float]] = field(default_factory=dict)
    reference: dict[int, list[float]] = field(default_factory=dict)


def list_cases(pipeline: VideoPipeline, options: GenerationOptions) -> list[Case]:
    """Make every call that is timed, of the components that the bundle has.

    Args:
        pipeline: Of the bundle, on its backend.
        options: Size of the video and of its chunks.

    Returns:
        Passes of the transformer at every place of a window, and with a share of the tokens at the
        last; a reuse step; the keys of a prompt; the text encoder; a step of the VAE either way.

    Raises:
        ValueError: A size that cannot be generated.
    """
    config = pipeline.bundle.manifest.config
    text_tokens = config.get("text_encoder", {}).get("max_tokens", TEXT_TOKENS)
    cases = list(_transformer_cases(pipeline, options, text_tokens))
    if "text_encoder" in config:
        encoder, prompt = pipeline.text_encoder, " ".join(["a"] * text_tokens)
        cases.append(
            Case(
                "text encoder",
                "text_layer",
                lambda: encode_prompt(prompt, encoder, text_tokens),
                text_tokens,
            )
        )
    if "vae" in config:
        cases += _vae_cases(pipeline, options)
    return cases


def _transformer_cases(
    pipeline: VideoPipeline, options: GenerationOptions, text_tokens: int
) -> Iterator[Case]:
    plan = pipeline.plan(options)
    length = plan.shape.tokens
    chunks = plan.shape.active.shape[1]
    costs = EngineCosts(
        ModelFlops.from_manifest(pipeline.bundle.manifest.config["transformer"]),
        length * chunks,
        4,
        4,
    )
    window = _Window(pipeline.passes, options, plan.token_grid, chunks, text_tokens)

    def price(tokens: int, chunk: int) -> Call:
        blocks = costs.block(tokens, (chunk + 1) * length, text_tokens).times(costs.flops.layers)
        ends = costs.combine(length, tokens) + costs.embed(length) + costs.head(length)
        return (blocks if tokens else Call()) + ends

    for chunk in range(chunks):
        yield window.case(f"full pass, chunk {chunk + 1}", chunk, length, price)
    last = chunks - 1
    for share in SHARES[1:]:
        name = f"{share:.0%} of the tokens, chunk {chunks}"
        yield window.case(name, last, math.ceil(share * length), price)
    yield window.case("reuse step", last, 0, price)
    embedding = window.embedding
    yield Case(
        "keys of a prompt",
        "context",
        lambda: pipeline.passes.encode_context(embedding),
        text_tokens,
        cost=costs.context(text_tokens),
    )


class _Window:
    """A branch whose every chunk has been computed once, so that any pass can be made again."""

    def __init__(
        self,
        passes: Passes,
        options: GenerationOptions,
        grid: tuple[int, int],
        chunks: int,
        text_tokens: int,
    ) -> None:
        self.passes, config = passes, passes.config
        rng = np.random.default_rng(0)
        frames = options.causal_block_size
        self.length = frames * math.prod(grid)
        self.embedding = rng.standard_normal((1, text_tokens, config.text_dim), np.float32)
        timesteps = np.array([_TIMESTEP])
        self.conditions = passes.encode_timesteps(timesteps, _FPS)
        patch = config.in_channels * math.prod(config.patch_size)
        self.patches = rng.standard_normal((1, self.length, patch), np.float32)
        angles = [
            rope_tables(
                frames,
                *grid,
                config.rope_axes,
                config.rope_theta,
                config.rope_max_positions,
                first_frame=chunk * frames,
            )
            for chunk in range(chunks)
        ]
        self.branch = passes.open_branch(passes.encode_context(self.embedding), angles)
        for chunk in range(chunks):
            self.compute(chunk, np.arange(self.length))

    def compute(self, chunk: int, rows: Array) -> None:
        """Make a pass as a step does: embed, blocks for these rows, head, velocity to the host."""
        x = self.passes.embed(self.patches)
        out = self.passes.evaluate(self.branch, chunk, x, rows, self.conditions.modulation[:1])
        self.passes.read(out, self.conditions.head_modulation[:1])

    def case(self, name: str, chunk: int, tokens: int, price: Callable[[int, int], Call]) -> Case:
        """Make the case of a pass for evenly spread tokens."""
        rows = np.linspace(0, self.length - 1, tokens).round().astype(np.intp)
        padded = self.passes.bucket(tokens, self.length)
        keys = (chunk + 1) * self.length
        run = partial(self.compute, chunk, rows)
        return Case(name, "block" if tokens else "head", run, padded, keys, price(padded, chunk))


def _vae_cases(pipeline: VideoPipeline, options: GenerationOptions) -> list[Case]:
    """A later step of the decoder and of the encoder, each with the state of the one before."""
    rng, grid = np.random.default_rng(0), pipeline.grid
    height, width = (size // grid.spatial_factor for size in (options.height, options.width))
    channels = pipeline.bundle.manifest.config["vae"]["z_dim"]
    latents = rng.standard_normal((channels, 1, height, width), np.float32)
    _, state = pipeline.decoder.decode(latents)
    count = 1 + grid.temporal_factor
    frames = rng.integers(0, 256, (count, options.height, options.width, 3), np.uint8)
    tokens = height * width
    return [
        Case("VAE decoder, a latent frame", "vae_decoder_next",
             lambda: pipeline.decoder.decode(latents, state), tokens),
        Case("VAE encoder, a video of two latent frames", "vae_encoder_next",
             lambda: pipeline.encoder.encode(frames), 2 * tokens),
    ]  # fmt: skip


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
            reference = time_kernel(_KERNEL_SIZE)
            start = time.perf_counter()
            cases[index].run()
            taken = _MILLISECONDS * (time.perf_counter() - start)
            kept.setdefault(index, []).append(taken)
            if number >= 0:
                sweep.reference.setdefault(index, []).append(reference)
            advance()
