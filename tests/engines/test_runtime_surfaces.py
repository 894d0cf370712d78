"""An engine is loaded and run with calls that every version of TensorRT has; nothing computes."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from strict_library import make_library, read_surfaces

from mc_engines.building.library import Library
from mc_engines.device.arrays import DeviceArray
from mc_engines.device.cuda import Memory
from mc_engines.device.engine import DeviceEngine
from mc_engines.specs import GraphSpec, TensorSpec

SURFACES = read_surfaces(Path(__file__).parent / "data" / "surfaces.json")
BY_VERSION = {f"{each.library} {each.version}": each for each in SURFACES}
GRAPH = GraphSpec(
    "x.onnx", (TensorSpec("x", "float32", ("K", 4)),), (TensorSpec("y", "float32", ("K", 4)),)
)
STREAM = SimpleNamespace(handle=7)


class Runtime:
    def __init__(self, log):
        assert isinstance(log, self._library.ILogger)

    def deserialize_cuda_engine(self, plan):
        return self._library.ICudaEngine()


class CudaEngine:
    device_memory_size_v2 = 4096
    num_io_tensors = 2
    num_optimization_profiles = 1

    def get_tensor_name(self, number):
        return "xy"[number]

    def get_tensor_profile_shape(self, name, number):
        return (1, 4), (2, 4), (3, 4)

    def create_runtime_config(self):
        return self._library.IRuntimeConfig()

    def create_execution_context(self, how):
        return self._library.IExecutionContext()


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = None

    def set_execution_context_allocation_strategy(self, strategy):
        assert strategy == self._library.ExecutionContextAllocationStrategy.USER_MANAGED

    def create_runtime_cache(self):
        return self._library.IRuntimeCache()

    def set_runtime_cache(self, cache):
        self._cache = cache

    def get_runtime_cache(self):
        return self._cache


class RuntimeCache:
    def deserialize(self, data):
        self._data = data

    def serialize(self):
        return memoryview(self._data)


class ExecutionContext:
    def set_optimization_profile_async(self, number, stream):
        return True

    def set_device_memory(self, address, size):
        assert size >= CudaEngine.device_memory_size_v2

    def set_input_shape(self, name, shape):
        self._shape = shape
        return True

    def get_tensor_shape(self, name):
        return self._shape

    def set_tensor_address(self, name, address):
        return True

    def is_stream_capturable(self, stream):
        return True

    def execute_async_v3(self, handle):
        return handle == STREAM.handle


RUNNING = {
    "ICudaEngine": CudaEngine,
    "IExecutionContext": ExecutionContext,
    "IRuntimeCache": RuntimeCache,
    "IRuntimeConfig": RuntimeConfig,
    "Runtime": Runtime,
}


@pytest.mark.parametrize("version", BY_VERSION)
def test_every_version_runs_an_engine_with_calls_that_it_has(version: str) -> None:
    surface, rtx = BY_VERSION[version], version.startswith("tensorrt_rtx")
    made = make_library(surface, RUNNING)
    library = Library("tensorrt-rtx" if rtx else "tensorrt", made.module)
    engine = DeviceEngine(library, GRAPH, b"plan", "x.engine", b"compiled before")
    memory = Memory(256, 4096, "a test")
    context = engine.open_context(0, STREAM, memory)
    x, y = (DeviceArray(memory, place, np.dtype("float32"), (2, 4)) for place in (0, 256))
    context.bind({"x": x}, {}, {"y": y})
    assert context.can_be_captured(STREAM)
    context.enqueue(STREAM)
    assert engine.read_cache() == (b"compiled before" if rtx else None)
    assert made.count("IExecutionContext.execute_async_v3") == 1
    assert made.count("IExecutionContext.is_stream_capturable") == rtx
