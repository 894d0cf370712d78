"""A graph on a GPU behind the life cycle of every runner.

Neighbours: `Device` does the work; the transformer's blocks are driven by
`mc_runtime.device_passes` instead, which leaves everything on the GPU.
"""

__all__ = ["DeviceRunner"]

from collections.abc import Mapping
from typing import Any

import numpy as np

from mc_engines.device.arrays import DeviceArray, allocate_array
from mc_engines.device.device import Device
from mc_engines.runner import Arrays, check_inputs
from mc_engines.specs import GraphSpec, TensorSpec, split_size

_REMEDY = "Generate a smaller video, or close what else uses the GPU."
_SIXTEEN_BITS = "float16", "bfloat16"


class DeviceRunner:
    """An engine that takes and gives arrays of the host, floats as float32.

    Safe to call from several threads: one after the other uses the GPU.

    Args:
        device: Has the engine.
        component: Whose engine it is.
        resident: Outputs that stay on the GPU: they come as `DeviceArray`, to be given back as
            inputs of the next call, as the states of the VAE are.

    Attributes:
        graph: The tensors it takes and gives.
    """

    def __init__(
        self, device: Device, component: str, resident: frozenset[str] = frozenset()
    ) -> None:
        self.graph: GraphSpec = device.engines[component].graph
        self._device, self._component, self._resident = device, component, resident
        self._rooms: dict[str, DeviceArray] = {}

    def run(self, inputs: Arrays, weights: Arrays | None = None) -> dict[str, Any]:
        """Compute the outputs of the graph.

        Args:
            inputs: One array per spec of `graph.inputs`, float32 where the engine takes 16 bits; or
                what an earlier call left on the GPU.
            weights: One array per spec of `graph.weights`; None where the graph has none.

        Returns:
            One array per spec of `graph.outputs`.

        Raises:
            ValueError: A name, dtype or shape is not the one of the spec.
            EngineError: A shape is outside the profiles, or the GPU failed.
        """
        device = self._device
        given = _narrow(self.graph.inputs, inputs)
        constant = _narrow(self.graph.weights, weights or {})
        check_inputs(self.graph, given, constant)
        with device.lock:
            device.gpu.use()
            placed, fixed = self._place(given), self._place(constant)
            outputs = self._allocate_outputs(placed)
            device.enqueue(self._component, placed, outputs, fixed)
            wanted = [name for name in outputs if name not in self._resident]
            fetched = device.transfers.fetch(*(outputs[name] for name in wanted))
        return outputs | {name: _widen(array) for name, array in zip(wanted, fetched, strict=True)}

    def _place(self, arrays: Mapping[str, Any]) -> dict[str, DeviceArray]:
        """Bring arrays to the GPU, each into its own room, which grows."""
        return {
            name: array if isinstance(array, DeviceArray) else self._upload(name, array)
            for name, array in arrays.items()
        }

    def _upload(self, name: str, array: Any) -> DeviceArray:
        room = self._rooms.get(name)
        if room is None or room.nbytes < array.nbytes:
            purpose = f"input '{name}' of {self.graph.file}"
            room = allocate_array(self._device.gpu, array.shape, array.dtype, purpose, _REMEDY)
            self._rooms[name] = room
        return self._device.transfers.upload(array, room)

    def _allocate_outputs(self, inputs: Mapping[str, DeviceArray]) -> dict[str, DeviceArray]:
        """Allocate the outputs, their sizes those of the inputs' symbols."""
        sizes: dict[str, int] = {}
        for spec in self.graph.inputs:
            for symbol, size in zip(spec.shape, inputs[spec.name].shape, strict=True):
                if isinstance(symbol, str):
                    factor, name = split_size(symbol)
                    sizes[name] = size // factor
        return {
            spec.name: allocate_array(
                self._device.gpu,
                tuple(_resolve(size, sizes) for size in spec.shape),
                spec.numpy_dtype,
                f"output '{spec.name}' of {self.graph.file}",
                _REMEDY,
            )
            for spec in self.graph.outputs
        }


def _narrow(specs: tuple[TensorSpec, ...], arrays: Arrays) -> dict[str, Any]:
    """Cast float32 to the 16 bits that an engine takes; nothing else is cast."""
    dtypes = {spec.name: spec.numpy_dtype for spec in specs if spec.dtype in _SIXTEEN_BITS}
    return {
        name: array.astype(dtypes[name]) if name in dtypes and array.dtype == np.float32 else array
        for name, array in arrays.items()
    }


def _resolve(size: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    factor, name = split_size(size)
    return factor * sizes[name]


def _widen(array: Any) -> Any:
    return array.astype(np.float32) if array.dtype.name in _SIXTEEN_BITS else array
