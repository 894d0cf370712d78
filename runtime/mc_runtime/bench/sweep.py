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
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mc_engines.run_sizes import count_text_tokens
from mc_engines.runner import Array
from mc_runtime.bench.backends import Backend
from mc_runtime.bench.reference import time_kernel
from mc_runtime.bench.roofline import Call, EngineCosts
from mc_runtime.families.family import Family, Place, Rehearsal
from mc_runtime.flops import ModelFlops
from mc_runtime.passes import Passes
from mc_runtime.rope import chunk_tables
from mc_runtime.run_plan import RunPlan
from mc_runtime.text import encode_prompt
from mc_runtime.vae import Coding

SHARES = 1.0, 0.75, 0.5, 0.4, 0.25, 0.1
WARMUP_ROUNDS = 2
KERNEL_SIZE = 256  # of the reference kernel: short beside a pass
_MILLISECONDS = 1e3


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


def check_components(
    family: Family, config: Mapping[str, Any], asked: Sequence[str]
) -> tuple[str, ...]:
    """Choose the components that are timed, before anything is opened.

    Args:
        family: Of the bundle.
        config: Of its manifest.
        asked: Names; none: everything that the bundle has.

    Returns:
        The names.

    Raises:
        ValueError: One that the bundle lacks, or that is not timed.
    """
    parts = {
        "transformer": ("block", _reused_by(family), "context"),
        "text_encoder": ("text_layer",),
        "vae": (family.decoded.component, family.encoded.component),
    }
    known = [name for part, names in parts.items() if part in config for name in names]
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ValueError(
            f"component: expected some of {', '.join(known)}, got {', '.join(unknown)}. "
            "Name what the bundle has and mc-bench times."
        )
    return tuple(asked or known)


def _reused_by(family: Family) -> str:
    """The engine that takes most of a chunk that is reused as a whole."""
    return "embed" if family.keeps_velocity else "head"


def list_cases(backend: Backend, options: Any, components: Sequence[str] = ()) -> list[Case]:
    """Make every call that is timed of some components, and open what they need and no more.

    Args:
        backend: What runs them.
        options: Of the bundle's family: size of the video, and what its passes depend on.
        components: As for `check_components`.

    Returns:
        Passes of the transformer at every place of a window, and with a share of the tokens at the
        one that sees most; a reuse step; the keys of a prompt; the text encoder; what the VAE's
        decoder and encoder code at a time.

    Raises:
        ValueError: A size that cannot be generated, or a component that the bundle lacks.
    """
    pipeline = backend.pipeline
    family, config = pipeline.family, pipeline.bundle.manifest.config
    wanted = check_components(family, config, components)
    cases: list[Case] = []
    if {"block", _reused_by(family), "context"} & {*wanted}:
        cases += _transformer_cases(backend, options, wanted)
    if "text_layer" in wanted:
        cases.append(_text_case(backend, config["text_encoder"]["max_tokens"]))
    if family.decoded.component in wanted:
        cases.append(_coding_case(backend, options, "decoder", family.decoded))
    if family.encoded.component in wanted:
        cases.append(_coding_case(backend, options, "encoder", family.encoded))
    return cases


def _transformer_cases(backend: Backend, options: Any, wanted: Sequence[str]) -> Iterator[Case]:
    """Passes, and the keys of a prompt, which need none."""
    pipeline = backend.pipeline
    passes, plan = pipeline.passes, pipeline.plan(options)
    config, size = pipeline.bundle.manifest.config, backend.value_bytes
    costs = EngineCosts(ModelFlops.from_manifest(config["transformer"]), 0, size, size)
    text_tokens = count_text_tokens(config)
    shape = 1, text_tokens, passes.config.text_dim
    embedding = np.random.default_rng(0).standard_normal(shape, np.float32)
    if {"block", _reused_by(pipeline.family)} & {*wanted}:
        rehearsal = pipeline.family.rehearse(passes, options, plan, config)
        window = _Window(passes, rehearsal, plan, embedding)
        cases = _pass_cases(window, backend, costs, text_tokens)
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
    window: "_Window", backend: Backend, costs: EngineCosts, text_tokens: int
) -> Iterator[Case]:
    length, family = window.length, backend.pipeline.family

    def price(tokens: int, place: Place) -> Call:
        engines = replace(costs, slots=place.kept * length)
        cost = engines.embed(length)
        if tokens:
            keys = len(place.seen) * length
            cost += engines.block(tokens, keys, text_tokens).times(engines.flops.layers)
        return sum(engines.ends(length, tokens, family.keeps_velocity), cost)

    def case(name: str, place: Place, tokens: int) -> Case:
        rows = np.linspace(0, length - 1, tokens).round().astype(np.intp)
        padded = window.passes.bucket(tokens, length)
        return Case(
            name,
            "block" if tokens else _reused_by(family),
            partial(window.compute, place, rows),
            padded,
            len(place.seen) * length,
            price(padded, place),
            backend.on_gpu,
        )

    for place in window.places:
        yield case(f"full pass, {place.name}", place, length)
    most = max(window.places, key=lambda place: len(place.seen))
    for share in SHARES[1:]:
        yield case(f"{share:.0%} of the tokens, {most.name}", most, math.ceil(share * length))
    yield case("reuse step", most, 0)


class _Window:
    """Branches in which all that is seen was computed, so that any pass can be made again."""

    def __init__(
        self, passes: Passes, rehearsal: Rehearsal, plan: RunPlan, embedding: Array
    ) -> None:
        self.passes, self.places, self._make = passes, rehearsal.places, rehearsal.make
        self.length, config = plan.shape.tokens, passes.config
        shape = 1, self.length, config.in_channels * math.prod(config.patch_size)
        self._patches = np.random.default_rng(1).standard_normal(shape, np.float32)
        chunks, frames = plan.shape.active.shape[1], plan.shape.frames
        angles = chunk_tables(config.rope, chunks, frames, plan.token_grid)
        context = passes.encode_context(embedding)
        self._branches = {
            kept: passes.open_branch(context, angles, kept)
            for kept in {place.kept for place in self.places}
        }
        for kept, chunk in sorted({(p.kept, chunk) for p in self.places for chunk in p.seen}):
            self.compute(Place("", chunk, [chunk], kept), np.arange(self.length))

    def compute(self, place: Place, rows: Array) -> None:
        """Make a pass as a step does: from patches on the host to velocity there."""
        x = self.passes.embed(self._patches)
        self._make(self._branches[place.kept], place, x, rows)


def _text_case(backend: Backend, tokens: int) -> Case:
    encoder, prompt = backend.pipeline.text_encoder, " ".join(["a"] * tokens)
    run = partial(encode_prompt, prompt, encoder, tokens)
    return Case("text encoder", "text_layer", run, tokens, on_gpu=backend.on_gpu)


def _coding_case(backend: Backend, options: Any, half: str, coding: Coding) -> Case:
    """What half of the VAE, `decoder` or `encoder`, codes at a time."""
    pipeline = backend.pipeline
    factor = pipeline.grid.spatial_factor
    size = options.height // factor, options.width // factor
    tokens, run = coding.prepare(getattr(pipeline, half), size)
    name = f"VAE {half}, {coding.name}"
    return Case(name, coding.component, run, tokens, on_gpu=backend.on_gpu)


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
