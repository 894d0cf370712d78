"""Check what cannot be checked without a GPU: engines against ONNX Runtime, and a generation.

`scripts/gpu-check BUNDLE` builds the engines and runs this. A short generation on the CPU is
recorded, call by call; every engine is then given the same inputs. The report says what was not
checked.
"""

__all__ = ["Call", "Comparison", "compare_engines", "record_calls"]

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mc_engines.bundle import Bundle
from mc_engines.device.device import Device
from mc_engines.device.opening import DeviceOptions
from mc_engines.device.runner import DeviceRunner
from mc_engines.runner import Arrays, Runner
from mc_engines.specs import GraphSpec
from mc_runtime.doctor import examine
from mc_runtime.flags import limit_video
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.transformer import Transformer

# Largest error that is allowed, relative to the largest value of an output: eight roundings of the
# type, but for float32, whose matrix products may use TF32.
TOLERANCE = {"fp32": 5e-3, "fp16": 5e-3, "bf16": 4e-2}
_KEPT = 3  # calls of a component that are compared
_PROMPT = "a big red circle drifts left over sand"


@dataclass(frozen=True)
class Call:
    """One call of a component on the CPU."""

    inputs: Mapping[str, Any]
    weights: Mapping[str, Any] | None
    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """An engine against ONNX Runtime; `error` is relative to the largest value of an output."""

    component: str
    calls: int
    error: float | None
    tolerance: float
    milliseconds: float | None

    @property
    def is_good(self) -> bool:
        """Whether it was compared, and agrees."""
        return self.error is not None and self.error <= self.tolerance


class _Recorder:
    """A runner that keeps its first calls, and every one whose shapes are new."""

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
    """Generate on the CPU and keep calls of every component."""
    calls: dict[str, list[Call]] = defaultdict(list)

    class Recorded(VideoPipeline):
        def _open(self, component: str) -> Runner:
            return _Recorder(super()._open(component), calls[component])

        @property
        def transformer(self) -> Transformer:
            plain = super().transformer
            runners = {name: _Recorder(each, calls[name]) for name, each in plain.runners.items()}
            return replace(plain, runners=runners, fused_block=runners["block"])

    Recorded(bundle).run(_PROMPT, policy=policy, options=options)
    return calls


def compare_engines(device: Device, form: str, calls: Mapping[str, list[Call]]) -> list[Comparison]:
    """Give every engine the inputs of the recorded calls."""
    return [_compare(device, form, name, calls.get(name, [])) for name in device.engines]


def _compare(device: Device, form: str, component: str, calls: list[Call]) -> Comparison:
    if not calls:
        return Comparison(component, 0, None, TOLERANCE[form], None)
    runner, errors, times = DeviceRunner(device, component), [], []
    specs = {spec.name: spec for spec in (*runner.graph.inputs, *runner.graph.weights)}
    for call in calls:
        weights = None
        if call.weights is not None:
            weights = {n: array.astype(specs[n].numpy_dtype) for n, array in call.weights.items()}
        given = runner.run(call.inputs, weights)  # compiles for these shapes
        start = time.perf_counter()
        given = runner.run(call.inputs, weights)
        times.append(1e3 * (time.perf_counter() - start))
        for name, expected in call.outputs.items():
            scale = max(float(np.abs(expected).max()), 1e-6)
            errors.append(float(np.abs(given[name] - expected).max()) / scale)
    return Comparison(component, len(calls), max(errors), TOLERANCE[form], float(np.median(times)))


def _generate(pipeline: VideoPipeline, options: GenerationOptions, policy: str) -> dict[str, Any]:
    """Latents of a run, and the time of its second repetition."""
    pipeline.run(_PROMPT, policy=policy, options=options)
    start = time.perf_counter()
    video = pipeline.run(_PROMPT, policy=policy, options=options)
    return {"seconds": time.perf_counter() - start, "latents": video.latents}


def check(
    bundle: Bundle, device_options: DeviceOptions, options: GenerationOptions
) -> dict[str, Any]:
    """Make the whole report."""
    policy = next(iter(bundle.manifest.presets), "none")
    cpu, gpu = VideoPipeline(bundle), VideoPipeline(bundle)
    gpu.use_device(device_options)
    calls = record_calls(bundle, options, policy)
    assert gpu.device is not None
    comparisons = compare_engines(gpu.device, device_options.form, calls)
    runs = {}
    for name in dict.fromkeys(("none", policy)):
        host, device = (_generate(pipeline, options, name) for pipeline in (cpu, gpu))
        difference = float(np.abs(host["latents"] - device["latents"]).max())
        runs[name] = {
            "cpu_seconds": host["seconds"],
            "gpu_seconds": device["seconds"],
            "largest_difference_of_latents": difference,
        }
    gpu.device.keep_compiled()
    return {
        "machine": examine(bundle.path, device_options.engines).to_json(),
        "form": device_options.form,
        "engines": [asdict(each) | {"good": each.is_good} for each in comparisons],
        "generations": runs,
        "not_checked": [each.component for each in comparisons if each.error is None],
    }


def main() -> None:
    """Read the flags, check, write the report; exit 1 where an engine differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", choices=("tensorrt-rtx", "tensorrt"), default="tensorrt-rtx")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), default="bf16")
    parser.add_argument("--engines", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/gpu-check.json"))
    flags = parser.parse_args()
    bundle = Bundle.open(flags.bundle)
    options = replace(VideoPipeline(bundle).default_options, num_inference_steps=flags.steps)
    device_options = DeviceOptions(flags.backend, limit_video(options), flags.dtype, flags.engines)
    report = check(bundle, device_options, options)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_text(json.dumps(report, indent=2) + "\n")
    for line in report["engines"]:
        error = "not checked" if line["error"] is None else f"error {line['error']:.1e}"
        print(f"{line['component']:<20} {error:<16} {'good' if line['good'] else 'NOT GOOD'}")
    for name, run in report["generations"].items():
        print(f"{name}: CPU {run['cpu_seconds']:.1f} s, GPU {run['gpu_seconds']:.2f} s")
    print(f"report: {flags.output}")
    if not all(line["good"] for line in report["engines"] if line["error"] is not None):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
