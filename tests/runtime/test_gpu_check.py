"""`scripts/gpu_check.py` with stand-ins: it compares every engine, and notices one that differs."""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import gpu_check
import numpy as np
import onnx_ir as ir
import pytest
import stand_in_tensorrt
from gpu_check import TOLERANCE, check
from stand_in_driver import StandInDriver
from stand_in_engines import list_parts, store_engines
from stand_in_tensorrt import StandInLibrary

from mc_engines.building.bounds import VideoLimits
from mc_engines.building.library import Library
from mc_engines.bundle import Bundle
from mc_engines.device import opening
from mc_engines.device.cuda import Gpu
from mc_engines.device.opening import DeviceOptions
from mc_engines.device.runner import DeviceRunner
from mc_engines.errors import EngineError
from mc_engines.onnxruntime_runner import OnnxRuntimeRunner
from mc_export.passes.round_bf16 import round_bf16
from mc_runtime import doctor
from mc_runtime.device_passes import DevicePasses
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from motioncache import choose_policy

OPTIONS = GenerationOptions(num_frames=17, height=32, width=32, num_inference_steps=3, ar_step=0)


@pytest.fixture
def report(tiny_bundle, tmp_path, monkeypatch):
    """A function that makes the report, after something was changed."""
    driver = StandInDriver()
    library = Library("tensorrt-rtx", StandInLibrary(driver))
    for module in (opening, doctor):
        monkeypatch.setattr(module, "open_library", lambda backend: library)
    monkeypatch.setattr(opening, "open_gpu", lambda ordinal: Gpu(driver))
    monkeypatch.setattr(doctor, "open_gpu", lambda: Gpu(driver))
    for module in (opening, doctor):
        monkeypatch.setattr(module, "compile_kernels", lambda capability: b"cubin 86")
    bundle, folder = Bundle.open(tiny_bundle), tmp_path / "engines"
    store_engines(bundle, folder, list_parts(bundle))
    limits = VideoLimits(32, 32, 17, 5)
    return lambda: check(bundle, DeviceOptions("tensorrt-rtx", limits, "fp32", folder), OPTIONS)


@pytest.fixture
def command(report, tiny_bundle, tmp_path, monkeypatch):
    """A function that runs the script on the stand-ins, with what mc-build left in a folder."""
    ran = []

    def run(words, check):
        ran.append(words)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    for name in ("open_gpu", "open_library"):
        monkeypatch.setattr(gpu_check, name, getattr(doctor, name))
    monkeypatch.setattr(VideoPipeline, "default_options", OPTIONS)
    target = tmp_path / "new" / "check.json"
    words = ["gpu_check.py", tiny_bundle, "--dtype", "fp32", "--engines", tmp_path / "engines"]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--steps", "3", "--output", str(target)])

    def main(code=0):
        with pytest.raises(SystemExit) if code else nullcontext():
            gpu_check.main()
        return json.loads(target.read_text()), ran

    return main


def test_the_script_builds_checks_measures_and_writes_a_report(command, tmp_path, capsys):
    made, (build, bench) = command()
    assert made["good"] and made["failure"] is None and len(made["engines"]) == 13
    assert build[0] == "mc-build" and build[-2:] == [str(tmp_path / "engines"), "--allow-unfused"]
    assert build[build.index("--sm") + 1] == "86" and build[build.index("--dtype") + 1] == "fp32"
    measured = str(tmp_path / "new" / "check-bench.json")
    assert bench[:2] == ["mc-bench", "run"] and {"--engines", "--quick", measured} <= {*bench}
    assert made["benchmark"] == {"report": measured, "failure": None}
    shown = capsys.readouterr().out
    assert shown.count(" good\n") == 14 and "not checked: timestep\n" in shown
    assert f"benchmark: {measured}\n" in shown and shown.endswith("check.json\n")


def test_a_benchmark_that_fails_is_not_good(command, monkeypatch, capsys):
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda words, check: failed)
    made, _ = command(code=1)
    assert not made["good"] and "benchmark: mc-bench: exit code 1\n" in capsys.readouterr().out


def test_without_a_driver_the_report_says_so(command, monkeypatch, capsys):
    def refuse():
        raise EngineError("GPU: expected an NVIDIA driver, got none.")

    monkeypatch.setattr(gpu_check, "open_gpu", refuse)
    made, ran = command(code=1)
    assert made["failure"] == "GPU: expected an NVIDIA driver, got none." and not ran
    assert not made["good"] and made["not_checked"] == ["all"]
    assert capsys.readouterr().out.startswith("GPU: expected an NVIDIA driver, got none.\n")


def test_every_engine_that_the_cpu_runs_too_is_compared(report, tiny_bundle):
    made = report()
    by_name = {line["component"]: line for line in made["engines"]}
    compared = {name for name, line in by_name.items() if line["error"] is not None}
    assert all(line["good"] for name, line in by_name.items() if name in compared)
    assert made["not_checked"] == ["timestep"]
    assert compared == {*list_parts(Bundle.open(tiny_bundle))}
    assert made["generations"]["none"]["latents_difference"] < 1e-4
    assert made["good"] and made["failure"] is None


def test_an_engine_that_computes_something_else_is_noticed(report, monkeypatch):
    compute = stand_in_tensorrt.compute

    def spoil(context, shapes, addresses, scratch):
        compute(context, shapes, addresses, scratch)
        if "head_modulation" in shapes:
            size = 4 * int(np.prod(shapes["out"][:2])) * 64
            patches = context.driver.view(addresses["patches"], size).view(np.float32)
            patches *= 1 + 2 * TOLERANCE["fp32"]

    monkeypatch.setattr(stand_in_tensorrt, "compute", spoil)
    made = report()
    bad = [line["component"] for line in made["engines"] if line["error"] and not line["good"]]
    assert bad == ["head"] and not made["good"]


def test_an_engine_that_fails_is_put_down_and_the_others_are_compared(report, monkeypatch):
    run = DeviceRunner.run

    def fail(self, *arguments):
        if self._component == "embed":
            raise EngineError("embed: expected a result, got none.")
        return run(self, *arguments)

    monkeypatch.setattr(DeviceRunner, "run", fail)
    made = report()
    failed = {line["component"]: line["failure"] for line in made["engines"] if line["failure"]}
    assert failed == {"embed": "embed: expected a result, got none."} and not made["good"]
    assert sum(line["good"] for line in made["engines"]) > 5
    assert "embed" in made["not_checked"]


def test_an_engine_that_is_missing_is_in_the_report(report, tmp_path):
    for path in tmp_path.rglob("block.*"):
        path.unlink()
    made = report()
    assert "block.fp32: expected an engine of" in made["failure"] and not made["good"]
    assert "block" in made["not_checked"]


def test_latents_that_differ_are_not_good(report, monkeypatch):
    """Each engine agrees, but the run does not."""
    read = DevicePasses.read

    def spoil(*arguments):
        reading = read(*arguments)
        reading.patches[:] *= 1 + 10 * TOLERANCE["fp32"]
        return reading

    monkeypatch.setattr(DevicePasses, "read", spoil)
    made = report()
    assert all(line["good"] for line in made["engines"] if line["error"] is not None)
    assert not made["good"] and not made["generations"]["none"]["good"]


def test_a_failing_generation_is_in_the_report(report, monkeypatch):
    def fail(self):
        raise EngineError("velocity: expected finite numbers, got NaN.")

    monkeypatch.setattr(VideoPipeline, "_device_passes", property(fail))
    made = report()
    assert made["generations"]["none"]["failure"].startswith("velocity: ") and not made["good"]
    assert sum(line["good"] for line in made["engines"]) > 5


class Lowered:
    """A 16-bit graph in ONNX Runtime in place of its engine; of bf16 the twin, which rounds."""

    def __init__(self, bundle, form, component, folder):
        graph, path = bundle.graph(component, form), bundle.graph_path(component, form)
        self.graph = graph
        if form == "bf16":
            twin = ir.external_data.load_to_model(ir.load(path))
            twin = round_bf16(twin, frozenset(spec.name for spec in graph.weights))
            path = folder / f"{component}.onnx"
            ir.save(twin, path, external_data=f"{component}.data")
            names = {"bfloat16": "float32"}
            self.graph = replace(
                graph,
                **{
                    side: tuple(
                        replace(spec, dtype=names.get(spec.dtype, spec.dtype))
                        for spec in getattr(graph, side)
                    )
                    for side in ("inputs", "outputs", "weights")
                },
            )
        self.runner = OnnxRuntimeRunner(self.graph, path, threads=1)

    def run(self, inputs, weights):
        dtypes = {spec.name: spec.numpy_dtype for spec in self.graph.inputs}
        given = {name: np.asarray(array).astype(dtypes[name]) for name, array in inputs.items()}
        outputs = self.runner.run(given, weights)
        return {name: array.astype(np.float32) for name, array in outputs.items()}


@pytest.mark.parametrize("form", ["fp16", "bf16"])
def test_right_engines_of_16_bits_are_called_good(tiny_bundle, tmp_path, monkeypatch, form):
    """What an engine computes at best, and one whose results are no such thing."""
    bundle = Bundle.open(tiny_bundle)
    wrong = []

    def open_lowered(device, component):
        lowered = Lowered(bundle, form, component, tmp_path)
        if component in wrong:
            run = lowered.run
            lowered.run = lambda *given: {name: 1.3 * x for name, x in run(*given).items()}
        return lowered

    monkeypatch.setattr(gpu_check, "DeviceRunner", open_lowered)
    parts = list_parts(bundle)
    calls = gpu_check.record_calls(bundle, OPTIONS, "none")
    tolerances = {name: gpu_check.choose_tolerance(bundle, name, form) for name in parts}
    assert tolerances["block"] == TOLERANCE[form]
    assert tolerances["vae_decoder_first"] > TOLERANCE[form]

    def compare():
        device = SimpleNamespace(engines=dict.fromkeys(parts))
        return gpu_check.compare_engines(device, tolerances, calls)

    assert [each for each in compare() if not each.is_good] == []
    wrong += parts
    assert [each.component for each in compare() if each.is_good] == []


def test_partial_passes_are_recorded_in_the_sizes_of_buckets(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    policy = choose_policy(
        "motioncache",
        ["threshold=0.01", "coefficients=1,0", "warmup_steps=1"],
        "skyreels",
        None,
        {},
    )
    calls = gpu_check.record_calls(bundle, replace(OPTIONS, num_inference_steps=6), policy)
    sizes = {call.inputs["x"].shape[1] for call in calls["block"]}
    buckets = bundle.manifest.config["transformer"]["token_buckets"]
    assert sizes <= {math.ceil(20 * share) for share in buckets}


def test_the_backend_is_the_one_that_has_the_gpu(monkeypatch):
    rtx = SimpleNamespace(targets=(75, 86, 120))
    monkeypatch.setattr(gpu_check, "open_library", lambda name: rtx)
    assert [gpu_check.choose_backend(sm) for sm in (86, 87, 90)] == [
        "tensorrt-rtx",
        "tensorrt",
        "tensorrt",
    ]
