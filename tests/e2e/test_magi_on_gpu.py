"""A bundle of MAGI-1 with all of its parts on a GPU: engines of mc-build, and a stand-in for it."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from stand_in_driver import StandInDriver
from stand_in_engines import list_parts, store_engines
from stand_in_tensorrt import StandInLibrary

from mc_engines.build_cli import main as build
from mc_engines.building.bounds import VideoLimits
from mc_engines.building.library import Library, open_library
from mc_engines.building.partition import Part
from mc_engines.building.store import EngineStore
from mc_engines.bundle import Bundle
from mc_engines.device import opening
from mc_engines.device.cuda import Gpu
from mc_engines.engine_choice import Place, choose_engine
from mc_engines.errors import EngineError
from mc_runtime import generate_cli
from mc_runtime.device_passes import list_required
from mc_runtime.pipeline import VideoPipeline

CASE = Path(__file__).parent.parent / "golden" / "magi-a"
LIMITS = VideoLimits(height=64, width=96, max_frames=120, chunk_frames=6)
RUN = ["--prompt", "a cat walks", "--num-frames", 48, "--num-inference-steps", 4]
ON_GPU = ["--backend", "tensorrt-rtx", "--dtype", "fp32", "--engines"]


@pytest.fixture(scope="module")
def bundle(whole_magi_bundle):
    return whole_magi_bundle


def invoke(command, *arguments, code=0):
    result = CliRunner().invoke(command, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_a_video_from_engines_is_that_of_the_cpu(bundle, tmp_path, monkeypatch):
    driver = StandInDriver()
    library = Library("tensorrt-rtx", StandInLibrary(driver))
    for module in (opening, generate_cli):
        monkeypatch.setattr(module, "open_library", lambda backend: library)
    monkeypatch.setattr(opening, "open_gpu", lambda ordinal: Gpu(driver, ordinal))
    monkeypatch.setattr(opening, "compile_kernels", lambda capability: b"cubin 86")
    opened, engines = Bundle.open(bundle), tmp_path / "engines"
    store_engines(opened, engines, list_parts(opened), LIMITS)
    latents = {}
    for name, flags in {"gpu": [*ON_GPU, engines], "cpu": []}.items():
        files = ["-o", tmp_path / f"{name}.mp4", "--save-latents", tmp_path / f"{name}.npz"]
        said = invoke(generate_cli.main, bundle, *RUN, *flags, *files).stderr
        assert name == "cpu" or "On the CPU: timestep." in said
        latents[name] = np.load(tmp_path / f"{name}.npz")["latents"]
    assert driver.launches and driver.faults == []
    np.testing.assert_allclose(latents["gpu"], latents["cpu"], atol=2e-5)
    videos = [(tmp_path / f"{name}.mp4").stat().st_size for name in latents]
    assert videos[0] == pytest.approx(videos[1], rel=0.02)


def test_what_mc_build_builds_takes_what_mc_generate_asks_for(bundle, tmp_path):
    parts = list_required(Bundle.open(bundle))
    flags = ["--sm", 89, "--engines", tmp_path, *(f"--component={name}" for name in parts)]
    invoke(build, bundle, *flags)
    pipeline = VideoPipeline.from_bundle(bundle, threads=1)
    store = EngineStore(pipeline.bundle, tmp_path)
    version, options = open_library("tensorrt-rtx").version, pipeline.default_options
    limits = pipeline.limit_video(options)
    assert limits == LIMITS
    place = Place("tensorrt-rtx", version, 89, "bf16", limits)
    assert {choose_engine(store, Part(name), place).component for name in parts} == {*parts}
    larger = Place("tensorrt-rtx", version, 89, "bf16", VideoLimits(64, 96, 144, 6))
    with pytest.raises(EngineError, match=r"--max-frames 144 --causal-block-size 6"):
        choose_engine(store, Part("block"), larger)
