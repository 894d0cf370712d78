"""The calls of the driver and of its compiler, held to cuda-bindings as installed; no GPU needed.

Without a driver every function of `cuda.bindings.driver` raises RuntimeError, but only after it has
packed its arguments: what it cannot pack is a TypeError.
"""

import gc
import re
from enum import IntEnum
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_in_driver import StandInDriver, StandInEvent, StandInStream

from mc_engines.device.arrays import Transfers, allocate_array
from mc_engines.device.cuda import Gpu
from mc_engines.device.kernels import RowMover, compile_kernels
from mc_engines.errors import EngineError

bindings = pytest.importorskip("cuda.bindings.driver", reason="no cuda-bindings (extra rtx)")
if Path("/proc/driver/nvidia").exists():
    pytest.skip("there is a driver, which would do what is asked", allow_module_level=True)

HANDLES = {  # what the stand-in's objects are in cuda-bindings, by their place in the arguments
    "cuCtxPushCurrent": bindings.CUcontext,
    "cuCtxSetCurrent": bindings.CUcontext,
    "cuGraphDestroy": bindings.CUgraph,
    "cuGraphExecDestroy": bindings.CUgraphExec,
    "cuGraphInstantiate": bindings.CUgraph,
    "cuGraphLaunch": bindings.CUgraphExec,
    "cuLaunchKernel": bindings.CUfunction,
    "cuModuleGetFunction": bindings.CUmodule,
}
DEVICES = {"cuDevicePrimaryCtxRetain": 0, "cuDeviceGetName": 1, "cuDeviceGetAttribute": 1}


class BindingsAndStandIn:
    """Gives every call to cuda-bindings, which must understand it, and then to the stand-in."""

    def __init__(self) -> None:
        self.stand_in, self.understood = StandInDriver(), set()

    def __getattr__(self, name: str) -> Any:
        if not re.match(r"cu[A-Z]", name):
            return getattr(bindings, name)  # the constants are the real ones

        def call(*arguments: Any) -> Any:
            translated = [self.translate(name, *each) for each in enumerate(arguments)]
            with pytest.raises(RuntimeError):
                getattr(bindings, name)(*translated)
            self.understood.add(name)
            return getattr(self.stand_in, name)(*arguments)

        return call

    def translate(self, function: str, place: int, value: Any) -> Any:
        if isinstance(value, StandInStream):
            return bindings.CUstream(1)
        if isinstance(value, StandInEvent):
            return bindings.CUevent(1)
        if DEVICES.get(function) == place:
            return bindings.CUdevice(value)
        if function in HANDLES and place == 0:
            return HANDLES[function](1)
        if isinstance(value, IntEnum) and function.startswith("cuGetError"):
            return bindings.CUresult(value)
        return value


def use_everything(driver: BindingsAndStandIn) -> None:
    gpu = Gpu(driver)
    stream, event = gpu.open_stream(), gpu.open_event()
    transfers, mover = Transfers(stream), RowMover(gpu, b"cubin 86")
    source, target = (allocate_array(gpu, (4, 8), np.dtype(np.float32), "a", "") for _ in "ab")
    rows = allocate_array(gpu, (4,), np.dtype(np.int32), "rows", "")
    transfers.upload(np.arange(32, dtype=np.float32).reshape(4, 8), source)
    transfers.upload(np.array([3, -1, 1, 0], np.int32), rows)
    stream.fill_zero(target.address, target.nbytes)

    def move() -> None:
        mover.move(stream, source, target, 4)
        mover.move(stream, source, target, 4, sources=rows)
        mover.move(stream, source, target, 4, sources=rows, targets=rows)

    move()
    graph = stream.capture(move)
    stream.replay(graph)
    stream.copy(target.address, source.address, target.nbytes)
    stream.record(event)
    stream.wait(event)
    stream.wait_on_host(event)
    np.testing.assert_array_equal(*transfers.fetch(source, target))
    with pytest.raises(EngineError, match="GPU memory"):
        gpu.allocate(1 << 40, "too much", "")
    with pytest.raises(EngineError, match="NO_BINARY"):
        RowMover(gpu, b"cubin 89")


def test_cuda_bindings_understands_every_call_of_the_driver() -> None:
    driver = BindingsAndStandIn()
    use_everything(driver)
    gc.collect()  # what is forgotten is given back
    code = files("mc_engines.device").joinpath("cuda.py").read_text()
    assert driver.understood == set(re.findall(r"\bcu[A-Z]\w+", code))


def test_cuda_bindings_understands_every_call_of_the_compiler() -> None:
    with pytest.raises(EngineError, match="compute capability 12"):
        compile_kernels(12)
    assert compile_kernels(86)[:4] == b"\x7fELF"
