"""A GPU through the driver API of CUDA: memory, streams, events, graphs, kernels.

This is the one place that calls `cuda.bindings`; everything else speaks of arrays and streams.
Neighbours: `arrays` gives memory a dtype and a shape, `kernels` has the code that is launched.

Work is put on a stream and done later. What it reads and writes has to live until the stream is
synchronised; `Memory` is therefore given back only when nothing refers to it any more, which waits
for the GPU (cuMemFree does). While work is recorded nothing is given back, since that would spoil
the recording; it is afterwards.
"""

__all__ = ["Event", "Gpu", "Graph", "HostMemory", "Kernel", "Memory", "Stream", "open_gpu"]

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.errors import EngineError, require

_EXTRA = "rtx"


@dataclass(frozen=True, eq=False)
class Memory:
    """A block of the GPU's memory; given back when it is forgotten.

    Attributes:
        address: On the GPU, at least 256-byte aligned.
        size: Bytes.
        purpose: What it holds, for messages.
    """

    address: int
    size: int
    purpose: str


@dataclass(frozen=True, eq=False)
class HostMemory:
    """A block of the host's memory that the GPU copies from and to while the host goes on.

    Attributes:
        address: On the host.
        bytes: The block, shape (size,), uint8.
    """

    address: int
    bytes: NDArray[np.uint8]


@dataclass(frozen=True)
class Kernel:
    """A function that runs on the GPU.

    Attributes:
        handle: Of the driver.
        name: For messages.
        module: That it belongs to; must live as long.
    """

    handle: Any
    name: str
    module: Any


class Gpu:
    """One GPU, in its primary context, which other libraries of the process share.

    Args:
        driver: `cuda.bindings.driver`, or what stands in for it.
        ordinal: Number of the GPU.

    Attributes:
        name: Of the product.
        capability: Compute capability, as 86 for 8.6.

    Raises:
        EngineError: There is no driver, or no such GPU.
    """

    def __init__(self, driver: Any, ordinal: int = 0) -> None:
        self._driver = driver
        self._recording: set[Stream] = set()
        self._unwanted: deque[tuple[str, Any]] = deque()
        try:
            self.call("cuInit", 0)
        except RuntimeError as error:  # cuda.bindings finds no driver library
            raise EngineError(
                "GPU: expected an NVIDIA driver, got none. Install it; mc-generate --backend cpu "
                "needs none."
            ) from error
        (count,) = self.call("cuDeviceGetCount")
        if not 0 <= ordinal < count:
            raise EngineError(
                f"GPU: expected number {ordinal}, got {count} in all. Choose another."
            )
        (self._device,) = self.call("cuDeviceGet", ordinal)
        (self._context,) = self.call("cuDevicePrimaryCtxRetain", self._device)
        self.use()
        (name,) = self.call("cuDeviceGetName", 256, self._device)
        self.name = name.partition(b"\0")[0].decode()
        attribute = driver.CUdevice_attribute
        major, minor = (
            self.call("cuDeviceGetAttribute", each, self._device)[0]
            for each in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self.capability = 10 * int(major) + int(minor)

    def call(self, function: str, *arguments: Any) -> tuple[Any, ...]:
        """Call a function of the driver.

        Args:
            function: Its name.
            *arguments: As cuda.bindings takes them.

        Returns:
            What it returns beside its status.

        Raises:
            EngineError: The driver reports an error.
        """
        status, *values = getattr(self._driver, function)(*arguments)
        if int(status) != 0:
            raise EngineError(
                f"GPU: {function}: expected success, got {self._describe(status)}. "
                "Look at the driver's messages in the system log."
            )
        return tuple(values)

    def _describe(self, status: Any) -> str:
        texts = [
            getattr(self._driver, function)(status)[1]
            for function in ("cuGetErrorName", "cuGetErrorString")
        ]
        return ": ".join(text.decode() for text in texts if text)

    def use(self) -> None:
        """Make this GPU the one of the calling thread."""
        self.call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> tuple[int, int]:
        """Return how much memory is free, and how much there is, in bytes."""
        free, total = self.call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, size: int, purpose: str, remedy: str) -> Memory:
        """Allocate memory.

        Args:
            size: Bytes, at least 1.
            purpose: What it will hold.
            remedy: What helps where there is not enough of it.

        Returns:
            The block; its content is undefined.

        Raises:
            EngineError: There is not enough.
        """
        status, address = self._driver.cuMemAlloc(size)
        if status == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = self.free_bytes()
            raise EngineError(
                f"GPU memory: expected {size / 1e6:,.1f} MB for {purpose}, got "
                f"{free / 1e6:,.1f} MB free of {total / 1e6:,.0f}. {remedy}"
            )
        if int(status) != 0:
            raise EngineError(
                f"GPU: cuMemAlloc: expected room for {purpose}, got {self._describe(status)}. "
                "Look at the driver's messages in the system log."
            )
        memory = Memory(int(address), size, purpose)
        weakref.finalize(memory, self._give_back, "cuMemFree", int(address))
        return memory

    def allocate_host(self, size: int) -> HostMemory:
        """Allocate pinned memory of the host, in bytes; raises EngineError where there is none."""
        (address,) = self.call("cuMemHostAlloc", size, 0)
        block = (ctypes.c_uint8 * size).from_address(int(address))
        memory = HostMemory(int(address), np.ctypeslib.as_array(block))
        weakref.finalize(memory, self._give_back, "cuMemFreeHost", int(address))
        return memory

    def _give_back(self, function: str, handle: Any) -> None:
        """Free what is forgotten, or leave that to the end of a recording; any thread may come."""
        self._unwanted.append((function, handle))
        self._free_unwanted()

    def _free_unwanted(self) -> None:
        while self._unwanted and not self._recording:
            with suppress(IndexError):  # another thread was faster
                self._free(*self._unwanted.popleft())

    def _free(self, function: str, handle: Any) -> None:
        """Call a function on this GPU; the thread's own stays current. Failures do not matter.

        They come at the end of a process, and after a failure that the GPU does not recover from.
        """
        (status,) = self._driver.cuCtxPushCurrent(self._context)
        if int(status) == 0:
            getattr(self._driver, function)(handle)
            self._driver.cuCtxPopCurrent()

    @contextmanager
    def nothing_freed(self, stream: "Stream") -> Generator[None]:
        """While a stream records, put off giving back what is forgotten."""
        self._recording.add(stream)
        try:
            yield
        finally:
            self._recording.discard(stream)
            self._free_unwanted()

    def open_stream(self) -> "Stream":
        """Open a stream that waits for no other."""
        flags = self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        (handle,) = self.call("cuStreamCreate", flags)
        stream = Stream(self, handle)
        weakref.finalize(stream, self._give_back, "cuStreamDestroy", handle)
        return stream

    def open_event(self) -> "Event":
        """Open an event, which keeps no time."""
        flags = self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
        (handle,) = self.call("cuEventCreate", flags)
        event = Event(handle)
        weakref.finalize(event, self._give_back, "cuEventDestroy", handle)
        return event

    def load_kernels(self, image: bytes, names: Sequence[str]) -> dict[str, Kernel]:
        """Load kernels that were compiled for this GPU.

        Args:
            image: A cubin.
            names: Of the functions in it.

        Returns:
            Them by name.

        Raises:
            EngineError: The image is not for this GPU, or lacks a function.
        """
        (module,) = self.call("cuModuleLoadData", image)
        handles = {name: self.call("cuModuleGetFunction", module, name.encode()) for name in names}
        return {name: Kernel(handle, name, module) for name, (handle,) in handles.items()}


@dataclass(frozen=True, eq=False)
class Event:
    """A point on a stream that another stream, or the host, can wait for."""

    handle: Any


@dataclass(frozen=True, eq=False)
class Graph:
    """Recorded work that is launched at once."""

    handle: Any


class Stream:
    """Work that is done in order. `handle` is what libraries take."""

    def __init__(self, gpu: Gpu, handle: Any) -> None:
        self.gpu = gpu
        self.handle = handle

    def upload(self, address: int, source: HostMemory, offset: int, size: int) -> None:
        """Copy pinned bytes to the GPU; they must not change until that is done."""
        self.gpu.call("cuMemcpyHtoDAsync", address, source.address + offset, size, self.handle)

    def download(self, target: HostMemory, offset: int, address: int, size: int) -> None:
        """Copy bytes to pinned memory; they are there after `synchronise`."""
        self.gpu.call("cuMemcpyDtoHAsync", target.address + offset, address, size, self.handle)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes from address to address on the GPU."""
        self.gpu.call("cuMemcpyDtoDAsync", target, source, size, self.handle)

    def fill_zero(self, address: int, size: int) -> None:
        """Set bytes on the GPU to zero."""
        self.gpu.call("cuMemsetD8Async", address, 0, size, self.handle)

    def launch(self, kernel: Kernel, blocks: int, threads: int, *arguments: Any) -> None:
        """Launch a kernel.

        Args:
            kernel: What to run.
            blocks: Of the grid.
            threads: Of a block.
            *arguments: Values of ctypes types, as the kernel declares them.
        """
        # The value of a null pointer is None in ctypes; cuda-bindings 13.5 takes 0 alone.
        values = tuple(each.value or 0 for each in arguments)
        types = tuple(type(each) for each in arguments)
        self.gpu.call(
            "cuLaunchKernel",
            kernel.handle,
            *(blocks, 1, 1),
            *(threads, 1, 1),
            *(0, self.handle),
            (values, types),
            0,
        )

    def record(self, event: Event) -> None:
        """Let an event happen when all work so far is done."""
        self.gpu.call("cuEventRecord", event.handle, self.handle)

    def wait(self, event: Event) -> None:
        """Do no further work before an event, as it was recorded last."""
        self.gpu.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def wait_on_host(self, event: Event) -> None:
        """Let the host wait for an event."""
        self.gpu.call("cuEventSynchronize", event.handle)

    def synchronise(self) -> None:
        """Let the host wait for all work of the stream.

        Raises:
            EngineError: Some of it failed.
        """
        self.gpu.call("cuStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], object]) -> Graph:
        """Record work instead of doing it.

        Args:
            work: Puts it on this stream, and nothing else.

        Returns:
            The graph; what the work touches must outlive it.

        Raises:
            EngineError: The work cannot be recorded.
        """
        with self.gpu.nothing_freed(self):
            recorded = self._record_graph(work)
        try:
            (handle,) = self.gpu.call("cuGraphInstantiate", recorded, 0)
        finally:
            self.gpu._driver.cuGraphDestroy(recorded)
        graph = Graph(handle)
        weakref.finalize(graph, self.gpu._give_back, "cuGraphExecDestroy", handle)
        return graph

    def _record_graph(self, work: Callable[[], object]) -> Any:
        driver = self.gpu._driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.gpu.call("cuStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            status, recorded = driver.cuStreamEndCapture(self.handle)
            if int(status) == 0:  # what was recorded before the error
                driver.cuGraphDestroy(recorded)
            raise
        (recorded,) = self.gpu.call("cuStreamEndCapture", self.handle)
        return recorded

    def replay(self, graph: Graph) -> None:
        """Do recorded work."""
        self.gpu.call("cuGraphLaunch", graph.handle, self.handle)


def open_gpu(ordinal: int = 0) -> Gpu:
    """Find the driver of CUDA and take one of its GPUs.

    Args:
        ordinal: Its number.

    Returns:
        The GPU.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        EngineError: There is no driver, or no such GPU.
    """
    return Gpu(require("cuda.bindings.driver", _EXTRA), ordinal)
