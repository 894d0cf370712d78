"""Runs policies in turns on the same noise and prompts: what each takes, and what it gives.

`choose_policies` and `check_policies` refuse what cannot run, `take_turns` runs, `judge_frames`
holds the frames against those of `none`. Neighbours: `mc-bench` asks, `policy_report` tells what
came out; `baseline` is diffusers as one more contender.
"""

__all__ = [
    "Bench",
    "Judgement",
    "Scores",
    "Turn",
    "Turns",
    "check_policies",
    "choose_policies",
    "judge_frames",
    "policy_contender",
    "take_turns",
]

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_runtime.bench.reference import time_kernel
from mc_runtime.fidelity import Fidelity, Lpips, compare_videos
from mc_runtime.generation import Progress
from mc_runtime.inputs import check_policy
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.vae import Decoder, to_uint8
from motioncache import DecisionTrace, Policy

REFERENCE = "none"
REST_SECONDS = 0.05  # until the threads of the turn before, which spin for a while, are asleep
WARMUP_ROWS = 3  # all that a run ever does is done in the first rows, but for its policy

Latents = NDArray[np.float32]
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Bench:
    """What is run.

    Attributes:
        pipeline: Of the bundle.
        policies: By what the user calls them, such as `flowcache:slow`; `none` first.
        options: Of every generation.
        prompts: Every policy runs each of them.
        rounds: How often it does.
    """

    pipeline: VideoPipeline
    policies: Mapping[str, Policy]
    options: GenerationOptions
    prompts: Sequence[str]
    rounds: int

    @property
    def decoder(self) -> Decoder | None:
        """Makes frames; None where the bundle has no VAE."""
        return self.pipeline.decoder if "vae" in self.pipeline.bundle.manifest.config else None


@dataclass(frozen=True)
class Turn:
    """One run of a contender.

    Attributes:
        prompt: Number of the prompt.
        round: Number of the repetition.
        seconds: Of denoising, wall time.
        latents: Of each chunk, (c, F, h, w), or of the video in one; of the first repetition alone.
        trace: What was decided; None of diffusers, and only of the first repetition.
        engine_seconds: The part of `seconds` in engines; None of diffusers.
        policy_seconds: The part of `seconds` that the policy took; None of diffusers.
    """

    prompt: int
    round: int
    seconds: float
    latents: Sequence[Latents]
    trace: DecisionTrace | None = None
    engine_seconds: float | None = None
    policy_seconds: float | None = None


# Runs a prompt by its number, for some rows or to the end.
Contender = Callable[[int, int | None], Turn]


@dataclass
class Turns:
    """Everything that was timed.

    Attributes:
        of: The turns of each contender that has had one, in the order of time.
        reference_ms: Of a fixed matrix product before every turn and after the last: only another
            program on the machine makes it vary.
    """

    of: dict[str, list[Turn]] = field(default_factory=dict)
    reference_ms: list[float] = field(default_factory=list)

    @property
    def spread(self) -> float:
        """How many times the least time of the kernel its largest is."""
        return max(self.reference_ms) / min(self.reference_ms)


class _Enough(Exception):
    """Ends a run that was only to warm up."""


def choose_policies(pipeline: VideoPipeline, text: str, pairs: Iterable[str]) -> dict[str, Policy]:
    """Make the policies that `--policies` and `--policy-option` ask for.

    Args:
        pipeline: Of the bundle, whose presets hold.
        text: NAME or NAME:PRESET, with commas between.
        pairs: NAME.FIELD=VALUE; a NAME without preset means every policy of that name.

    Returns:
        The policies by what they are called in `text`, `none` first.

    Raises:
        ValueError: One is named twice, unknown or incomplete, or an option is of no policy here.
    """
    specs = text.split(",")
    twice = sorted({spec for spec in specs if specs.count(spec) > 1})
    if twice:
        raise ValueError(
            f"policies: expected each once, got {', '.join(twice)} more than once. Leave it out."
        )
    specs = [REFERENCE, *(spec for spec in specs if spec != REFERENCE)]
    options: dict[str, list[str]] = {spec: [] for spec in specs}
    for pair in pairs:
        target, dot, _ = pair.partition("=")[0].rpartition(".")
        named = [spec for spec in specs if target in (spec, spec.partition(":")[0])]
        if not dot or not named:
            raise ValueError(
                f"policy option: expected NAME.FIELD=VALUE with a NAME of {', '.join(specs)}, "
                f"got '{pair}'. Write it like motioncache.threshold=0.1."
            )
        for spec in named:
            options[spec].append(pair[len(target) + 1 :])
    return {spec: pipeline.find_policy(spec, options[spec]) for spec in specs}


def check_policies(bench: Bench, note: Callable[[str], None]) -> None:
    """Refuse settings and policies that cannot run, before anything does.

    Args:
        bench: What is to be run.
        note: Called with what the user should know, such as that a preset is for other steps.

    Raises:
        ValueError: As `VideoPipeline.generate`.
    """
    shape = bench.pipeline.plan(bench.options).shape
    for policy in bench.policies.values():
        check_policy(policy, shape, note)


def policy_contender(
    bench: Bench, policy: Policy, embeddings: Sequence[Mapping[str, Any]]
) -> Contender:
    """Make a contender of a policy: it denoises, and does not decode."""

    def run(prompt: int, rows: int | None) -> Turn:
        def stop(progress: Progress) -> None:
            if progress.row == rows:
                raise _Enough

        generation = bench.pipeline.generate(
            **embeddings[prompt],
            policy=policy,
            decode=False,
            callback=stop,
            note=lambda _: None,  # `check_policies` said it
            options=bench.options,
        )
        start, latents = time.perf_counter(), []
        try:
            latents = [chunk.latents for chunk in generation]
        except _Enough:
            pass
        seconds = time.perf_counter() - start
        trace = generation.trace
        engine, decided = (
            float(part.sum(dtype=np.float64)) / 1e3 for part in (trace.engine_ms, trace.policy_ms)
        )
        return Turn(prompt, 0, seconds, latents, trace, engine, decided)

    return run


def take_turns(
    contenders: Mapping[str, Contender],
    prompts: int,
    rounds: int,
    turns: Turns,
    advance: Callable[[str, Turn], None] = lambda name, turn: None,
) -> None:
    """Run everything in turns, after a warm-up of each that is not counted.

    Args:
        contenders: By name. Each repetition begins with the next of them.
        prompts: How many there are.
        rounds: How often every contender runs each prompt.
        turns: Is filled with the times and with what the first repetition gave, so that what was
            measured is there after an interrupt.
        advance: Called after every turn.
    """
    names = list(contenders)
    for contender in contenders.values():
        contender(0, WARMUP_ROWS)
    for number in range(rounds):
        first = number % len(names)
        for prompt in range(prompts):
            for name in names[first:] + names[:first]:
                time.sleep(REST_SECONDS)
                turns.reference_ms.append(time_kernel())
                turn = replace(contenders[name](prompt, None), round=number)
                if number:
                    turn = replace(turn, latents=(), trace=None)
                turns.of[name] = [*turns.of.get(name, ()), turn]  # an interrupt leaves no empty one
                advance(name, turn)
    turns.reference_ms.append(time_kernel())


@dataclass(frozen=True)
class Scores:
    """How near the frames of one prompt are.

    Attributes:
        policies: Of each policy, against `none`.
        none_to_diffusers: Of `none` against diffusers, where that ran and has a VAE.
    """

    policies: Mapping[str, Fidelity]
    none_to_diffusers: Fidelity | None


@dataclass
class Judgement:
    """How near the frames are.

    Attributes:
        prompts: By prompt; fewer than there are after an interrupt, none without a VAE.
    """

    prompts: list[Scores] = field(default_factory=list)

    def of_policy(self, name: str) -> list[Fidelity]:
        """Scores of a policy against `none`."""
        return [scores.policies[name] for scores in self.prompts]

    @property
    def none_to_diffusers(self) -> list[Fidelity]:
        """Scores of `none` against diffusers, where that ran and has a VAE."""
        found = [scores.none_to_diffusers for scores in self.prompts]
        return [scores for scores in found if scores is not None]


def judge_frames(
    bench: Bench,
    turns: Turns,
    judgement: Judgement,
    lpips: Lpips | None,
    baseline_frames: Callable[[int], Frames | None] = lambda prompt: None,
) -> None:
    """Decode what the first repetition gave and compare it; two videos are in memory at a time.

    Args:
        bench: What was run.
        turns: Of every policy.
        judgement: Is filled prompt by prompt; stays empty without a VAE.
        lpips: The graph for LPIPS.
        baseline_frames: Those of diffusers by prompt, to hold `none` against.
    """
    decoder = bench.decoder
    if decoder is None:
        return
    for prompt in range(len(bench.prompts)):
        # The first repetition runs every prompt once, in order.
        reference, chunks = _decode(decoder, turns.of[REFERENCE][prompt].latents)
        scores = {}
        for name in bench.policies:
            frames = reference
            if name != REFERENCE:
                frames, _ = _decode(decoder, turns.of[name][prompt].latents)
            scores[name] = compare_videos(reference, frames, chunks, lpips)
        theirs = baseline_frames(prompt)
        to_theirs = None if theirs is None else compare_videos(theirs, reference, chunks, lpips)
        judgement.prompts.append(Scores(scores, to_theirs))


def _decode(decoder: Decoder, latents: Iterable[Latents]) -> tuple[Frames, list[slice]]:
    """Frames of a video, and which of them each chunk has."""
    state, parts = None, []
    for chunk in latents:
        pixels, state = decoder.decode(chunk, state)
        parts.append(to_uint8(pixels))
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    return np.concatenate(parts), [slice(*pair) for pair in pairwise(ends)]
