"""Arrays that lie on a GPU.

Neighbours: `cuda` has the memory and the streams; `Transfers` brings arrays over and back.
"""

__all__ = ["DeviceArray", "Transfers", "allocate_array", "allocate_block"]

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mc_engines.device.cuda import Gpu, Memory, Stream
from mc_engines.runner import Array
from mc_engines.specs import TensorSpec

_ALIGNMENT = 256  # what engines ask of addresses
_MOST_PINNED = 1 << 26  # bytes that transfers keep beyond what a single array needs


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A contiguous array on the GPU; keeps its memory alive.

    Attributes:
        memory: The block that it lies in.
        offset: Where it begins in the block, in bytes.
        dtype: Of its elements.
        shape: Axes in C order.
    """

    memory: Memory
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def address(self) -> int:
        """Of the first element, on the GPU."""
        return self.memory.address + self.offset

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    def reshape(self, *shape: int) -> "DeviceArray":
        """Take the first elements under another shape; nothing is copied.

        Args:
            *shape: May hold fewer elements.

        Returns:
            The same memory in that shape.

        Raises:
            ValueError: The shape holds more.
        """
        if math.prod(shape) > math.prod(self.shape):
            raise ValueError(
                f"{self.memory.purpose}: expected at most {self.shape} elements, got {shape}."
            )
        return replace(self, shape=shape)

    def last_rows(self, count: int) -> "DeviceArray":
        """The last rows along the second last axis, where the axes before it have one element."""
        *planes, rows, length = self.shape
        skipped = (rows - count) * length * self.dtype.itemsize
        return replace(self, offset=self.offset + skipped, shape=(*planes, count, length))


def allocate_array(
    gpu: Gpu, shape: tuple[int, ...], dtype: np.dtype[Any], purpose: str, remedy: str
) -> DeviceArray:
    """Allocate an array; arguments and errors as those of `Gpu.allocate`."""
    size = max(1, math.prod(shape) * dtype.itemsize)
    return DeviceArray(gpu.allocate(size, purpose, remedy), 0, dtype, shape)


def allocate_block(
    gpu: Gpu, specs: Sequence[TensorSpec], purpose: str, remedy: str
) -> dict[str, DeviceArray]:
    """Allocate arrays of fixed shapes side by side in one block; errors as `Gpu.allocate`."""
    places, size = [], 0
    for spec in specs:
        places.append(size)
        count = math.prod(int(axis) for axis in spec.shape)
        size += _align(count * spec.numpy_dtype.itemsize)
    memory = gpu.allocate(max(1, size), purpose, remedy)
    return {
        spec.name: DeviceArray(memory, place, spec.numpy_dtype, tuple(map(int, spec.shape)))
        for spec, place in zip(specs, places, strict=True)
    }


class Transfers:
    """Brings small arrays to the GPU and back, through pinned memory, in the order of a stream.

    A pinned block is filled from its start and used again after the stream was synchronised, which
    `fetch` does: a pass of the model uploads a little, computes, fetches, and waits once.

    Args:
        stream: That copies, and computes.
        size: Bytes of pinned memory to begin with; it grows until a pass waits once.
    """

    def __init__(self, stream: Stream, size: int = 1 << 20) -> None:
        self.stream = stream
        self._pinned = stream.gpu.allocate_host(size)
        self._used = 0

    def upload(self, array: Array, target: DeviceArray) -> DeviceArray:
        """Copy an array to where it fits; the host may change it right after.

        Args:
            array: Of the target's dtype, or cast to it.
            target: Where to; may be larger.

        Returns:
            The target in the array's shape.
        """
        placed = target.reshape(*array.shape)
        if placed.nbytes:
            offset = self._claim(placed.nbytes)
            view = self._pinned.bytes[offset : offset + placed.nbytes].view(target.dtype)
            view[:] = array.ravel()
            self.stream.upload(placed.address, self._pinned, offset, placed.nbytes)
        return placed

    def fetch(self, *sources: DeviceArray) -> list[Array]:
        """Wait for the stream, and copy arrays to the host as they are then.

        Args:
            *sources: On the GPU.

        Returns:
            The copies, in order.

        Raises:
            EngineError: Work of the stream failed.
        """
        size = sum(_align(source.nbytes) for source in sources)
        if self._used + size > len(self._pinned.bytes):
            self._drain(size)
        offsets = []
        for source in sources:
            offsets.append(self._claim(source.nbytes))
            self.stream.download(self._pinned, offsets[-1], source.address, source.nbytes)
        self.synchronise()
        return [
            self._pinned.bytes[offset : offset + source.nbytes]
            .view(source.dtype)
            .reshape(source.shape)
            .copy()
            for offset, source in zip(offsets, sources, strict=True)
        ]

    def synchronise(self) -> None:
        """Wait for the stream; the pinned memory is free again."""
        self.stream.synchronise()
        self._used = 0

    def _claim(self, size: int) -> int:
        """Return where so many pinned bytes are free, after waiting for them if there are none."""
        if self._used + size > len(self._pinned.bytes):
            self._drain(size)
        offset = self._used
        self._used += _align(size)
        return offset

    def _drain(self, size: int) -> None:
        """Wait, and make room for twice what there was to copy: it fits the next time."""
        wanted = 2 * (self._used + size)
        self.synchronise()
        wanted = max(size, min(wanted, _MOST_PINNED))
        if wanted > len(self._pinned.bytes):
            self._pinned = self.stream.gpu.allocate_host(wanted)


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
