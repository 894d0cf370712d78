"""Check what cannot be checked without a GPU: engines against ONNX Runtime, and a generation.

`scripts/gpu-check BUNDLE` runs this. It builds engines for the GPU that is here. A short generation
on the CPU is recorded, call by call; every engine is then given the same inputs. Whatever fails is
put down in the report, which also says what was not checked. The bundle needs a text encoder and a
VAE.
"""

__all__ = ["Call", "Comparison", "check", "choose_backend", "compare_engines", "record_calls"]

import argparse
import json
import math
import shlex
import subprocess
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mc_engines.building.library import BACKENDS, Backend, open_library
from mc_engines.building.store import EngineStore
from mc_engines.bundle import Bundle
from mc_engines.device.cuda import open_gpu
from mc_engines.device.device import Device
from mc_engines.device.opening import DeviceOptions
from mc_engines.device.runner import DeviceRunner
from mc_engines.engine_choice import Place, usual_form
from mc_engines.errors import McError
from mc_engines.onnxruntime_runner import open_runner
from mc_engines.parity_report import allowed_error
from mc_engines.runner import Arrays, Runner
from mc_engines.specs import GraphSpec
from mc_runtime.doctor import examine
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.transformer import Transformer

# Largest error that is allowed, relative to the largest value of an output: eight roundings of the
# type, but for float32, whose matrix products may use TF32.
TOLERANCE = {"fp32": 5e-3, "fp16": 5e-3, "bf16": 4e-2}
# Largest root mean square of the difference of latents, relative to that of the latents, that is
# allowed: what a pass errs adds up over the steps, and guidance multiplies it.
LATENTS_TOLERANCE = {form: 5 * each for form, each in TOLERANCE.items()}
_KEPT = 6  # calls of a component that are compared
_PROMPT = "a big red circle drifts left over sand"


@dataclass(frozen=True)
class Call:
    """One call of a component on the CPU."""

    inputs: Mapping[str, Any]
    weights: Mapping[str, Any] | None
    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """An engine against ONNX Runtime; `error` is relative to the largest value of an output.

    `error` is None where nothing could be compared: `failure` says what happened, if anything did.
    """

    component: str
    calls: int
    error: float | None
    tolerance: float
    failure: str | None = None

    @property
    def is_good(self) -> bool:
        """Whether it was compared, and agrees."""
        return self.failure is None and self.error is not None and self.error <= self.tolerance


class _Recorder:
    """A runner that keeps its first call in each of the first few combinations of shapes."""

    def __init__(self, runner: Runner, calls: list[Call]) -> None:
        self._runner, self._calls, self._shapes = runner, calls, set()

    @property
    def graph(self) -> GraphSpec:
        return self._runner.graph

    def run(self, inputs: Arrays, weights: Arrays | None = None) -> dict[str, Any]:
        outputs = self._runner.run(inputs, weights)
        shapes = tuple((name, array.shape) for name, array in inputs.items())
        if len(self._calls) < _KEPT and shapes not in self._shapes:
            self._shapes.add(shapes)
            copies = {name: np.array(array) for name, array in inputs.items()}
            self._calls.append(Call(copies, weights, dict(outputs)))
        return outputs


def record_calls(bundle: Bundle, options: GenerationOptions, policy: str) -> dict[str, list[Call]]:
    """Generate on the CPU and keep calls of every component.

    Partial passes are padded up to the bundle's buckets, as engines take them. What such a run does
    not call, `combine`, `motion` and the VAE's encoder, is given inputs of its own.
    """
    calls: dict[str, list[Call]] = defaultdict(list)

    class Recorded(VideoPipeline):
        def _open(self, component: str, form: str = "fp32") -> Runner:
            return _Recorder(super()._open(component, form), calls[component])

        @property
        def transformer(self) -> Transformer:
            plain = super().transformer
            runners = {name: _Recorder(each, calls[name]) for name, each in plain.runners.items()}
            buckets = plain.config.token_buckets
            return replace(plain, runners=runners, fused_block=runners["block"], buckets=buckets)

    pipeline = Recorded(bundle)
    pipeline.run(_PROMPT, policy=policy, options=options)
    if "vae_encoder_next" in bundle.manifest.components:
        size = options.overlap_history, options.height, options.width, 3
        pipeline.encoder.encode(np.random.default_rng(0).integers(0, 255, size, np.uint8))
    tokens = max(call.inputs["patches"].shape[1] for call in calls["embed"])
    for count in dict.fromkeys(call.inputs["x"].shape[1] for call in calls["block"]):
        calls["combine"].append(_call(bundle, "combine", _draw_combine(bundle, tokens, count)))
    if not calls["motion"]:
        calls["motion"].append(_call(bundle, "motion", _draw_motion(bundle, tokens, options)))
    return calls


def _call(bundle: Bundle, component: str, inputs: Mapping[str, Any]) -> Call:
    return Call(inputs, None, open_runner(bundle, component).run(inputs))


def _draw_combine(bundle: Bundle, tokens: int, count: int) -> dict[str, Any]:
    """Inputs of `combine`: of L rows K are new, as many as a pass of the blocks had."""
    rng, dim = np.random.default_rng(count), bundle.manifest.config["transformer"]["dim"]
    rows = np.sort(rng.permutation(tokens)[:count]).astype(np.int32)
    row_map = np.arange(tokens, dtype=np.int32)
    row_map[rows] = tokens + np.arange(count, dtype=np.int32)
    drawn = {
        name: rng.standard_normal((1, size, dim), np.float32)
        for name, size in (("x", tokens), ("residual", tokens), ("y", count))
    }
    return {**drawn, "rows": rows, "row_map": row_map}


def _draw_motion(bundle: Bundle, tokens: int, options: GenerationOptions) -> dict[str, Any]:
    """Inputs of `motion`: the frames of a chunk, and the frame before."""
    rng, dim = np.random.default_rng(0), bundle.manifest.config["transformer"]["dim"]
    frames = options.causal_block_size
    shape = 1, frames, tokens // frames, dim
    out, previous = (rng.standard_normal(size, np.float32) for size in (shape, shape[1:]))
    return {"out": out, "previous": previous[:1]}


def choose_tolerance(bundle: Bundle, component: str, form: str) -> float:
    """What an engine may err: that of its type, or what its graph may, which is deeper in a VAE."""
    return max(TOLERANCE[form], allowed_error(bundle, component, form))


def compare_engines(
    device: Device, tolerances: Mapping[str, float], calls: Mapping[str, list[Call]]
) -> list[Comparison]:
    """Give every engine the inputs of the recorded calls; one that fails does not end it."""
    comparisons = []
    for name in device.engines:
        try:
            comparisons.append(_compare(device, tolerances[name], name, calls.get(name, [])))
        except (McError, ValueError) as error:
            comparisons.append(Comparison(name, 0, None, tolerances[name], str(error)))
    return comparisons


def _compare(device: Device, tolerance: float, component: str, calls: list[Call]) -> Comparison:
    if not calls:
        return Comparison(component, 0, None, tolerance)
    runner, errors = DeviceRunner(device, component), []
    specs = {spec.name: spec for spec in (*runner.graph.inputs, *runner.graph.weights)}
    for call in calls:
        weights = None
        if call.weights is not None:
            weights = {n: array.astype(specs[n].numpy_dtype) for n, array in call.weights.items()}
        given = runner.run(call.inputs, weights)
        for name, expected in call.outputs.items():
            scale = max(float(np.abs(expected).max()), 1e-6)
            errors.append(float(np.abs(given[name] - expected).max()) / scale)
    worst = max(errors) if np.isfinite(errors).all() else math.inf
    return Comparison(component, len(calls), worst, tolerance)


def _generate(
    cpu: VideoPipeline, gpu: VideoPipeline, options: GenerationOptions, policy: str, form: str
) -> dict[str, Any]:
    """Times of a run on both, and how the latents differ where both take the same decisions."""
    tolerance = LATENTS_TOLERANCE[form]
    try:
        start = time.perf_counter()
        host = cpu.run(_PROMPT, policy=policy, options=options)
        middle = time.perf_counter()
        device = gpu.run(_PROMPT, policy=host.trace, options=options)  # compiles as well
        again = time.perf_counter()
        gpu.run(_PROMPT, policy=policy, options=options)
        end = time.perf_counter()
    except (McError, ValueError) as error:
        return {"good": False, "failure": str(error), "latents_tolerance": tolerance}
    difference = _measure(device.latents - host.latents) / max(_measure(host.latents), 1e-6)
    return {
        "good": difference <= tolerance,  # not where it is NaN
        "cpu_seconds": middle - start,
        "gpu_seconds": end - again,
        "latents_difference": difference,
        "latents_tolerance": tolerance,
    }


def _measure(array: Any) -> float:
    return float(np.sqrt(np.mean(np.square(array, dtype=np.float64))))


def check(
    bundle: Bundle, device_options: DeviceOptions, options: GenerationOptions
) -> dict[str, Any]:
    """Make the whole report."""
    policy, form = next(iter(bundle.manifest.presets), "none"), device_options.form
    cpu, gpu = VideoPipeline(bundle), VideoPipeline(bundle)
    gpu.use_device(device_options)
    sizes = {name: getattr(options, name) for name in ("height", "width", "num_frames")}
    report: dict[str, Any] = {
        "machine": examine(bundle.path, device_options.engines, sizes).to_json(),
        "form": form,
        "failure": None,
        "engines": [],
        "generations": {},
        "benchmark": None,
        "not_checked": sorted(bundle.manifest.components),
    }
    try:
        device = gpu.device
    except McError as error:
        return report | {"good": False, "failure": str(error)}
    assert device is not None
    tolerances = {name: choose_tolerance(bundle, name, form) for name in device.engines}
    comparisons = compare_engines(device, tolerances, record_calls(bundle, options, policy))
    runs = {
        name: _generate(cpu, gpu, options, name, form) for name in dict.fromkeys(("none", policy))
    }
    device.keep_compiled()
    compared = {each.component for each in comparisons if each.error is not None}
    failed = any(
        each.failure or (each.error is not None and not each.is_good) for each in comparisons
    )
    return report | {
        "good": not failed and all(run["good"] for run in runs.values()),
        "engines": [asdict(each) | {"good": each.is_good} for each in comparisons],
        "generations": runs,
        "not_checked": sorted(bundle.manifest.components.keys() - compared),
    }


def choose_backend(capability: int) -> Backend:
    """TensorRT-RTX where it is installed and has the GPU for a target, else TensorRT."""
    try:
        rtx = open_library("tensorrt-rtx")
    except McError:
        return "tensorrt"
    return "tensorrt-rtx" if capability in rtx.targets else "tensorrt"


def _build(bundle: Bundle, options: DeviceOptions, capability: int) -> None:
    """Run the mc-build command that a refused engine would name; what is there is kept."""
    version = open_library(options.backend).version
    place = Place(options.backend, version, capability, options.form, options.limits)
    command = place.build_command(EngineStore(bundle, options.engines))
    print(command, flush=True)
    subprocess.run(shlex.split(command), check=False)  # what is missing then is in the report


def main() -> None:
    """Read the flags, build, check, write the report; exit 1 where something is not good."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", choices=BACKENDS, help="default: what has this GPU")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="default: bf16, fp16 on SM75")
    parser.add_argument("--engines", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/gpu-check.json"))
    flags = parser.parse_args()
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        report = _run(flags)
    except McError as error:  # no driver, no library, no bundle: nothing was checked
        nothing = {"engines": [], "generations": {}, "benchmark": None, "not_checked": ["all"]}
        report = {"good": False, "failure": str(error), **nothing}
    flags.output.write_text(json.dumps(report, indent=2) + "\n")
    _show(report)
    print(f"report: {flags.output}")
    if not report["good"]:
        raise SystemExit(1)


def _run(flags: argparse.Namespace) -> dict[str, Any]:
    """Build, check and measure; raises McError where there is nothing to check."""
    bundle, capability = Bundle.open(flags.bundle), open_gpu().capability
    pipeline = VideoPipeline(bundle)
    options = replace(pipeline.default_options, num_inference_steps=flags.steps)
    device_options = DeviceOptions(
        flags.backend or choose_backend(capability),
        pipeline.limit_video(options),
        flags.dtype or usual_form(capability),
        flags.engines,
    )
    _build(bundle, device_options, capability)
    report = check(Bundle.open(flags.bundle), device_options, options)
    if report["failure"] is None:
        report["benchmark"] = _measure_times(bundle, device_options, flags.output)
        report["good"] = report["good"] and report["benchmark"]["failure"] is None
    return report


def _measure_times(bundle: Bundle, options: DeviceOptions, output: Path) -> dict[str, Any]:
    """Let mc-bench time every engine in every kind of pass; it prints a table."""
    target = output.with_name(f"{output.stem}-bench.json")
    words = ["mc-bench", "run", str(bundle.path), "--engines", "--quick", "--overwrite"]
    words += ["--backend", options.backend, "--dtype", options.form, "--output", str(target)]
    if options.engines is not None:
        words += ["--engine-folder", str(options.engines)]
    print(shlex.join(words), flush=True)
    done = subprocess.run(words, check=False)
    failure = None if done.returncode == 0 else f"mc-bench: exit code {done.returncode}"
    return {"report": str(target), "failure": failure}


def _show(report: Mapping[str, Any]) -> None:
    if report["failure"]:
        print(report["failure"])
    for line in report["engines"]:
        error = "not checked" if line["error"] is None else f"error {line['error']:.1e}"
        state = "good" if line["good"] else f"NOT GOOD {line['failure'] or ''}"
        print(f"{line['component']:<20} {error:<16} {state}")
    for name, run in report["generations"].items():
        if "failure" in run:
            print(f"{name}: NOT GOOD {run['failure']}")
        else:
            print(
                f"{name}: CPU {run['cpu_seconds']:.1f} s, GPU {run['gpu_seconds']:.2f} s, latents "
                f"differ by {run['latents_difference']:.1e} {'good' if run['good'] else 'NOT GOOD'}"
            )
    if report["benchmark"] is not None:
        print(f"benchmark: {report['benchmark']['failure'] or report['benchmark']['report']}")
    print(f"not checked: {', '.join(report['not_checked'])}")


if __name__ == "__main__":
    main()
