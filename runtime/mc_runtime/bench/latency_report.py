"""What `mc-bench run --engines` and `--generation` measured, ready for JSON.

`latency.schema.json` describes it. Neighbours: `sweep` and `generation` measure, `latency_page`
shows the report, `compare` holds two of them against each other.
"""

__all__ = ["Backend", "Measured", "build_latency_report"]

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mc_runtime.bench.generation import Generated
from mc_runtime.bench.machine import Monitor, describe_machine
from mc_runtime.bench.reference import BUSY_SPREAD
from mc_runtime.bench.samples import PERCENTILE_METHOD, summarise
from mc_runtime.bench.sweep import Case, Sweep
from mc_runtime.flops import ModelFlops, count_work
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline

SCHEMA = "motioncache.latency/v1"
_METHOD = (
    "Times are wall times of calls that wait for their result. A pass is embed, blocks and head of "
    "a chunk for one guidance branch.",
    "Operations are those of matrix products, bytes those that have to be moved; of text encoder "
    "and VAE neither is counted.",
    "The first chunk counts from the call with the prompt to its frames; loading is the warm-up's. "
    "Frames per second count the whole video, the real-time factor is seconds per second of video.",
    "Memory is this process: anonymous is its own, mapped is of files, weights among them, and can "
    "be dropped by the system.",
)


@dataclass(frozen=True)
class Backend:
    """A pipeline under the name of its backend."""

    name: str
    pipeline: VideoPipeline


@dataclass
class Measured:
    """Everything that was measured, of every backend; filled as it goes.

    Attributes:
        cases: What the sweep times, with the name of the backend.
        sweep: Its times.
        policies: Backend and policy of each runner.
        warmup: First run of each.
        generated: The others.
        partial: Whether an interrupt ended it.
    """

    cases: list[tuple[str, Case]] = field(default_factory=list)
    sweep: Sweep = field(default_factory=Sweep)
    policies: list[tuple[str, str]] = field(default_factory=list)
    warmup: dict[int, Generated] = field(default_factory=dict)
    generated: dict[int, list[Generated]] = field(default_factory=dict)
    partial: bool = False


def build_latency_report(
    backends: Sequence[Backend],
    options: GenerationOptions,
    measured: Measured,
    monitor: Monitor,
    command: Sequence[str],
) -> dict[str, Any]:
    """Put together what was measured.

    Args:
        backends: What ran; all of one bundle.
        options: Of every generation, and the size of the sweep.
        measured: The times.
        monitor: Of the whole measurement.
        command: The command line.

    Returns:
        A report that follows `latency.schema.json`.
    """
    pipeline = backends[0].pipeline
    bundle = pipeline.bundle
    reference = _reference(measured)
    report = {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "partial": measured.partial,
        "bundle": {
            "path": str(bundle.path.absolute()),
            "hash": bundle.model_hash,
            "model": bundle.manifest.model,
        },
        "settings": asdict(options),
        "environment": describe_machine(pipeline.threads),
        "telemetry": monitor.to_json(),
        "percentile_method": PERCENTILE_METHOD,
        "reference_kernel": reference,
        "engines": [
            _describe_case(backend, case, index, measured.sweep)
            for index, (backend, case) in enumerate(measured.cases)
            if measured.sweep.samples.get(index)
        ],
        "generation": [
            _describe_generation(name, index, measured, options, bundle.manifest.config)
            for index, name in enumerate(measured.policies)
            if measured.generated.get(index)
        ],
    }
    return report | {"caveats": _list_caveats(report)}


def _reference(measured: Measured) -> dict[str, Any]:
    samples = [value for values in measured.sweep.reference.values() for value in values]
    samples += [each.reference_ms for runs in measured.generated.values() for each in runs]
    if not samples:
        return {"median_ms": None, "spread": None, "limit": BUSY_SPREAD, "busy": False}
    summary = summarise(samples)
    # One hiccup among hundreds of samples is no busy machine: the slowest tenth is left out.
    spread = summary["p90"] / summary["min"]
    return {
        "median_ms": summary["p50"],
        "spread": spread,
        "limit": BUSY_SPREAD,
        "busy": spread > BUSY_SPREAD,
    }


def _describe_case(backend: str, case: Case, index: int, sweep: Sweep) -> dict[str, Any]:
    samples = sweep.samples[index]
    latency, cost = summarise(samples), case.cost
    entry: dict[str, Any] = {
        "name": case.name,
        "backend": backend,
        "component": case.component,
        "tokens": case.tokens,
        "keys": case.keys,
        "warmup_ms": sweep.warmup.get(index, []),
        "samples_ms": samples,
        "reference_ms": sweep.reference[index],
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
        "peak_bytes": {kind: max(run.peaks[kind] for run in runs) for kind in runs[0].peaks},
    }


def _list_caveats(report: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before believing a number."""
    caveats = list(_METHOD)
    kernel = report["reference_kernel"]
    if report["partial"]:
        caveats.append("Partial: the measurement was interrupted; some cases have fewer samples.")
    if kernel["busy"]:
        caveats.append(
            f"The reference kernel varied by {kernel['spread']:.2f}, more than {BUSY_SPREAD}: the "
            "machine is busy with something else. Compare ratios to it alone."
        )
    if report["telemetry"]["throttling"]:
        reasons = ", ".join(report["telemetry"]["throttling"])
        caveats.append(f"The GPU's clocks were lower than asked for: {reasons}.")
    if any(len(entry["samples_ms"]) < 20 for entry in report["engines"]):
        caveats.append("Fewer than 20 samples of an engine: p95 and p99 say little.")
    return caveats
