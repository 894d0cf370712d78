"""`mc-generate --backend`: from engines to a video, with stand-ins for the libraries of GPUs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from stand_in_driver import StandInDriver
from stand_in_engines import list_parts, store_engines
from stand_in_tensorrt import VERSION, StandInLibrary

from mc_engines import onnxruntime_runner
from mc_engines.building.bounds import VideoLimits
from mc_engines.building.library import Library
from mc_engines.bundle import Bundle
from mc_engines.device import opening
from mc_engines.device.cuda import Gpu
from mc_engines.onnxruntime_providers import create_session
from mc_runtime import generate_cli
from mc_runtime.flags import choose_device
from mc_runtime.generate_cli import main

SIZES = "--height", 32, "--width", 32, "--num-frames", 37, "--num-inference-steps", 4
ON_GPU = "--backend", "tensorrt-rtx", "--dtype", "fp32"


@pytest.fixture
def driver(monkeypatch) -> StandInDriver:
    driver = StandInDriver()
    library = Library("tensorrt-rtx", StandInLibrary(driver))
    for module in (opening, generate_cli):
        monkeypatch.setattr(module, "open_library", lambda backend: library)
    monkeypatch.setattr(opening, "open_gpu", lambda ordinal: Gpu(driver, ordinal))
    monkeypatch.setattr(opening, "compile_kernels", lambda capability: b"cubin 86")
    return driver


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A folder of engines for 32 x 32 pixels, of all parts that run on a GPU."""
    bundle = Bundle.open(tiny_bundle)
    store_engines(bundle, tmp_path / "engines", list_parts(bundle))
    return tmp_path / "engines"


def run(bundle: Path, target: Path, *arguments: object, code: int = 0):
    latents = target.with_suffix(".npz")
    command = [bundle, "--prompt", "a", "-o", target, "--save-latents", latents, *SIZES, *arguments]
    result = CliRunner().invoke(main, [str(argument) for argument in command])
    assert result.exit_code == code, result.output
    return result, latents


def test_a_video_from_engines_is_that_of_the_cpu(tiny_bundle, tmp_path, folder, driver):
    _, given = run(tiny_bundle, tmp_path / "gpu.mp4", *ON_GPU, "--engines", folder)
    _, expected = run(tiny_bundle, tmp_path / "cpu.mp4")
    assert driver.launches and driver.replays and not driver.faults
    with np.load(given) as ours, np.load(expected) as theirs:
        np.testing.assert_allclose(ours["latents"], theirs["latents"], atol=2e-5)
    caches = list(folder.rglob("*.sm86.cache"))
    assert len(caches) == len(list_parts(Bundle.open(tiny_bundle)))


def test_a_run_is_repeated_on_what_it_ran_on(tiny_bundle, tmp_path, folder, driver):
    run(tiny_bundle, tmp_path / "gpu.mp4", *ON_GPU, "--engines", folder)
    record = json.loads((tmp_path / "gpu.json").read_text())
    expected = {"backend": "tensorrt-rtx", "dtype": "fp32", "engines": str(folder)}
    expected |= {"library": VERSION, "gpu": "Stand-in", "capability": 86}
    assert {name: record["ran_on"][name] for name in expected} == expected
    launches = driver.launches
    again = "--repeat", tmp_path / "gpu.json"
    result, given = run(tiny_bundle, tmp_path / "again.mp4", *again)
    assert driver.launches > launches and "Not as in the record" not in result.output
    with np.load(given) as ours, np.load(tmp_path / "gpu.npz") as theirs:
        np.testing.assert_array_equal(ours["latents"], theirs["latents"])

    (tmp_path / "gpu.json").write_text(
        json.dumps(record | {"ran_on": record["ran_on"] | {"gpu": "Another"}})
    )
    result, _ = run(tiny_bundle, tmp_path / "third.mp4", *again)
    said = "Not as in the record: gpu Stand-in, not Another. The output may differ.\n"
    assert said in result.output
    launches = driver.launches
    result, _ = run(tiny_bundle, tmp_path / "cpu.mp4", *again, "--backend", "cpu")
    assert "Not as in the record: backend cpu, not tensorrt-rtx; " in result.output
    assert driver.launches == launches


def test_an_engine_that_is_missing_is_named_with_the_command_that_makes_it(
    tiny_bundle, tmp_path, folder, driver
):
    for path in folder.rglob("head.*"):
        path.unlink()
    result, _ = run(tiny_bundle, tmp_path / "a.mp4", *ON_GPU, "--engines", folder, code=1)
    assert "head.fp32: expected an engine of tensorrt-rtx" in result.output
    assert "Run: mc-build" in result.output and "--height 32" in result.output


def test_it_is_said_whether_weights_stay_or_are_streamed(tiny_bundle, tmp_path, folder, driver):
    arguments = *ON_GPU, "--engines", folder
    result, _ = run(tiny_bundle, tmp_path / "a.mp4", *arguments)
    assert "The blocks' weights stay on the GPU.\n" in result.output
    result, _ = run(tiny_bundle, tmp_path / "b.mp4", *arguments, "--max-vram", 1)
    assert "The blocks' weights are streamed, two layers at a time" in result.output


def test_a_megabyte_is_a_million_bytes_as_in_every_message():
    values = {"backend": "tensorrt", "max_vram": 7, "dtype": None, "engines": None, "device": None}
    assert choose_device(values, VideoLimits(32, 32, 97, 5)).max_vram == 7_000_000


@pytest.mark.parametrize("missing", [["first", "next"], ["first"], ["next"]])
def test_a_part_without_an_engine_runs_on_the_cpu(tiny_bundle, tmp_path, folder, driver, missing):
    parts = [f"vae_decoder_{step}" for step in missing]
    for part in parts:
        for path in folder.rglob(f"{part}.*"):
            path.unlink()
    result, given = run(tiny_bundle, tmp_path / "gpu.mp4", *ON_GPU, "--engines", folder)
    assert given.exists()
    assert f"On the CPU: {', '.join(['timestep', *parts])}." in result.output


@pytest.mark.parametrize("left_out", [{}, {"86": "FP32 GEMM is not supported."}])
def test_a_part_that_was_left_out_for_this_gpu_runs_on_the_cpu(
    tiny_bundle, tmp_path, folder, driver, left_out
):
    """As after `mc-build --sm 75,86`, or `--sm 86` and `--sm 75`, on a GPU of SM75."""
    (path,) = folder.rglob("text_layer.*.json")
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "targets": [89], "left_out": left_out})
    )
    result, given = run(tiny_bundle, tmp_path / "gpu.mp4", *ON_GPU, "--engines", folder)
    assert given.exists() and "On the CPU: text_layer, timestep." in result.output


def test_an_optional_part_for_a_smaller_video_is_not_passed_over(
    tiny_bundle, tmp_path, folder, driver
):
    (path,) = folder.rglob("vae_decoder_next.*.json")
    value = json.loads(path.read_text())
    (profile,) = value["profiles"]
    path.write_text(json.dumps({**value, "profiles": [{name: [[1]] * 3 for name in profile}]}))
    result, _ = run(tiny_bundle, tmp_path / "a.mp4", *ON_GPU, "--engines", folder, code=1)
    assert "vae_decoder_next.fp32: expected an engine of" in result.output


def test_damaged_engines_in_the_bundle_are_no_hindrance_on_the_cpu(tiny_bundle, tmp_path, driver):
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle"))
    store_engines(Bundle.open(bundle), None, ("head", "embed"))
    head, embed = (next(bundle.glob(f"engines/*/{name}.*.engine")) for name in ("head", "embed"))
    head.unlink()
    embed.write_bytes(embed.read_bytes()[:-1])
    _, given = run(bundle, tmp_path / "cpu.mp4")
    assert given.exists()
    result, _ = run(bundle, tmp_path / "gpu.mp4", *ON_GPU, code=1)
    assert "expected an engine of tensorrt-rtx" in result.output and "mc-build" in result.output


def test_a_larger_video_than_there_are_engines_for_is_refused(
    tiny_bundle, tmp_path, folder, driver
):
    more = "--height", 64, "--engines", folder
    result, _ = run(tiny_bundle, tmp_path / "a.mp4", *ON_GPU, *more, code=1)
    assert "Run: mc-build" in result.output and "--height 64" in result.output


def test_a_gpu_of_another_generation_is_refused(tiny_bundle, tmp_path, folder, driver):
    driver.capability = (8, 9)
    result, _ = run(tiny_bundle, tmp_path / "a.mp4", *ON_GPU, "--engines", folder, code=1)
    assert "got one for SM86" in result.output and "--sm 89" in result.output


def test_a_gpu_without_bf16_is_told_to_ask_for_another(tiny_bundle, tmp_path, folder, driver):
    driver.capability = (7, 5)
    more = "--backend", "tensorrt-rtx", "--engines", folder
    result, _ = run(tiny_bundle, tmp_path / "a.mp4", *more, code=2)
    assert (
        "dtype: expected one that SM75 has, got bf16. Pass --dtype fp16 for it.\n" in result.output
    )


@pytest.mark.parametrize("flag", ["--dtype=fp16", "--engines=x", "--max-vram=100", "--device=0"])
def test_a_flag_for_engines_wants_a_backend(tiny_bundle, tmp_path, flag):
    result, _ = run(tiny_bundle, tmp_path / "a.mp4", flag, code=2)
    said = f"{flag.partition('=')[0]} is for engines. Add --backend tensorrt-rtx."
    assert said in result.output


def test_onnxruntime_without_the_provider_is_refused(tiny_bundle, tmp_path):
    more = "--backend", "onnxruntime-cuda"
    result, _ = run(tiny_bundle, tmp_path / "a.mp4", *more, code=1)
    assert "onnxruntime: expected CUDAExecutionProvider, got [" in result.output
    assert "motioncache[gpu]" in result.output


def test_no_driver_is_said_with_the_way_out(tiny_bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)")
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver")
    result, _ = run(tiny_bundle, tmp_path / "a.mp4", "--backend", "tensorrt-rtx", code=1)
    assert "GPU: expected an NVIDIA driver, got none." in result.output


def test_a_run_on_a_provider_says_where_it_ran(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_cli, "choose_provider", lambda values: "cuda")
    monkeypatch.setattr(generate_cli, "try_provider", lambda name: (f"{name}-first", "then"))
    monkeypatch.setattr(onnxruntime_runner, "create_session", on_the_cpu)
    more = "--backend", "onnxruntime-cuda"
    result, _ = run(tiny_bundle, tmp_path / "a.mp4", *more)
    assert "In ONNX Runtime on: cuda-first, then.\n" in result.output


def on_the_cpu(path, options, provider):
    return create_session(path, options, "cpu")
