"""What `mc-bench run --engines` and `--generation` measured, ready for JSON.

`latency.schema.json` describes it. Neighbours: `sweep` and `generation` measure, `latency_page`
shows the report, `compare` holds two of them against each other.
"""

__all__ = ["Measured", "Setup", "build_latency_report", "describe_policies"]

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mc_engines.bundle import Bundle
from mc_runtime.bench import sweep
from mc_runtime.bench.generation import Generated
from mc_runtime.bench.machine import Monitor
from mc_runtime.bench.reference import (
    KERNEL_SIZE,
    QUIET_SPREAD,
    find_quiet_rounds,
    is_busy,
    kernel_by_round,
)
from mc_runtime.bench.samples import PERCENTILE_METHOD, summarise
from mc_runtime.bench.sweep import Case, Sweep, Timed
from mc_runtime.flops import ModelFlops, count_work
from mc_runtime.options import GenerationOptions
from motioncache import Policy

SCHEMA = "motioncache.latency/v1"
_METHOD = (
    "Times are wall times of calls that wait for their result. A pass is embed, blocks and head of "
    "a chunk for one guidance branch, with the longest prompt.",
    "Operations are those of matrix products, bytes those that have to be moved; of text encoder "
    "and VAE neither is counted.",
    "The first chunk counts from the call with the prompt to its frames; loading comes before. "
    "Frames per second count the whole video, the real-time factor is seconds per second of video.",
    "Memory is this process: anonymous is its own, mapped is of files, weights among them, and can "
    "be dropped by the system.",
)


@dataclass(frozen=True)
class Setup:
    """What is going to be measured, settled before anything is.

    Attributes:
        bundle: That every backend runs.
        options: Of every generation, and the size of the sweep.
        run: What else was asked for; `run` of the report.
        environment: Of `describe_machine`.
        command: The command line.
    """

    bundle: Bundle
    options: GenerationOptions
    run: Mapping[str, Any]
    environment: Mapping[str, Any]
    command: Sequence[str]


@dataclass
class Measured:
    """Everything that was measured, of every backend; filled as it goes.

    Attributes:
        cases: What the sweep times, with the name of the backend.
        sweep: Its times.
        policies: Backend and policy of each runner.
        warmup: First run of each.
        generated: The others.
        notes: What the user was told, such as that a preset is for other steps.
        ended_by: What ended it before its end, in words.
    """

    cases: list[tuple[str, Case]] = field(default_factory=list)
    sweep: Sweep = field(default_factory=Sweep)
    policies: list[tuple[str, str]] = field(default_factory=list)
    warmup: dict[int, Generated] = field(default_factory=dict)
    generated: dict[int, list[Generated]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ended_by: str | None = None

    @property
    def anything(self) -> bool:
        """Whether there is a sample that is no warm-up."""
        return any(self.sweep.samples.values()) or any(self.generated.values())


def describe_policies(policies: Mapping[str, Policy]) -> dict[str, dict[str, Any]]:
    """Write every setting of each policy, and the preset it came from, as plain JSON."""
    described = {}
    for name, policy in policies.items():
        settings = {} if policy.config is None else asdict(policy.config)
        preset = {} if policy.preset is None else {"preset": policy.preset}
        described[name] = json.loads(json.dumps(settings | preset))
    return described


def build_latency_report(setup: Setup, measured: Measured, monitor: Monitor) -> dict[str, Any]:
    """Put together what was measured.

    Args:
        setup: What was asked for.
        measured: The times.
        monitor: Of the whole measurement.

    Returns:
        A report that follows `latency.schema.json`.
    """
    bundle = setup.bundle
    report = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(setup.command),
        "partial": measured.ended_by is not None,
        "bundle": {
            "path": str(bundle.path.absolute()),
            "hash": bundle.model_hash,
            "model": bundle.manifest.model,
        },
        "run": dict(setup.run),
        "settings": asdict(setup.options),
        "environment": dict(setup.environment),
        "telemetry": monitor.to_json(),
        "percentile_method": PERCENTILE_METHOD,
        "reference_kernel": _reference(measured),
        "engines": [
            _describe_case(backend, case, samples, measured.sweep.warmup.get(index, []))
            for index, (backend, case) in enumerate(measured.cases)
            if (samples := measured.sweep.samples.get(index))
        ],
        "generation": [
            _describe_generation(name, index, measured, setup.options, bundle.manifest.config)
            for index, name in enumerate(measured.policies)
            if measured.generated.get(index)
        ],
    }
    return report | {"caveats": _list_caveats(report, measured)}


def _reference(measured: Measured) -> dict[str, Any]:
    """The kernel of the size with fewest quiet rounds; the times of both sizes cannot be mixed."""
    parts = (
        (sweep.KERNEL_SIZE, measured.sweep.samples.values()),
        (KERNEL_SIZE, measured.generated.values()),
    )
    described = [
        {
            "size": size,
            "median_ms": float(np.median(by_round)),
            "quiet_rounds": len(find_quiet_rounds(by_round)) / len(by_round),
            "busy": is_busy(by_round),
        }
        for size, samples in parts
        if (by_round := kernel_by_round([[one.reference_ms for one in each] for each in samples]))
    ]
    nothing = {"size": None, "median_ms": None, "quiet_rounds": None, "busy": False}
    least = min(described, key=lambda kernel: kernel["quiet_rounds"], default=nothing)
    return {**least, "limit": QUIET_SPREAD}


def _describe_case(
    backend: str, case: Case, timed: Sequence[Timed], warmup: Sequence[Timed]
) -> dict[str, Any]:
    samples = [each.taken_ms for each in timed]
    latency, cost = summarise(samples), case.cost
    entry: dict[str, Any] = {
        "name": case.name,
        "backend": backend,
        "component": case.component,
        "tokens": case.tokens,
        "keys": case.keys,
        "warmup_ms": [each.taken_ms for each in warmup],
        "samples_ms": samples,
        "reference_ms": [each.reference_ms for each in timed],
        "latency_ms": latency,
        "cost": None,
    }
    if cost is not None:
        seconds = latency["p50"] / 1e3
        flops = cost.flops + cost.attention
        entry["cost"] = {
            "flops": flops,
            "bytes": cost.bytes,
            "copied_bytes": cost.copied,
            "flops_per_s": flops / seconds,
            "bytes_per_s": cost.bytes / seconds,
        }
    return entry


def _describe_generation(
    name: tuple[str, str],
    index: int,
    measured: Measured,
    options: GenerationOptions,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    runs = measured.generated[index]
    trace = runs[0].trace
    flops = ModelFlops.from_manifest(config["transformer"])
    done = count_work(flops, trace, padded=True).total
    asked = count_work(flops, trace, padded=False).total
    decided = (trace.recompute >= 0).sum()
    totals = [run.total_ms for run in runs]
    seconds = summarise(totals)["p50"] / 1e3
    warmup = measured.warmup.get(index)
    between = [gap for run in runs for gap in run.inter_chunk_ms]
    return {
        "backend": name[0],
        "policy": name[1],
        "warmup_ms": None if warmup is None else warmup.total_ms,
        "samples_ms": totals,
        "reference_ms": [run.reference_ms for run in runs],
        "total_ms": summarise(totals),
        "first_chunk_ms": summarise([run.first_chunk_ms for run in runs]),
        "inter_chunk_ms": summarise(between) if between else None,
        "chunks_ms": [[run.first_chunk_ms, *run.inter_chunk_ms] for run in runs],
        "decode_share": sum(run.decode_ms for run in runs) / sum(totals),
        "frames_per_second": options.num_frames / seconds,
        "realtime_factor": seconds * options.fps / options.num_frames,
        "reuse_ratio": float((trace.recompute == 0).sum() / decided),
        "padding_waste": 1 - asked / done,
        "flops": done,
        "peak_bytes": _join_peaks(runs),
    }


def _join_peaks(runs: Sequence[Generated]) -> dict[str, int]:
    """The largest of every kind that any run has: a short one may not have been asked of all."""
    kinds = dict.fromkeys(kind for run in runs for kind in run.peaks)
    return {kind: max(run.peaks.get(kind, 0) for run in runs) for kind in kinds}


def _list_caveats(report: Mapping[str, Any], measured: Measured) -> list[str]:
    """What a reader has to know before believing a number."""
    caveats = [*_METHOD, *measured.notes]
    kernel, throttling = report["reference_kernel"], report["telemetry"]["throttling"]
    if measured.ended_by is not None:
        caveats.append(
            f"Partial: ended by {measured.ended_by}; what is here may have fewer samples than was "
            "asked for, and something may be missing."
        )
    if kernel["busy"]:
        caveats.append(
            f"In {1 - kernel['quiet_rounds']:.0%} of the rounds the reference kernel took over "
            f"{QUIET_SPREAD} times as long as in the fastest: the machine is busy with something "
            "else."
        )
    if report["generation"] and len(measured.policies) > 1:
        caveats.append(
            "Policies and backends share the process: what one has left in memory is in the peaks "
            "of the others. Run each alone to compare memory."
        )
    if any(None in entry["reference_ms"] for entry in report["engines"] + report["generation"]):
        caveats.append("Times on a GPU have no reference: the kernel is a product of the CPU.")
    if throttling is None:
        caveats.append("Whether the GPU lowered its clocks is not known: its driver does not tell.")
    elif throttling:
        caveats.append(f"The GPU's clocks were lower than asked for: {', '.join(throttling)}.")
    if any(len(entry["samples_ms"]) < 20 for entry in report["engines"]):
        caveats.append("Fewer than 20 samples of an engine: p95 and p99 say little.")
    return caveats
