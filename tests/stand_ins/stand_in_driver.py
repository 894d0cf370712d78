"""A stand-in for `cuda.bindings.driver` that keeps memory, streams, events and graphs in numpy.

Work is put off as long as CUDA may put it off: a stream does nothing before somebody waits for it,
and copies from pinned memory read what is there by then. Memory is filled with NaN when it is
allocated, and is never the same twice, so that whatever touches it after it was given back is
found. Everything wrong that a GPU would not report is collected in `faults`.
"""

import ctypes
import threading
from bisect import bisect_right
from collections import deque
from enum import IntEnum
from types import SimpleNamespace

import numpy as np

NO_GPU_TEXT = "no driver library"


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


OK = CUresult.CUDA_SUCCESS


class Fault(Exception):
    """Work that a GPU would do wrong."""


class StandInStream:
    def __init__(self, number):
        self.number, self.queue, self.done, self.captured = number, deque(), 0, None
        self.thread, self.spoilt = None, False  # of a recording

    def __int__(self):
        return 1000 + self.number


class StandInEvent:
    def __init__(self):
        self.stream, self.ticket = None, 0


class StandInDriver:
    """Functions and constants as far as the project uses them.

    Args:
        memory: Bytes of the GPU.
        capability: As (8, 6).
        eager: Other streams do their work as early as they may, instead of as late.
    """

    CUresult = CUresult
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, memory=1 << 30, capability=(8, 6), eager=False, devices=1):
        self.total, self.capability, self.eager, self.devices = memory, capability, eager, devices
        self.blocks, self.starts, self.next = {}, [], 1 << 40
        self.hosts, self.streams, self.graphs, self.faults = {}, [], 0, []
        self.freed_hosts = []  # kept, so that no other block gets their addresses
        self.kernels = {"move_rows": self.move_rows}
        self.launches, self.replays, self.peak = 0, 0, 0
        self.waits, self.frees = 0, 0  # the host waits for a stream, or for all of them
        self.lock = threading.RLock()  # memory is given back by any thread
        self.current = threading.local()  # context of each thread
        self.sticky = OK  # an error that every call reports from then on

    # Devices and errors

    def cuInit(self, flags):
        return (OK,)

    def cuDriverGetVersion(self):
        return OK, 13020

    def cuDeviceGetCount(self):
        return OK, self.devices

    def cuDeviceGet(self, ordinal):
        return OK, ordinal

    def cuDevicePrimaryCtxRetain(self, device):
        return OK, f"context {device}"

    @property
    def contexts(self):
        """Of the calling thread, the current one last."""
        return vars(self.current).setdefault("contexts", [None])

    def cuCtxSetCurrent(self, context):
        self.contexts[-1] = context
        return (self.sticky,)

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return (self.sticky,)

    def cuCtxPopCurrent(self):
        return OK, self.contexts.pop()

    def cuDeviceGetName(self, length, device):
        return OK, b"Stand-in\0\0\0"

    def cuDeviceGetAttribute(self, attribute, device):
        return OK, self.capability[attribute - 75]

    def cuGetErrorName(self, status):
        return OK, CUresult(status).name.encode()

    def cuGetErrorString(self, status):
        return OK, CUresult(status).name.removeprefix("CUDA_ERROR_").lower().encode()

    # Memory

    def cuMemGetInfo(self):
        return OK, self.total - sum(map(len, self.blocks.values())), self.total

    def cuMemAlloc(self, size):
        if self.contexts[-1] is None:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, 0
        if any(stream.captured is not None for stream in self.streams):
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 0
        if size > self.cuMemGetInfo()[1]:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0
        address, self.next = self.next, self.next + (size // 256 + 2) * 256
        self.blocks[address] = np.full(size, 0xFF, np.uint8)
        self.starts.append(address)
        self.peak = max(self.peak, sum(map(len, self.blocks.values())))
        return OK, address

    def cuMemFree(self, address):
        if self.contexts[-1] is None:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        for stream in self.streams:
            if stream.captured is not None and stream.thread == threading.get_ident():
                stream.spoilt = True
                return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self.frees += 1
        for stream in self.streams:
            self.drain(stream)
        del self.blocks[address]
        return (OK,)

    def cuMemHostAlloc(self, size, flags):
        block = np.full(size, 0xFF, np.uint8)
        self.hosts[block.ctypes.data] = block
        return OK, block.ctypes.data

    def cuMemFreeHost(self, address):
        self.freed_hosts.append(self.hosts.pop(address))
        return (OK,)

    def view_host(self, address, size):
        """The bytes at an address of the host; a fault where pinned memory was given back."""
        for block in self.freed_hosts:
            if 0 <= address - block.ctypes.data < len(block):
                raise Fault(f"pinned memory at {address:#x} that was given back")
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def view(self, address, size):
        """The bytes at an address of the GPU; a fault where they belong to no one block."""
        place = bisect_right(self.starts, address) - 1
        start = self.starts[place] if place >= 0 else None
        if start not in self.blocks or address + size > start + len(self.blocks[start]):
            raise Fault(f"illegal address {address:#x} of {size} bytes")
        return self.blocks[start][address - start : address - start + size]

    # Streams, events, graphs

    def cuStreamCreate(self, flags):
        self.streams.append(StandInStream(len(self.streams)))
        return OK, self.streams[-1]

    def cuStreamDestroy(self, stream):
        return (OK,)

    def put(self, stream, work):
        if stream.captured is not None:
            stream.captured.append(work)
        else:
            stream.queue.append(work)
            if self.eager and stream.number > 0:
                self.drain(stream)

    def drain(self, stream, until=None):
        """Do the work of a stream, all or up to a ticket."""
        with self.lock:
            self.drain_alone(stream, until)

    def drain_alone(self, stream, until):
        while stream.queue and (until is None or stream.done < until):
            work = stream.queue.popleft()
            stream.done += 1
            try:
                work()
            except Fault as fault:
                self.faults.append(str(fault))

    def cuStreamSynchronize(self, stream):
        if stream.captured is not None:
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self.waits += 1
        self.drain(stream)
        return (CUresult.CUDA_ERROR_ILLEGAL_ADDRESS if self.faults else OK,)

    def cuEventCreate(self, flags):
        return OK, StandInEvent()

    def cuEventDestroy(self, event):
        return (OK,)

    def cuEventRecord(self, event, stream):
        event.stream, event.ticket = stream, stream.done + len(stream.queue)
        return (OK,)

    def cuStreamWaitEvent(self, stream, event, flags):
        other, ticket = event.stream, event.ticket
        self.put(stream, lambda: self.drain(other, ticket))
        return (OK,)

    def cuEventSynchronize(self, event):
        self.drain(event.stream, event.ticket)
        return (OK,)

    def cuStreamBeginCapture(self, stream, mode):
        stream.captured, stream.thread, stream.spoilt = [], threading.get_ident(), False
        return (OK,)

    def cuStreamEndCapture(self, stream):
        captured, stream.captured = stream.captured, None
        if stream.spoilt:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        self.graphs += 1
        return OK, captured

    def cuGraphInstantiate(self, graph, flags):
        return OK, list(graph)

    def cuGraphDestroy(self, graph):
        self.graphs -= 1
        return (OK,)

    def cuGraphExecDestroy(self, graph):
        return (OK,)

    def cuGraphLaunch(self, graph, stream):
        self.replays += 1
        for work in graph:
            self.put(stream, work)
        return (OK,)

    # Copies

    def cuMemcpyHtoDAsync(self, target, source, size, stream):
        def work():
            self.view(target, size)[:] = self.view_host(source, size)

        self.put(stream, work)
        return (OK,)

    def cuMemcpyDtoHAsync(self, target, source, size, stream):
        def work():
            self.view_host(target, size)[:] = self.view(source, size)

        self.put(stream, work)
        return (OK,)

    def cuMemcpyDtoDAsync(self, target, source, size, stream):
        def work():
            self.view(target, size)[:] = self.view(source, size)

        self.put(stream, work)
        return (OK,)

    def cuMemsetD8Async(self, address, value, size, stream):
        def work():
            self.view(address, size)[:] = value

        self.put(stream, work)
        return (OK,)

    # Kernels

    def cuModuleLoadData(self, image):
        if image != f"cubin {self.capability[0]}{self.capability[1]}".encode():
            return CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU, None
        return OK, image

    def cuModuleGetFunction(self, module, name):
        return OK, self.kernels[name.decode()]

    def cuLaunchKernel(self, function, *arguments):
        *_, stream, (values, types), _ = arguments
        assert len(values) == len(types)
        if None in values:  # as cuda.bindings, which cannot pack it
            raise TypeError("expected a value of every argument, got None")
        self.launches += 1
        self.put(stream, lambda: function(*values))
        return (OK,)

    def move_rows(self, source, froms, source_rows, target, tos, target_rows, planes, count, units):
        """What kernels.cu computes, in numpy."""
        chosen = [
            np.arange(count) if not rows else self.view(rows, 4 * count).view(np.int32)
            for rows in (froms, tos)
        ]
        keep = (chosen[0] >= 0) & (chosen[1] >= 0)
        get, put = (rows[keep] for rows in chosen)
        if (get >= source_rows).any() or (put >= target_rows).any():
            raise Fault("a row beyond the array")
        length = 16 * units
        given = self.view(source, planes * source_rows * length).reshape(planes, -1, length)
        taken = self.view(target, planes * target_rows * length).reshape(planes, -1, length)
        taken[:, put] = given[:, get]
