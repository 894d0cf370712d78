"""Providers of ONNX Runtime for GPUs, with a stand-in: what is active is what was asked for."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mc_engines import onnxruntime_providers
from mc_engines.errors import EngineError, MissingExtraError
from mc_engines.onnxruntime_providers import create_session, try_provider

CUDA, CPU, PLUGIN = (
    "CUDAExecutionProvider",
    "CPUExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
)


class Options:
    """SessionOptions, as far as it is used."""

    devices = ()

    def add_provider_for_devices(self, devices, options):
        self.devices = devices


class OnnxRuntime:
    """The module: which providers there are, and which become active."""

    factor = 2
    SessionOptions = Options

    def __init__(self, available, active, devices=()):
        self.available, self.active, self.devices, self.libraries = available, active, devices, []

    def get_available_providers(self):
        return self.available

    def register_execution_provider_library(self, name, path):
        if path == "broken":
            raise RuntimeError("libcuda.so.1 is missing")
        self.libraries.append((name, path))

    def get_ep_devices(self):
        return [SimpleNamespace(ep_name=name) for name in self.devices]

    def InferenceSession(self, path, options, providers=()):
        self.asked = list(providers) or [device.ep_name for device in options.devices]

        def run(names, feeds):
            return [feeds["x"] * self.factor]

        return SimpleNamespace(get_providers=lambda: self.active, run=run)


@pytest.fixture
def install(monkeypatch):
    """Put a stand-in in the place of ONNX Runtime, and of the plug-in."""

    def install(module, plugin=None):
        monkeypatch.setitem(sys.modules, "onnxruntime", module)
        name = "onnxruntime_ep_nv_tensorrt_rtx"
        library = SimpleNamespace(get_library_path=lambda: plugin)
        monkeypatch.setitem(sys.modules, name, library if plugin else None)
        monkeypatch.setattr(onnxruntime_providers, "_registered", set())
        return module

    return install


def load(provider):
    return create_session(Path("block.onnx"), Options(), provider)


def test_cuda_is_asked_for_with_the_cpu_behind_it(install):
    module = install(OnnxRuntime([CUDA, CPU], [CUDA, CPU]))
    assert load("cuda").get_providers() == [CUDA, CPU]
    assert module.asked == [CUDA, CPU]


def test_the_cpu_is_asked_for_alone(install):
    module = install(OnnxRuntime([CUDA, CPU], [CPU]))
    load("cpu")
    assert module.asked == [CPU]


def test_a_provider_that_is_not_there_is_an_error(install):
    install(OnnxRuntime([CPU], [CPU]))
    with pytest.raises(EngineError, match=r"expected CUDAExecutionProvider, got \['CPU.*\[gpu\]"):
        load("cuda")


def test_falling_back_to_the_cpu_is_an_error(install):
    install(OnnxRuntime([CUDA, CPU], [CPU]))
    with pytest.raises(EngineError, match=r"block\.onnx: expected CUDA.*could not be loaded"):
        load("cuda")


def test_the_plug_in_is_registered_once_and_runs_on_its_own_devices(install):
    module = install(OnnxRuntime([CPU], [PLUGIN, CPU], ["other", PLUGIN]), "plugin.so")
    load("nv-tensorrt-rtx")
    load("nv-tensorrt-rtx")
    assert module.libraries == [(PLUGIN, "plugin.so")]
    assert module.asked == [PLUGIN]


def test_a_plug_in_without_a_gpu_is_an_error(install):
    install(OnnxRuntime([CPU], [CPU]), "plugin.so")
    with pytest.raises(EngineError, match=r"expected a GPU for NvTensorRTRTX.*, got none"):
        load("nv-tensorrt-rtx")


def test_a_plug_in_that_cannot_be_loaded_is_an_error(install):
    install(OnnxRuntime([CPU], [CPU]), "broken")
    with pytest.raises(EngineError, match=r"to load, got: libcuda\.so\.1 is missing"):
        load("nv-tensorrt-rtx")


def test_no_plug_in_is_an_error_with_the_command_that_installs_it(install):
    install(OnnxRuntime([CPU], [CPU]))
    with pytest.raises(MissingExtraError, match=r"motioncache\[plugin\]"):
        load("nv-tensorrt-rtx")


def test_a_provider_is_tried_with_an_addition_that_the_real_library_runs():
    assert try_provider("cpu") == (CPU,)


def test_what_is_active_is_returned_and_a_fallback_is_an_error(install):
    install(OnnxRuntime([CUDA, CPU], [CUDA, CPU]))
    assert try_provider("cuda") == (CUDA, CPU)
    install(OnnxRuntime([CUDA, CPU], [CPU]))
    with pytest.raises(EngineError, match=r"onnxruntime: expected CUDA.*could not be loaded"):
        try_provider("cuda")


def test_a_provider_that_computes_something_else_is_an_error(install):
    install(OnnxRuntime([CUDA, CPU], [CUDA, CPU])).factor = 3
    with pytest.raises(EngineError, match=r"expected 2 of 1 \+ 1 on CUDA.*, got \[3\.0\]"):
        try_provider("cuda")
