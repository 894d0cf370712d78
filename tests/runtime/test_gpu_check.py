"""`scripts/gpu_check.py` with stand-ins: it compares every engine, and notices one that differs."""

import numpy as np
import pytest
import stand_in_tensorrt
from gpu_check import TOLERANCE, check
from stand_in_driver import StandInDriver
from stand_in_engines import store_engines
from stand_in_tensorrt import StandInLibrary

from mc_engines.building.bounds import VideoLimits
from mc_engines.building.library import Library
from mc_engines.bundle import Bundle
from mc_engines.device import opening
from mc_engines.device.cuda import Gpu
from mc_engines.device.opening import DeviceOptions
from mc_runtime import doctor
from mc_runtime.device_passes import ON_DEVICE, OPTIONAL_PARTS
from mc_runtime.options import GenerationOptions

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
    monkeypatch.setattr(opening, "compile_kernels", lambda capability: b"cubin 86")
    bundle, folder = Bundle.open(tiny_bundle), tmp_path / "engines"
    store_engines(bundle, folder, (*ON_DEVICE, *OPTIONAL_PARTS))
    limits = VideoLimits(32, 32, 17, 5)
    return lambda: check(bundle, DeviceOptions("tensorrt-rtx", limits, "fp32", folder), OPTIONS)


def test_every_engine_that_the_cpu_runs_too_is_compared(report):
    made = report()
    by_name = {line["component"]: line for line in made["engines"]}
    compared = {name for name, line in by_name.items() if line["error"] is not None}
    assert compared >= {"text_layer", "context", "embed", "block", "head", "vae_decoder_next"}
    assert all(line["good"] for name, line in by_name.items() if name in compared)
    assert set(made["not_checked"]) == set(by_name) - compared
    assert "combine" in made["not_checked"]
    assert made["generations"]["none"]["largest_difference_of_latents"] < 1e-4


def test_an_engine_that_computes_something_else_is_noticed(report, monkeypatch):
    compute = stand_in_tensorrt.compute

    def spoil(context, shapes, addresses, scratch):
        compute(context, shapes, addresses, scratch)
        if "head_modulation" in shapes:
            size = 4 * int(np.prod(shapes["out"][:2])) * 64
            patches = context.driver.view(addresses["patches"], size).view(np.float32)
            patches *= 1 + 2 * TOLERANCE["fp32"]

    monkeypatch.setattr(stand_in_tensorrt, "compute", spoil)
    bad = [line["component"] for line in report()["engines"] if line["error"] and not line["good"]]
    assert bad == ["head"]
