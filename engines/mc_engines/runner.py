"""How a graph is run: one life cycle for every backend.

Neighbours: `Bundle` says where a graph lies, `onnxruntime_runner` and `function_runner` run it.
"""

__all__ = ["Array", "Arrays", "Runner", "Shaped", "check_inputs"]

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mc_engines.specs import GraphSpec, TensorSpec

Array: TypeAlias = NDArray[Any]
Arrays: TypeAlias = Mapping[str, Array]


class Runner(Protocol):
    """A graph that can be run. Safe to call from several threads at once.

    Attributes:
        graph: The tensors the runner takes and gives.
    """

    @property
    def graph(self) -> GraphSpec:
        """The tensors the runner takes and gives."""
        ...

    def run(self, inputs: Arrays, weights: Arrays | None = None) -> dict[str, Array]:
        """Compute the outputs of the graph.

        Args:
            inputs: One array per spec of `graph.inputs`.
            weights: One array per spec of `graph.weights`; None where the graph has none.

        Returns:
            One array per spec of `graph.outputs`.

        Raises:
            ValueError: A name, dtype or shape is not the one of the spec.
            EngineError: The backend failed.
        """
        ...


class Shaped(Protocol):
    """What has a dtype and a shape: an array of the host or of a GPU."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its elements."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes."""
        ...


def check_inputs(
    graph: GraphSpec, inputs: Mapping[str, Shaped], weights: Mapping[str, Shaped] | None
) -> None:
    """Refuse inputs that do not fit the graph, before a backend sees them.

    Args:
        graph: The tensors expected.
        inputs: Arrays by name.
        weights: Weight arrays by name, or None.

    Raises:
        ValueError: A name is missing or unknown, or a dtype or shape is not the one of the spec.
    """
    sizes: dict[str, int] = {}
    for specs, arrays in ((graph.inputs, inputs), (graph.weights, weights or {})):
        _check_names(graph.file, specs, arrays)
        for spec in specs:
            _check_array(graph.file, spec, arrays[spec.name], sizes)


def _check_names(file: str, specs: tuple[TensorSpec, ...], arrays: Mapping[str, Shaped]) -> None:
    if len(specs) == len(arrays) and all(spec.name in arrays for spec in specs):
        return
    expected, got = sorted(spec.name for spec in specs), sorted(arrays)
    raise ValueError(f"{file}: expected inputs {expected}, got {got}.")


def _check_array(file: str, spec: TensorSpec, array: Shaped, sizes: dict[str, int]) -> None:
    fits = array.dtype == spec.numpy_dtype and len(array.shape) == len(spec.shape)
    if fits:
        for size, expected in zip(array.shape, spec.shape, strict=True):
            if isinstance(expected, str):
                expected = sizes.setdefault(expected, size)
            fits = fits and size == expected
    if not fits:
        bound = "".join(
            f", {symbol} = {sizes[symbol]}"
            for symbol in dict.fromkeys(s for s in spec.shape if isinstance(s, str))
            if symbol in sizes
        )
        raise ValueError(
            f"{file}: input '{spec.name}': expected {spec.describe()}{bound}, "
            f"got {np.dtype(array.dtype).name} {tuple(array.shape)}."
        )
