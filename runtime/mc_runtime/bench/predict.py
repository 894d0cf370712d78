"""What a generation would take on a device that is not here: a model, and it says so.

`describe_model` reads a bundle or a published configuration, `predict` walks the schedule over the
roofline and plans the memory. Neighbours: `mc-bench predict` asks and prints.
"""

__all__ = [
    "DTYPES",
    "MODEL_NOTE",
    "Efficiency",
    "Model",
    "Request",
    "choose_dtype",
    "describe_model",
    "predict",
]

from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from mc_engines.bundle import Bundle
from mc_engines.errors import require
from mc_engines.published import PUBLISHED
from mc_engines.run_sizes import TEXT_TOKENS, RunSizes, WindowShape, plan_run_sizes
from mc_runtime.bench.devices import THIS_CPU, Device, find_device
from mc_runtime.bench.reference import measure_rates
from mc_runtime.bench.roofline import EngineCosts, Limits, RunTime, Schedule, predict_run
from mc_runtime.flops import Job, ModelFlops, vanilla_work
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.run_plan import RunPlan, plan_run
from mc_runtime.schedule import LatentGrid, validate_options
from motioncache import DecisionTrace

SCHEMA = "motioncache.prediction/v1"
MODEL_NOTE = (
    "A model, not a measurement. Every call of an engine takes as long as its operations or its "
    "bytes, whichever is longer; nothing overlaps, nothing waits, and a launch costs nothing, so "
    "small models look too fast. Text encoder, VAE, sampler and what crosses to the host are not "
    "in it."
)
USABLE = 0.95  # of a memory; the rest is the driver's and other programs', assumed
# Bytes of a weight, bytes of an activation, the type in which activations are multiplied.
DTYPES = {
    "fp32": (4, 4, "fp32"),
    "bf16": (2, 2, "bf16"),
    "fp16": (2, 2, "fp16"),
    "fp8": (1, 2, "bf16"),
}


@dataclass(frozen=True)
class Efficiency:
    """What share of a device's rates the estimate counts on.

    Attributes:
        flops: Of matrix products. The cached runs published for SkyReels-V2 on an A800 reach 0.39
            to 0.44 of its rate.
        bandwidth: Of memory; assumed.
    """

    flops: float = 0.40
    bandwidth: float = 0.75


@dataclass(frozen=True)
class Model:
    """What of a model a prediction needs.

    Attributes:
        name: Of the bundle's folder or the published configuration.
        flops: Operations of its parts.
        heads: Of its attention.
        grid: Pixels per latent and latents per token.
        defaults: Of a generation.
    """

    name: str
    flops: ModelFlops
    heads: int
    grid: LatentGrid
    defaults: GenerationOptions


@dataclass(frozen=True)
class Request:
    """What is to be predicted.

    Attributes:
        options: Of the generation, checked.
        device: Name of the device.
        dtype: Of the engines, a key of `DTYPES`; fp8 means weights in FP8 beside bf16.
        computed: Share of the tokens that steps compute; None where a trace says it.
        trace: Of a run whose decisions are taken.
        efficiency: Of the estimate.
    """

    options: GenerationOptions
    device: str
    dtype: str
    computed: float | None = None
    trace: DecisionTrace | None = None
    efficiency: Efficiency = Efficiency()


def describe_model(name: str) -> Model:
    """Read what is known of a model.

    Args:
        name: Folder of a bundle, or a published configuration such as skyreels-df-1.3b-540p.

    Returns:
        The model.

    Raises:
        BundleError: The bundle is damaged.
        ValueError: There is neither a folder nor a configuration of that name.
    """
    published = PUBLISHED.get(name)
    if published is None:
        if not Path(name).is_dir():
            raise ValueError(
                f"{name}: expected a bundle or one of {', '.join(PUBLISHED)}, got neither. "
                "Pass the folder that mc-export wrote, or one of these names."
            )
        pipeline = VideoPipeline(Bundle.open(name))
        config = pipeline.bundle.manifest.config["transformer"]
        flops = ModelFlops.from_manifest(config)
        return Model(name, flops, config["heads"], pipeline.grid, pipeline.default_options)
    config = published.transformer
    return Model(
        name,
        ModelFlops.from_published(config),
        config["num_attention_heads"],
        LatentGrid(spatial_factor=published.spatial_factor, patch_size=config["patch_size"]),
        GenerationOptions(height=published.height, width=published.width),
    )


def predict(model: Model, request: Request) -> dict[str, Any]:
    """Predict the time and the memory of a generation.

    Args:
        model: Of `describe_model`.
        request: What is to be generated, and where.

    Returns:
        A report that follows `prediction.schema.json`.

    Raises:
        ValueError: An unknown device, a dtype it has no unit for, or sizes that cannot be generated
            or are not those of the trace.
    """
    device = _find(request.device)
    rate, attention = _rates(request.device, device, request.dtype)
    validate_options(request.options, 0, model.grid)
    plan = plan_run(request.options, 0, model.grid)
    weight_bytes, value_bytes, _ = DTYPES[request.dtype]
    slots = plan.shape.tokens * plan.shape.active.shape[1]
    costs = EngineCosts(model.flops, slots, weight_bytes, value_bytes)
    limits = Limits(rate, attention, device.bandwidth, *astuple(request.efficiency))
    schedule = _schedule(plan, request)
    none = Schedule.of_plan(plan, schedule.text_tokens)
    run, uncached = (predict_run(costs, each, limits) for each in (schedule, none))
    return {
        "schema": SCHEMA,
        "note": MODEL_NOTE,
        "model": model.name,
        "device": {"name": request.device, "title": device.title, "source": device.source},
        "dtype": request.dtype,
        "rates": {"flops": rate, "attention_flops": attention, "bandwidth": device.bandwidth},
        "efficiency": asdict(request.efficiency),
        "settings": asdict(request.options),
        "computed_share": _computed(schedule, none),
        "time": {
            "policy": _time(run),
            "none": _time(uncached),
            "vanilla": _vanilla(plan, costs, limits),
        },
        "work": asdict(run.total) | {"bytes": run.total.bytes},
        "frames_per_second": request.options.num_frames / run.seconds[1],
        "memory": _memory(model, request, plan, costs, device),
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


def _schedule(plan: RunPlan, request: Request) -> Schedule:
    """The passes of a trace at these sizes, or of a run that computes a share of every step."""
    if request.trace is None:
        text = (TEXT_TOKENS,) * plan.shape.branches
        computed = 1.0 if request.computed is None else request.computed
        return Schedule.of_plan(plan, text, computed)
    recorded = Schedule.of_trace(request.trace)
    expected = (len(plan.shape.active), plan.shape.branches, plan.shape.active.shape[1])
    if recorded.mode.shape != expected:
        raise ValueError(
            f"trace: expected {' x '.join(map(str, expected))} rows, branches and chunks, got "
            f"{' x '.join(map(str, recorded.mode.shape))}. Pass the frames, steps and guidance of "
            "the run it is of."
        )
    return recorded.resize(plan.shape.tokens)


def _computed(schedule: Schedule, none: Schedule) -> float:
    return float(schedule.tokens.sum() / none.tokens.sum())


def _time(run: RunTime) -> dict[str, dict[str, float]]:
    """Seconds by name: bound and estimate."""
    pairs = {"total": run.seconds, "first_chunk": run.first_chunk}
    return {name: _both(*seconds) for name, seconds in pairs.items()}


def _both(bound: float, estimate: float) -> dict[str, float]:
    return {"bound": float(bound), "estimate": float(estimate)}


def _vanilla(plan: RunPlan, costs: EngineCosts, limits: Limits) -> dict[str, dict[str, float]]:
    """Every chunk in every row, as diffusers runs: by operations alone, in 16 bit or float32."""
    text = (TEXT_TOKENS,) * plan.shape.branches
    seconds = vanilla_work(costs.flops, Job.from_plan(plan, text)).total / limits.attention
    return {"total": _both(seconds, seconds / limits.flops_efficiency)}


def _memory(
    model: Model, request: Request, plan: RunPlan, costs: EngineCosts, device: Device
) -> dict[str, Any]:
    """What has to lie in the device's memory, whether it fits, and what would make it fit."""
    chunks = plan.shape.active.shape[1]
    here = _plan_memory(model, costs, plan.shape.tokens, chunks, plan.shape.branches)
    fits = here.peak <= USABLE * device.memory
    return {
        "capacity": device.memory,
        "usable_share": USABLE,
        "shared_with_host": device.shared_memory,
        "fits": fits,
        "peak": here.peak,
        "weights": here.weights,
        "kv_cache": here.kv,
        "prompt_keys": here.context,
        "residuals": here.residual,
        "activations": here.pass_fused,
        "ways_to_fit": [] if fits else _ways_to_fit(model, request, plan, costs, device),
    }


def _plan_memory(
    model: Model,
    costs: EngineCosts,
    chunk_tokens: int,
    chunks: int,
    branches: int,
    streamed: bool = False,
) -> RunSizes:
    """The memory of a run; streamed weights are those of two layers."""
    f, weights = costs.flops, costs.transformer_bytes
    shape = WindowShape(
        f.layers, model.heads, f.dim, f.ffn_dim, chunk_tokens, chunk_tokens * chunks, branches
    )
    if streamed:
        weights = 2 * costs.block(0, 0, 0).weights
    return plan_run_sizes(
        shape, value_bytes=costs.value_bytes, weights=weights, decode=0, fused=True
    )


def _ways_to_fit(
    model: Model, request: Request, plan: RunPlan, costs: EngineCosts, device: Device
) -> list[dict[str, Any]]:
    """Changes after which a run fits, the mildest first; at most three."""
    chunks, branches = plan.shape.active.shape[1], plan.shape.branches
    streaming = "streamed weights (--max-vram)"
    changes = [(streaming, chunks, branches, True)]
    if branches > 1:
        changes.append(("no guidance (--guidance-scale 1)", chunks, 1, False))
    for fewer in range(chunks - 1, 1, -1):
        latents = fewer * request.options.causal_block_size
        frames = (latents - 1) * model.grid.temporal_factor + 1
        shorter = f"shorter windows (--base-num-frames {frames})"
        changes.append((shorter, fewer, branches, False))
        changes.append((f"{shorter} and {streaming}", fewer, branches, True))
    peaks = {
        text: _plan_memory(model, costs, plan.shape.tokens, count, kept, streamed).peak
        for text, count, kept, streamed in changes
    }
    most = USABLE * device.memory
    fitting = [{"change": text, "peak": peak} for text, peak in peaks.items() if peak <= most]
    return fitting[:3]
