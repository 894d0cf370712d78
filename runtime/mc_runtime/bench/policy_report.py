"""What `mc-bench run` measured, as numbers ready for JSON; `policies.schema.json` describes them.

Neighbours: `policies` measures, `flops` counts, `policy_page` shows the report.
Ratios say how many times a baseline takes what the policy takes: 2 is twice as fast, half the work.
"""

__all__ = ["DIFFUSERS", "Compared", "build_report"]

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mc_runtime.bench.policies import REFERENCE, Bench, Judgement, Turn, Turns, check_policies
from mc_runtime.bench.reference import BUSY_SPREAD
from mc_runtime.fidelity import Fidelity
from mc_runtime.flops import ModelFlops, Work, count_work
from motioncache import DecisionTrace, Policy
from motioncache.options import format_options

SCHEMA = "motioncache.bench/v1"
DIFFUSERS = "diffusers"  # a contender's name that no policy has
SAME_LATENTS = 1e-3  # largest difference by which rounding explains another result
_SCORES = ("psnr", "ssim", "lpips")
_METHOD = (
    "Seconds are those of denoising, without text encoder and decoding; the medians of all turns "
    "are compared.",
    "By FLOPs: what the speed-up would be if time went with the work.",
    "A FLOP is one operation of a matrix product of the transformer, a multiply-add two; sampler, "
    "text encoder and VAE are not counted. Padded tokens are.",
    "Vanilla computes every chunk in every row, as diffusers does; none computes a chunk in the "
    "rows in which it takes a step, and skips nothing else.",
    "Outside the engines is what the loop, the policy and the set-up of a run take; the keys of "
    "the prompt, computed once, count as set-up.",
    "Frames are compared with those of none before they are encoded. PSNR is the mean over frames "
    "that differ; the moving region is what moves in the frames of none.",
)


@dataclass(frozen=True)
class _Counts:
    """Operations of a run, the mean over the prompts."""

    work: Work
    asked: int  # without the tokens that fill buckets

    @classmethod
    def of_traces(cls, flops: ModelFlops, traces: Sequence[DecisionTrace]) -> "_Counts":
        works = [asdict(count_work(flops, trace, padded=True)) for trace in traces]
        asked = [count_work(flops, trace, padded=False).total for trace in traces]
        parts = {name: sum(work[name] for work in works) // len(works) for name in works[0]}
        return cls(Work(**parts), sum(asked) // len(asked))


@dataclass
class Compared:
    """Everything that was measured; filled as it goes.

    Attributes:
        environment: Of `describe_machine`.
        lpips: Whether LPIPS is measured.
        turns: The times, and traces of the first repetition.
        judgement: How near the frames are.
        diffusers_versions: Of the libraries behind the baseline; None without one.
        ended_by: What ended it before its end, in words.
    """

    environment: Mapping[str, Any]
    lpips: bool = False
    turns: Turns = field(default_factory=Turns)
    judgement: Judgement = field(default_factory=Judgement)
    diffusers_versions: Mapping[str, str] | None = None
    ended_by: str | None = None


def build_report(bench: Bench, compared: Compared) -> dict[str, Any]:
    """Put together what was measured.

    Args:
        bench: What was to be run.
        compared: What was measured: at least a turn of `none`.

    Returns:
        A report that follows `policies.schema.json`; policies that had no turn are missing.
    """
    manifest, turns = bench.pipeline.bundle.manifest, compared.turns
    flops = ModelFlops.from_manifest(manifest.config["transformer"])
    traces = {name: _traces(turns.of[name]) for name in bench.policies if name in turns.of}
    counts = {name: _Counts.of_traces(flops, own) for name, own in traces.items()}
    baselines = {
        "every_chunk_every_row": _count_vanilla(bench, flops, traces[REFERENCE][0]),
        "chunk_causal": counts[REFERENCE].work,
    }
    policies = [
        _describe_policy(name, bench.policies[name], compared, own, counts[name], baselines)
        for name, own in traces.items()
    ]
    report = {
        "schema": SCHEMA,
        "partial": compared.ended_by is not None,
        "bundle": {
            "path": str(bench.pipeline.bundle.path.absolute()),
            "hash": bench.pipeline.bundle.model_hash,
            "model": manifest.model,
        },
        "settings": asdict(bench.options),
        "prompts": list(bench.prompts),
        "rounds": bench.rounds,
        "environment": dict(compared.environment),
        "reference_kernel": {
            "samples_ms": turns.reference_ms,
            "spread": turns.spread,
            "limit": BUSY_SPREAD,
            "busy": turns.spread > BUSY_SPREAD,
        },
        "baseline_flops": {
            name: None if work is None else work.to_json() for name, work in baselines.items()
        },
        "policies": policies,
        "diffusers": _describe_diffusers(compared),
    }
    return report | {"caveats": _list_caveats(bench, report, traces, compared)}


def _count_vanilla(bench: Bench, flops: ModelFlops, trace: DecisionTrace) -> Work | None:
    """What the original loop would take; None where it computes what `none` does."""
    count = bench.pipeline.family.vanilla
    plan = bench.pipeline.plan(bench.options)
    return None if count is None else count(flops, plan, trace.run["text_tokens"])


def _traces(turns: Sequence[Turn]) -> list[DecisionTrace]:
    return [turn.trace for turn in turns if turn.trace is not None]


def _median(turns: Sequence[Turn]) -> float:
    return statistics.median(turn.seconds for turn in turns)


def _ratio(first: Sequence[Turn], second: Sequence[Turn]) -> float:
    """Median of one to that of another, of the prompts and repetitions that both have run."""
    sides = ({(turn.prompt, turn.round) for turn in turns} for turns in (first, second))
    common = set.intersection(*sides)
    medians = [
        _median([turn for turn in turns if (turn.prompt, turn.round) in common])
        for turns in (first, second)
    ]
    return medians[0] / medians[1]


def _share(turns: Sequence[Turn], part: str) -> float:
    """What a part of each turn takes of it, the median."""
    share: float = statistics.median(getattr(turn, part) / turn.seconds for turn in turns)
    return share


def _describe_policy(
    name: str,
    policy: Policy,
    compared: Compared,
    traces: Sequence[DecisionTrace],
    counts: _Counts,
    baselines: Mapping[str, Work | None],
) -> dict[str, Any]:
    turns = compared.turns
    own = turns.of[name]
    speedup = _ratio(turns.of[REFERENCE], own)
    decided = [(trace.recompute >= 0).sum() for trace in traces]
    reused = [(trace.recompute == 0).sum() for trace in traces]
    return {
        "policy": name,
        "name": policy.name,
        "preset": policy.preset,
        "options": format_options(policy.config),
        "samples": [_sample(turn) for turn in own],
        "median_seconds": _median(own),
        "speedup": speedup,
        "verdict": None if name == REFERENCE else _judge_speed(speedup, turns.spread),
        "outside_engines_share": 1 - _share(own, "engine_seconds"),
        "policy_share": _share(own, "policy_seconds"),
        "flops": counts.work.to_json(),
        "flops_ratio": {
            key: None if work is None else work.total / counts.work.total
            for key, work in baselines.items()
        },
        "reuse_ratio": float(sum(reused) / sum(decided)),
        "padding_waste": 1 - counts.asked / counts.work.total,
        "fidelity": _describe_fidelity(compared.judgement.of_policy(name)),
    }


def _sample(turn: Turn) -> dict[str, Any]:
    names = ("prompt", "round", "seconds", "engine_seconds", "policy_seconds")
    values = {name: getattr(turn, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _judge_speed(speedup: float, spread: float) -> str | None:
    """A verdict only beyond what the machine itself varies, and none on a busy one."""
    if spread > BUSY_SPREAD:
        return None
    if 1 / spread < speedup < spread:
        return "no difference"
    return "faster" if speedup > 1 else "slower"


def _describe_fidelity(scores: Sequence[Fidelity]) -> dict[str, Any] | None:
    """Scores of every prompt, and the mean of those that have one."""
    if not scores:
        return None
    prompts = [fidelity.to_json() for fidelity in scores]
    mean = {
        region: {
            "identical": sum(prompt["video"][region]["identical"] for prompt in prompts),
            "frames": sum(prompt["video"][region]["frames"] for prompt in prompts),
            **{key: _mean([p["video"][region][key] for p in prompts]) for key in _SCORES},
        }
        for region in ("whole", "moving")
    }
    return {"mean": mean, "prompts": prompts}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _describe_diffusers(compared: Compared) -> dict[str, Any] | None:
    of = compared.turns.of
    if compared.diffusers_versions is None or DIFFUSERS not in of:
        return None
    theirs, ours = of[DIFFUSERS], of[REFERENCE]
    # The first repetition runs every prompt once, in order, `none` before diffusers.
    errors = [
        float(np.abs(np.concatenate(mine.latents, axis=1) - expected.latents[0]).max())
        for mine, expected in zip(ours, theirs, strict=False)
        if expected.round == 0
    ]
    return {
        "versions": dict(compared.diffusers_versions),
        "samples": [_sample(turn) for turn in theirs],
        "median_seconds": _median(theirs),
        "none_speedup": _ratio(theirs, ours),
        "latents_max_difference": max(errors),
        "none_fidelity": _describe_fidelity(compared.judgement.none_to_diffusers),
    }


def _list_caveats(
    bench: Bench,
    report: Mapping[str, Any],
    traces: Mapping[str, Sequence[DecisionTrace]],
    compared: Compared,
) -> list[str]:
    """What a reader has to know before believing a number."""
    caveats = list(_METHOD)
    kernel, samples = report["reference_kernel"], bench.rounds * len(bench.prompts)
    if compared.ended_by is not None:
        caveats.append(_describe_end(bench, compared))
    if kernel["busy"]:
        caveats.append(
            f"No verdict: the reference kernel varied by {kernel['spread']:.2f}, more than "
            f"{BUSY_SPREAD}; the machine is busy with something else."
        )
    if samples < 3:
        caveats.append(f"Turns of each policy: {samples}. Pass --rounds 3 or more for a median.")
    if bench.decoder is None:
        caveats.append("The bundle has no VAE, so there are no frames to compare.")
    elif not compared.lpips:
        caveats.append("LPIPS was not measured: pass --lpips FILE.onnx.")
    if len(bench.prompts) > 1:
        caveats.append("FLOPs and scores are means over the prompts, frames are their sum.")
    if report["diffusers"] is not None:
        caveats += _compare_latents(report["diffusers"]["latents_max_difference"])
    elif compared.diffusers_versions is None:
        caveats.append("How diffusers computes is counted, not timed: pass --baseline diffusers.")
    check_policies(bench, caveats.append)  # presets that were made for other steps
    for name, own in traces.items():
        shares = [reused for trace in own if (reused := trace.reused()) is not None]
        if 0 in shares:
            caveats.append(f"{name} reused no token after its warm-up: it changed nothing.")
        elif max(shares, default=0) > 0.95:
            caveats.append(f"{name} reused more than 95% of the tokens after its warm-up.")
    return caveats


def _describe_end(bench: Bench, compared: Compared) -> str:
    """What was measured when the comparison ended early."""
    asked, turns = [*bench.policies], compared.turns.of
    if compared.diffusers_versions is not None:
        asked.append(DIFFUSERS)
    counts = ", ".join(f"{name} {len(turns.get(name, ()))}" for name in asked)
    return (
        f"Partial: ended by {compared.ended_by}. Turns of {bench.rounds * len(bench.prompts)}: "
        f"{counts}; frames were compared of {len(compared.judgement.prompts)} of "
        f"{len(bench.prompts)} prompts."
    )


def _compare_latents(difference: float) -> list[str]:
    """What the difference of the latents of diffusers and `none` says."""
    caveats = [
        "diffusers ran in a process of its own, in torch on the CPU; the latents of none "
        f"differ from its by at most {difference:.1e}."
    ]
    if difference > SAME_LATENTS:
        caveats.append(
            f"A difference of more than {SAME_LATENTS:g} is no rounding: is it the checkpoint "
            "of this bundle?"
        )
    return caveats
