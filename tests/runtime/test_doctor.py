"""`mc-inspect --doctor`: what is found on machines of several kinds, with stand-ins."""

import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import onnxruntime
import pytest
from click.testing import CliRunner
from stand_in_driver import StandInDriver
from stand_in_engines import store_engines
from stand_in_tensorrt import VERSION, StandInLibrary

from mc_engines.building.library import BACKENDS, Library
from mc_engines.bundle import Bundle
from mc_engines.device.cuda import Gpu
from mc_engines.errors import EngineError, MissingExtraError
from mc_runtime import doctor
from mc_runtime.device_passes import ON_DEVICE
from mc_runtime.flags import ONNXRUNTIME_BACKENDS
from mc_runtime.inspect_cli import main


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU, TensorRT-RTX and no TensorRT; changed by the tests."""
    driver = StandInDriver()
    library = Library("tensorrt-rtx", StandInLibrary(driver))

    def open_library(backend):
        if backend == "tensorrt":
            raise MissingExtraError("tensorrt: not installed. Run: pip install 'motioncache[trt]'")
        return library

    monkeypatch.setattr(doctor, "open_library", open_library)
    monkeypatch.setattr(doctor, "open_gpu", lambda: Gpu(driver))
    monkeypatch.setattr(doctor, "compile_kernels", lambda capability: b"cubin")
    return driver


@pytest.fixture
def engines(tiny_bundle: Path, tmp_path: Path) -> Path:
    store_engines(Bundle.open(tiny_bundle), tmp_path / "engines", ON_DEVICE)
    return tmp_path / "engines"


SIZES = {"height": 32, "width": 32}
FLAGS = "--height", 32, "--width", 32


def examine(bundle, engines):
    return doctor.examine(bundle, engines, SIZES)


def find(diagnosis, subject):
    (finding,) = (each for each in diagnosis.findings if each.subject == subject)
    return finding


def test_a_machine_with_everything_can_generate_on_its_gpu(machine, tiny_bundle, engines):
    diagnosis = examine(tiny_bundle, engines)
    assert diagnosis.is_good
    assert {backend for backend, can in diagnosis.can_generate.items() if can} == {
        "cpu",
        "tensorrt-rtx",
    }
    assert [*diagnosis.can_generate] == [*ONNXRUNTIME_BACKENDS, *BACKENDS]
    assert "compute capability 8.6, driver for CUDA 13.2" in find(diagnosis, "GPU").detail
    assert find(diagnosis, "tensorrt-rtx").detail == VERSION
    assert find(diagnosis, "block.fp32").state == "good"
    assert find(diagnosis, "tensorrt-rtx engines").detail == "all for 97 frames of 32 x 32 in fp32"


def test_providers_are_those_that_are_active_not_those_that_are_compiled_in(machine, monkeypatch):
    """`get_available_providers` of onnxruntime-gpu names CUDA also where it cannot be loaded."""
    expected = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: expected)
    diagnosis = doctor.examine()
    assert "active are CPUExecutionProvider" in find(diagnosis, "cpu").detail
    cuda = find(diagnosis, "onnxruntime-cuda")
    assert cuda.state == "absent" and "it could not be loaded" in cuda.detail
    assert not diagnosis.can_generate["onnxruntime-cuda"]
    monkeypatch.setattr(doctor, "try_provider", lambda provider: expected)
    diagnosis = doctor.examine()
    assert find(diagnosis, "onnxruntime-cuda").detail == f"active are {', '.join(expected)}"
    assert diagnosis.can_generate["onnxruntime-cuda"]


def test_a_plug_in_that_cannot_be_registered_is_not_good(machine, monkeypatch):
    """It is installed, and needs a driver."""
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.5.0" if "-ep-nv-" in name else version(name)
    )
    plugin = SimpleNamespace(get_library_path=lambda: "/nowhere/plugin.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    diagnosis = doctor.examine()
    finding = find(diagnosis, "onnxruntime-tensorrt-rtx")
    assert (
        finding.state == "bad" and "cu13 0.5.0: onnxruntime: expected the plug-in" in finding.detail
    )
    assert not diagnosis.can_generate["onnxruntime-tensorrt-rtx"]


def test_without_a_driver_generation_runs_on_the_cpu(machine, monkeypatch, tiny_bundle, engines):
    def refuse():
        raise EngineError("GPU: expected an NVIDIA driver, got none.")

    monkeypatch.setattr(doctor, "open_gpu", refuse)
    diagnosis = examine(tiny_bundle, engines)
    assert diagnosis.is_good and diagnosis.can_generate["cpu"]
    assert not diagnosis.can_generate["tensorrt-rtx"]
    assert "there is no GPU" in find(diagnosis, "block.fp32").detail
    assert not any("mc-build" in finding.advice for finding in diagnosis.findings)


def test_both_packages_of_onnxruntime_are_a_fault(machine, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda package: "1.31.1")
    diagnosis = doctor.examine()
    assert not diagnosis.is_good and not any(diagnosis.can_generate.values())
    assert "overwrite each other" in find(diagnosis, "onnxruntime").detail


def test_no_onnxruntime_is_a_fault_with_the_command_that_installs_it(machine, monkeypatch):
    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    diagnosis = doctor.examine()
    assert not diagnosis.is_good
    assert find(diagnosis, "onnxruntime").advice == "pip install 'motioncache[cpu]'"


def test_engines_of_another_generation_cannot_run_here(machine, tiny_bundle, engines):
    machine.capability = (12, 0)
    diagnosis = examine(tiny_bundle, engines)
    finding = find(diagnosis, "head.fp32")
    assert finding.detail.endswith(
        f"needed is one of tensorrt-rtx {VERSION} for SM120, got one for SM86"
    )
    assert finding.advice == build_command(tiny_bundle, engines, 120)
    assert not diagnosis.can_generate["tensorrt-rtx"]


def test_a_part_that_is_built_for_a_smaller_video_is_in_the_way(machine, tiny_bundle, engines):
    """mc-generate would refuse it; without it ONNX Runtime runs that part."""
    store_engines(Bundle.open(tiny_bundle), engines, ["vae_decoder_next"])
    assert examine(tiny_bundle, engines).can_generate["tensorrt-rtx"]
    (path,) = engines.rglob("vae_decoder_next.*.json")
    (profile,) = json.loads(path.read_text())["profiles"]
    rewrite(engines, "vae_decoder_next", profiles=[{name: [[1]] * 3 for name in profile}])
    diagnosis = examine(tiny_bundle, engines)
    assert not diagnosis.can_generate["tensorrt-rtx"]
    assert find(diagnosis, "tensorrt-rtx engines").detail.startswith("vae_decoder_next missing")


def test_the_driver_and_what_compiles_for_it_are_told(machine, monkeypatch, tmp_path):
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16\n"
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(doctor, "_DRIVER_FILE", tmp_path / "version")
    diagnosis = doctor.examine()
    assert "capability 8.6, driver 580.95.05 for CUDA 13.2," in find(diagnosis, "GPU").detail
    assert find(diagnosis, "NVRTC").detail.startswith("cuda-bindings ")
    assert diagnosis.can_generate["tensorrt-rtx"]

    def fail(capability):
        raise EngineError("kernels.cu: expected NVRTC, got none. Run: pip install nvrtc")

    monkeypatch.setattr(doctor, "compile_kernels", fail)
    diagnosis = doctor.examine()
    finding = find(diagnosis, "NVRTC")
    assert (finding.state, finding.advice) == ("bad", "Run: pip install nvrtc")
    assert not diagnosis.can_generate["tensorrt-rtx"] and diagnosis.can_generate["cpu"]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [(("--height", 63), "height: expected "), (("--num-frames", 3), "num_frames: expected ")],
)
def test_sizes_of_no_video_are_refused_without_a_gpu_too(monkeypatch, tiny_bundle, sizes, said):
    def refuse():
        raise EngineError("GPU: expected an NVIDIA driver, got none.")

    monkeypatch.setattr(doctor, "open_gpu", refuse)
    assert said in run("--doctor", tiny_bundle, *sizes, code=2).output


def test_one_engine_too_few_and_generation_cannot_run(machine, tiny_bundle, engines):
    for path in engines.rglob("combine.*"):
        path.unlink()
    diagnosis = examine(tiny_bundle, engines)
    assert not diagnosis.can_generate["tensorrt-rtx"]


def test_an_engine_that_is_not_whole_and_a_damaged_sidecar_are_told(machine, tiny_bundle, engines):
    (plan,) = engines.rglob("head.*.engine")
    plan.write_bytes(plan.read_bytes()[:-1])
    (sidecar,) = engines.rglob("embed.*.json")
    sidecar.write_text("{")
    diagnosis = examine(tiny_bundle, engines)
    assert "got a file that has not its " in find(diagnosis, "head.fp32").detail
    missing = find(diagnosis, "tensorrt-rtx engines")
    assert missing.detail == "embed, head missing for 97 frames of 32 x 32 in fp32"
    assert missing.advice == build_command(tiny_bundle, engines)
    assert any(each.detail == "a damaged engine" for each in diagnosis.findings)


def build_command(bundle: Path, engines: Path, sm: int = 86, side: int = 32) -> str:
    return (
        f"mc-build {bundle} --backend tensorrt-rtx --sm {sm} --dtype fp32 --height {side} --width "
        f"{side} --max-frames 97 --causal-block-size 5 --engines {engines} --allow-unfused"
    )


def rewrite(engines: Path, name: str, **changes) -> None:
    (path,) = engines.rglob(f"{name}.*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "said", "advised"),
    [
        ({"graph": "0" * 64}, "got one of another graph", True),
        ({"version": "1.6.0.3"}, "got one of version 1.6.0.3", True),
        ({"left_out": {"86": "No."}, "targets": [89]}, "cannot be built for this GPU: No.", False),
        ({"layers": [0, 1]}, "a group of layers, which mc-generate does not run", False),
        ({"backend": "tensorrt"}, "tensorrt is not installed here", False),
    ],
)
def test_an_engine_is_held_against_what_generation_asks_for(
    machine, tiny_bundle, engines, changes, said, advised
):
    rewrite(engines, "block", **changes)
    diagnosis = examine(tiny_bundle, engines)
    name = "block.00-01.fp32" if "layers" in changes else "block.fp32"
    finding = find(diagnosis, name)
    assert finding.state == "absent" and finding.detail.endswith(said)
    assert (finding.advice == build_command(tiny_bundle, engines)) is advised
    if "backend" in changes:
        assert finding.advice.endswith("Run: pip install 'motioncache[trt]'")
    assert not diagnosis.can_generate["tensorrt-rtx"] and diagnosis.can_generate["cpu"]


def test_engines_for_a_smaller_video_are_too_small(machine, tiny_bundle, engines):
    shown = run("--doctor", tiny_bundle, "--engines", engines, "--json", "--height", 64, *FLAGS[2:])
    value = json.loads(shown.output)
    (finding,) = (each for each in value["findings"] if each["subject"] == "block.fp32")
    assert "got one that takes 'x' from" in finding["detail"]
    assert "--height 64 --width 32" in finding["advice"]
    assert value["can_generate"]["tensorrt-rtx"] is False
    run("--height", 64, tiny_bundle, code=2)


def test_a_damaged_bundle_is_a_fault(machine, tmp_path):
    (tmp_path / "x.bundle").mkdir()
    assert not doctor.examine(tmp_path / "x.bundle").is_good


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_the_command_prints_a_table_or_json(machine, tiny_bundle, engines):
    shown = run("--doctor", tiny_bundle, "--engines", engines, *FLAGS).output
    assert shown.endswith("Videos can be generated with: cpu, tensorrt-rtx.\n")
    value = json.loads(run("--doctor", "--json").output)
    assert value["good"] and value["can_generate"]["cpu"]


def test_a_broken_library_beside_a_working_cpu_is_a_finding_not_a_failure(
    machine, monkeypatch, tiny_bundle, engines
):
    """The issue: exit code 0 only if generation can run; it can."""

    def broken(backend):
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(doctor, "open_library", broken)
    (sidecar,) = engines.rglob("embed.*.json")
    sidecar.write_text("{")
    value = json.loads(run("--doctor", "--json", tiny_bundle, "--engines", engines, code=0).output)
    bad = [finding["subject"] for finding in value["findings"] if finding["state"] == "bad"]
    assert len(bad) == 3 and value["good"]
    assert [name for name, can in value["can_generate"].items() if can] == ["cpu"]


def test_the_command_fails_where_nothing_can_run(machine, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda package: "1.31.1")
    assert "generated with: nothing." in run("--doctor", code=1).output


@pytest.mark.parametrize("arguments", [("--doctor", "--policy", "none"), ("--engines", ".")])
def test_flags_that_do_not_go_together_are_refused(arguments):
    run(*arguments, code=2)
