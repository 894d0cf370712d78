"""A graph on a GPU behind the life cycle of every runner.

Neighbours: `DeviceEngine` does the work; the transformer's blocks are driven by
`mc_runtime.device_transformer` instead, which leaves everything on the GPU.
"""

__all__ = ["DeviceRunner", "allocate_outputs"]

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from mc_engines.device.arrays import DeviceArray, Transfers, allocate_array
from mc_engines.device.cuda import Gpu, Memory
from mc_engines.device.engine import Context, DeviceEngine
from mc_engines.runner import Arrays
from mc_engines.specs import GraphSpec, TensorSpec

_REMEDY = "Generate a smaller video, or close what else uses the GPU."
_SIXTEEN_BITS = "float16", "bfloat16"


class DeviceRunner:
    """An engine that takes and gives arrays of the host, floats as float32.

    Safe to call from several threads: one after the other uses the GPU.

    Args:
        engine: That runs.
        transfers: To and from the GPU; its stream computes.
        scratch: For the engine's contexts.
        lock: Held while the GPU is used; of everything that shares the stream.
        resident: Outputs that stay on the GPU: they come as `DeviceArray`, to be given back as
            inputs of the next call, as the states of the VAE are.

    Attributes:
        graph: The tensors it takes and gives.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        transfers: Transfers,
        scratch: Memory,
        lock: threading.RLock,
        resident: frozenset[str] = frozenset(),
    ) -> None:
        self.graph: GraphSpec = engine.graph
        self._engine, self._transfers, self._scratch = engine, transfers, scratch
        self._lock, self._resident = lock, resident
        self._contexts: dict[int, Context] = {}
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
        with self._lock:
            stream = self._transfers.stream
            stream.gpu.use()
            placed = {
                **self._place(self.graph.inputs, inputs),
                **self._place(self.graph.weights, weights or {}),
            }
            number = self._engine.choose_profile(placed)
            if number not in self._contexts:
                self._contexts[number] = self._engine.open_context(number, stream, self._scratch)
            outputs = allocate_outputs(stream.gpu, self.graph, placed)
            names = {spec.name for spec in self.graph.inputs}
            given = {name: array for name, array in placed.items() if name in names}
            rest = {name: array for name, array in placed.items() if name not in names}
            context = self._contexts[number]
            context.bind(given, rest, outputs)
            context.enqueue(stream)
            wanted = [name for name in outputs if name not in self._resident]
            fetched = self._transfers.fetch(*(outputs[name] for name in wanted))
        return outputs | {name: _widen(array) for name, array in zip(wanted, fetched, strict=True)}

    def _place(self, specs: tuple[TensorSpec, ...], arrays: Arrays) -> dict[str, DeviceArray]:
        """Bring arrays to the GPU, each into its own room, which grows; check the names."""
        expected, got = sorted(spec.name for spec in specs), sorted(arrays)
        if expected != got:
            raise ValueError(f"{self.graph.file}: expected inputs {expected}, got {got}.")
        return {spec.name: self._upload(spec, arrays[spec.name]) for spec in specs}

    def _upload(self, spec: TensorSpec, array: Any) -> DeviceArray:
        if isinstance(array, DeviceArray):
            return array
        if spec.dtype in _SIXTEEN_BITS and array.dtype == np.float32:
            array = array.astype(spec.numpy_dtype)
        if array.dtype != spec.numpy_dtype:
            raise ValueError(
                f"{self.graph.file}: input '{spec.name}': expected {spec.describe()}, got "
                f"{array.dtype} {array.shape}."
            )
        room = self._rooms.get(spec.name)
        if room is None or room.nbytes < array.nbytes:
            purpose = f"input '{spec.name}' of {self.graph.file}"
            gpu = self._transfers.stream.gpu
            room = allocate_array(gpu, array.shape, spec.numpy_dtype, purpose, _REMEDY)
            self._rooms[spec.name] = room
        return self._transfers.upload(array, room)


def allocate_outputs(
    gpu: Gpu, graph: GraphSpec, inputs: Mapping[str, DeviceArray]
) -> dict[str, DeviceArray]:
    """Allocate a graph's outputs, their sizes those of the inputs' symbols.

    Args:
        gpu: To allocate on.
        graph: Its specs.
        inputs: Inputs and weights by name.

    Returns:
        New arrays by name.

    Raises:
        EngineError: There is not enough memory.
    """
    sizes: dict[str, int] = {}
    for spec in graph.inputs:
        for symbol, size in zip(spec.shape, inputs[spec.name].shape, strict=True):
            if isinstance(symbol, str):
                factor, _, name = symbol.rpartition("*")
                sizes[name] = size // int(factor or 1)
    return {
        spec.name: allocate_array(
            gpu,
            tuple(_resolve(size, sizes) for size in spec.shape),
            spec.numpy_dtype,
            f"output '{spec.name}' of {graph.file}",
            _REMEDY,
        )
        for spec in graph.outputs
    }


def _resolve(size: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    factor, _, name = size.rpartition("*")
    return int(factor or 1) * sizes[name]


def _widen(array: Any) -> Any:
    return array.astype(np.float32) if array.dtype.name in _SIXTEEN_BITS else array
