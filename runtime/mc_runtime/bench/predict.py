"""What a generation would take on a device that is not here: a model, and it says so.

`predict` walks the schedule over the roofline. Neighbours: `predicted_model` reads a bundle or a
published configuration, `memory_plan` says what lies in memory, `mc-bench predict` asks and prints.
"""

__all__ = [
    "MODEL_NOTE",
    "Efficiency",
    "Request",
    "choose_dtype",
    "predict",
]

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import Any

import numpy as np

from mc_engines.errors import require
from mc_runtime.bench.devices import THIS_CPU, Device, find_device
from mc_runtime.bench.host_plan import HostPlan, plan_host
from mc_runtime.bench.memory_plan import (
    DTYPES,
    USABLE,
    MemoryPlan,
    Plan,
    find_ways_to_fit,
    plan_memory,
    write_flag,
)
from mc_runtime.bench.predicted_model import Model
from mc_runtime.bench.reference import measure_rates
from mc_runtime.bench.roofline import (
    EngineCosts,
    Limits,
    RunTime,
    Schedule,
    find_steps,
    predict_run,
)
from mc_runtime.run_plan import RunPlan
from motioncache import DecisionTrace

SCHEMA = "motioncache.prediction/v1"
MODEL_NOTE = (
    "A model, not a measurement. Every call of an engine takes as long as its operations or its "
    "bytes, whichever is longer; nothing overlaps, nothing waits, and a launch costs nothing, so "
    "small models look too fast. The time of text encoder, VAE, sampler and of copies is not in it."
)
ON_THIS_CPU = f"mc-bench predict --device {THIS_CPU}"
# Settings of any family that decide when which chunk takes a step, and in which branches.
_SCHEDULE = (
    *("num_frames", "num_inference_steps", "guidance_scale", "ar_step"),
    *("causal_block_size", "base_num_frames", "overlap_history", "nearly_clean"),
)
_RECORDED = "windows", "options", "text_tokens"  # what a trace has to say of its run


@dataclass(frozen=True)
class Efficiency:
    """What share of a device's rates the estimate counts on.

    Attributes:
        flops: Of matrix products. Published PFLOPs over published seconds, for SkyReels-V2 DF-1.3B
            at 540P on an A800, are 0.39 to 0.40 of its rate in the cached runs of MotionCache's
            table 1, and 0.39 and 0.44 in FlowCache's. Uncached, with the operations that such a run
            takes, it is 0.34. Nothing was measured on another device.
        bandwidth: Of memory; assumed, measured nowhere.
    """

    flops: float = 0.40
    bandwidth: float = 0.75


@dataclass(frozen=True)
class Request:
    """What is to be predicted.

    Attributes:
        options: Of the generation, of the kind that the model's family has.
        device: Name of the device.
        dtype: Of the engines, a key of `DTYPES`; fp8 means weights in FP8 beside bf16.
        computed: Share of the tokens that steps compute; None where a trace says it.
        trace: Of a run whose decisions are taken.
        efficiency: Of the estimate.
    """

    options: Any
    device: str
    dtype: str
    computed: float | None = None
    trace: DecisionTrace | None = None
    efficiency: Efficiency = Efficiency()


def predict(model: Model, request: Request) -> dict[str, Any]:
    """Predict the time and the memory of a generation.

    Args:
        model: Of `describe_model`.
        request: What is to be generated, and where.

    Returns:
        A report that follows `prediction.schema.json`.

    Raises:
        ValueError: An unknown device, or one that the model's family is not predicted for; a dtype
            it has no unit for; sizes that cannot be generated or are not those of the trace.
    """
    if request.device == THIS_CPU:
        model.family.require(ON_THIS_CPU)
    device = _find(request.device)
    rate, attention = _rates(request.device, device, request.dtype)
    prefix = 0 if request.trace is None else _read_prefix(request.trace, request.options)
    plan = model.plan(request.options, prefix)
    weight_bytes, value_bytes, _ = DTYPES[request.dtype]
    costs = EngineCosts(model.flops, 0, weight_bytes, value_bytes)
    limits = Limits(rate, attention, device.bandwidth, *astuple(request.efficiency))
    schedule, none = _schedules(model, plan, request)
    run, uncached = (predict_run(costs, each, limits) for each in (schedule, none))
    texts = schedule.sight.encoded
    return {
        "schema": SCHEMA,
        "note": MODEL_NOTE,
        "model": model.name,
        "device": {"name": request.device, "title": device.title, "source": device.source},
        "dtype": request.dtype,
        "rates": {"flops": rate, "attention_flops": attention, "bandwidth": device.bandwidth},
        "efficiency": asdict(request.efficiency),
        "settings": asdict(request.options),
        "text_tokens": list(texts),
        "computed_share": _computed(schedule, none),
        "time": {
            "policy": _time(run),
            "none": _time(uncached),
            "vanilla": _vanilla(model, plan, texts, limits),
        },
        "work": asdict(run.total) | {"bytes": run.total.bytes},
        "frames_per_second": request.options.num_frames / run.seconds[1],
        "memory": _memory(model, request, prefix, device),
    }


def choose_dtype(device: str) -> str:
    """Return the type that a device is mostly used with: bf16, or fp32 on a CPU."""
    return "fp32" if device == THIS_CPU else "bf16"


def _find(name: str) -> Device:
    """A device of the table, or this CPU as measured now."""
    if name != THIS_CPU:
        return find_device(name)
    flops, bandwidth = measure_rates()
    memory = require("psutil", "bench").virtual_memory().total
    return Device("this CPU", {"fp32": flops}, bandwidth, memory, "measured now", True)


def _rates(name: str, device: Device, dtype: str) -> tuple[float, float]:
    """Operations per second of products with weights, and of those of activations."""
    for needed in (dtype, DTYPES[dtype][2]):
        if needed not in device.flops:
            raise ValueError(
                f"dtype: expected one of {', '.join(device.flops)} for {name}, got {dtype}. "
                "Pass --dtype with one that the device computes in."
            )
    return device.flops[dtype], device.flops[DTYPES[dtype][2]]


def _schedules(model: Model, plan: RunPlan, request: Request) -> tuple[Schedule, Schedule]:
    """Lay out the passes that are asked for, and those of the same run with nothing skipped.

    Returns:
        The passes of a trace at these sizes, or with a share of every step; those of `none`. Texts,
        and what the passes see, are those of the trace where there is one.
    """
    trace, options = request.trace, request.options
    if trace is None:
        computed = 1.0 if request.computed is None else request.computed
        return model.lay_out(options, plan, computed), model.lay_out(options, plan)
    _check_trace(trace, plan, options)
    recorded = Schedule.of_trace(trace, model.slots(options, plan)).resize(plan.shape.tokens)
    return recorded, model.lay_out(options, plan, run=trace.run)


def _read_prefix(trace: DecisionTrace, options: Any) -> int:
    """Read from a trace which video its run continued.

    Returns:
        Latent frames of it, 0 without one.

    Raises:
        ValueError: The trace does not say what its run was, the run was interrupted, or it is of
            another family.
    """
    missing = [name for name in _RECORDED if name not in trace.run]
    if missing or trace.run.get("interrupted"):
        lack = f"without {', '.join(missing)}" if missing else "of an interrupted one"
        raise ValueError(
            f"trace: expected that of a whole run, got one {lack}. "
            "Pass a file that mc-generate --trace wrote."
        )
    strange = [name for name in trace.run["options"] if name not in asdict(options)]
    if strange:
        raise ValueError(
            "trace: expected that of a run of the model's family, got one with the settings "
            f"{', '.join(strange)}, which this family does not have. Pass a trace of this model."
        )
    return int(trace.run["windows"][0]["prefix"])


def _check_trace(trace: DecisionTrace, plan: RunPlan, options: Any) -> None:
    """Hold what was recorded against what is asked for: the same chunks take the same steps.

    Raises:
        ValueError: With the settings that differ.
    """
    shape = plan.shape
    branches = trace.mode.shape[1]
    if (
        trace.run["windows"] == [asdict(window) for window in plan.windows]
        and branches == shape.branches
        and np.array_equal(find_steps(trace), shape.active)
    ):
        return
    asked, recorded = asdict(options), trace.run["options"]
    others = [name for name in _SCHEDULE if name in asked and recorded.get(name) != asked[name]]
    if branches != shape.branches and not others:
        raise ValueError(
            f"trace: expected a run with {shape.branches} passes of guidance, got one with "
            f"{branches}. Pass a trace of this model."
        )
    flags = " ".join(write_flag(name, recorded.get(name)) for name in others)
    raise ValueError(
        f"trace: expected a run with {_list_settings(asked, others)}, got one with "
        f"{_list_settings(recorded, others)}. Pass {flags or 'the settings of the run'}."
    )


def _list_settings(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {settings.get(name)}" for name in names) or "other steps"


def _computed(schedule: Schedule, none: Schedule) -> float:
    return float(schedule.tokens.sum() / none.tokens.sum())


def _time(run: RunTime) -> dict[str, dict[str, float]]:
    """Seconds by name: bound and estimate."""
    pairs = {"total": run.seconds, "first_chunk": run.first_chunk}
    return {name: _both(*seconds) for name, seconds in pairs.items()}


def _both(bound: float, estimate: float) -> dict[str, float]:
    return {"bound": float(bound), "estimate": float(estimate)}


def _vanilla(
    model: Model, plan: RunPlan, text_tokens: Sequence[int], limits: Limits
) -> dict[str, dict[str, float]] | None:
    """What the original loop takes, by operations alone, in 16 bit or float32."""
    if model.family.vanilla is None:
        return None
    work = model.family.vanilla(model.flops, plan, text_tokens)
    seconds = work.total / limits.attention
    return {"total": _both(seconds, seconds / limits.flops_efficiency)}


def _memory(model: Model, request: Request, prefix: int, device: Device) -> dict[str, Any]:
    """What has to lie in the device's memory, whether it fits, and what would make it fit."""
    options, dtype = request.options, request.dtype
    plan: Plan
    if request.device == THIS_CPU:
        plan_again = partial(plan_host, model, prefix=prefix)
        plan = held = plan_again(options)
        parts = _host_parts(held)
    else:
        plan_again = None
        plan = planned = plan_memory(model, options, dtype, prefix=prefix)
        parts = _device_parts(planned)
    fits = plan.fits(device)
    ways = [] if fits else find_ways_to_fit(model, options, dtype, device, prefix, plan_again)
    return {
        "capacity": device.memory,
        "usable_share": USABLE,
        "shared_with_host": device.shared_memory,
        "fits": fits,
        "peak": plan.peak,
        **parts,
        "ways_to_fit": [asdict(way) for way in ways],
    }


def _device_parts(plan: MemoryPlan) -> dict[str, Any]:
    sizes = plan.transformer
    return {
        "weights": sizes.weights,
        "kv_cache": sizes.kv,
        "prompt_keys": sizes.context,
        "residuals": sizes.residual,
        "activations": sizes.pass_fused,
        "text_encoder": plan.text_encoder,
        "vae": plan.vae,
        "left_out": _list_left_out(plan),
        "host": None,
    }


def _host_parts(plan: HostPlan) -> dict[str, Any]:
    """The same of a run on this CPU; what the process holds anyway stands beside it."""
    held = plan.anonymous
    told = {"text encoder": plan.encoding is not None, "VAE": plan.decodes}
    return {
        "weights": held["weights"] + held["graph_weights"],
        **{part: held[part] for part in ("kv_cache", "prompt_keys", "residuals", "activations")},
        "text_encoder": plan.encoding,
        "vae": held["decoder"] + held["frames"] if plan.decodes else None,
        "left_out": [*(part for part, known in told.items() if not known), "writing of the video"],
        "host": {"anonymous": {**held}, "mapped": {**plan.mapped}},
    }


def _list_left_out(plan: MemoryPlan) -> list[str]:
    """What the plan has no size of."""
    left = ["text encoder"] if plan.text_encoder is None else ["activations of the text encoder"]
    return [*left, "VAE" if plan.vae is None else "activations of the VAE"]
