"""Weights of a component's layers on a GPU: all of them, or two at a time.

Neighbours: the bundle maps the weight files; whoever enqueues a layer calls `use` before and `done`
after it.
"""

__all__ = ["LayerWeights", "ResidentWeights", "StreamedWeights", "count_bytes"]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mc_engines.device.arrays import DeviceArray, Transfers, allocate_block
from mc_engines.device.cuda import Event, HostMemory, Memory, Stream
from mc_engines.runner import Arrays
from mc_engines.specs import TensorSpec

_EMPTY = -1
_REMEDY = "Pass --max-vram with less than is free, so that layers are streamed."


class LayerWeights(Protocol):
    """The weights of layers, as one layer after the other is enqueued on a stream."""

    @property
    def stay(self) -> bool:
        """Whether the addresses of a layer are the same in every pass."""
        ...

    def use(self, layer: int) -> Mapping[str, DeviceArray]:
        """Return a layer's weights, which are there when the work enqueued next is done."""
        ...

    def done(self, layer: int) -> None:
        """Say that everything that reads the layer's weights has been enqueued."""
        ...


class ResidentWeights:
    """All layers, uploaded once.

    Args:
        stream: To upload with.
        specs: Of a layer's weights.
        layers: How many.
        load: Gives those of a layer, mapped or cast.
        component: For messages.

    Raises:
        EngineError: They do not fit.
    """

    stay = True

    def __init__(
        self,
        stream: Stream,
        specs: Sequence[TensorSpec],
        layers: int,
        load: Callable[[int], Arrays],
        component: str,
    ) -> None:
        self._layers, transfers = [], Transfers(stream)
        for layer in range(layers):
            purpose = f"the weights of {component}, layer {layer + 1} of {layers}"
            block = allocate_block(stream.gpu, specs, purpose, _REMEDY)
            for name, array in load(layer).items():
                transfers.upload(array, block[name])
            self._layers.append(block)
        transfers.synchronise()  # its pinned memory is not needed any more

    def use(self, layer: int) -> Mapping[str, DeviceArray]:
        """Return a layer's weights."""
        return self._layers[layer]

    def done(self, layer: int) -> None:
        """Nothing to do: they stay."""


@dataclass(eq=False)
class _Slot:
    """Room for one layer.

    Attributes:
        arrays: On the GPU, in one block.
        memory: That block.
        pinned: The same bytes on the host, on their way.
        copied: Happens when the GPU has them.
        used: Happens when nothing enqueued so far reads them any more.
        layer: Whose they are, or will be.
    """

    arrays: dict[str, DeviceArray]
    memory: Memory
    pinned: HostMemory
    copied: Event
    used: Event
    layer: int = _EMPTY


class StreamedWeights:
    """Two layers at a time: while one is computed, the next is copied by a stream of its own.

    Args:
        stream: That computes.
        specs: Of a layer's weights.
        layers: How many.
        load: Gives those of a layer, mapped or cast.
        component: For messages.

    Raises:
        EngineError: Not even two layers fit.
    """

    stay = False

    def __init__(
        self,
        stream: Stream,
        specs: Sequence[TensorSpec],
        layers: int,
        load: Callable[[int], Arrays],
        component: str,
    ) -> None:
        self._compute = stream
        self._copy = stream.gpu.open_stream()
        self._layers, self._load = layers, load
        self._slots = [self._open_slot(specs, component) for _ in range(2)]

    def _open_slot(self, specs: Sequence[TensorSpec], component: str) -> _Slot:
        gpu = self._compute.gpu
        purpose = f"two layers of {component} on their way"
        arrays = allocate_block(gpu, specs, purpose, "Choose a smaller model or video.")
        memory = next(iter(arrays.values())).memory
        pinned = gpu.allocate_host(memory.size)
        slot = _Slot(arrays, memory, pinned, gpu.open_event(), gpu.open_event())
        self._copy.record(slot.copied)
        self._compute.record(slot.used)
        return slot

    def use(self, layer: int) -> Mapping[str, DeviceArray]:
        """Return a layer's weights, and begin to fetch those of the next."""
        slot = self._fetch(layer, keep=_EMPTY)
        self._compute.wait(slot.copied)
        if self._layers > 1:
            self._fetch((layer + 1) % self._layers, keep=layer)
        return slot.arrays

    def done(self, layer: int) -> None:
        """Let the copies into the layer's slot wait for what was enqueued so far."""
        (slot,) = (slot for slot in self._slots if slot.layer == layer)
        self._compute.record(slot.used)

    def _fetch(self, layer: int, keep: int) -> _Slot:
        """Let a layer be copied into the slot that holds another than `keep`, if it is in none."""
        for slot in self._slots:
            if slot.layer == layer:
                return slot
        slot = next(slot for slot in self._slots if slot.layer == _EMPTY or slot.layer != keep)
        slot.layer = _EMPTY  # it has neither layer if loading fails half way
        self._copy.wait_on_host(slot.copied)  # the pinned bytes are still on their way before it
        for name, array in self._load(layer).items():
            target = slot.arrays[name]
            end = target.offset + target.nbytes
            view = slot.pinned.bytes[target.offset : end].view(target.dtype)
            view[:] = array.ravel()
        self._copy.wait(slot.used)
        self._copy.upload(slot.memory.address, slot.pinned, 0, slot.memory.size)
        self._copy.record(slot.copied)
        slot.layer = layer
        return slot


def count_bytes(specs: Sequence[TensorSpec]) -> int:
    """Return how much the tensors of these fixed shapes take, in bytes."""
    return sum(
        math.prod(int(size) for size in spec.shape) * spec.numpy_dtype.itemsize for spec in specs
    )
