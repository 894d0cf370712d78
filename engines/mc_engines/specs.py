"""What a component is: the tensors it takes and gives, the graphs that compute it, its weights.

This is the one home of names, dtypes and symbolic shapes. The exporter writes these specs from the
graphs it made, the bundle stores them, the runner checks inputs against them.
"""

__all__ = [
    "ISLAND_SCOPE",
    "PRECISIONS",
    "ComponentSpec",
    "GraphSpec",
    "Precision",
    "TensorSpec",
    "split_size",
]

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
ISLAND_SCOPE = "island"  # metadata key of the nodes whose arithmetic stays float32


def split_size(size: str) -> tuple[int, str]:
    """Take the factor off a symbolic size.

    Args:
        size: A symbol, or a factor, a star and a symbol.

    Returns:
        The factor, 1 where there is none, and the symbol.

    Example:
        >>> split_size("8*h"), split_size("K")
        ((8, 'h'), (1, 'K'))
    """
    factor, _, symbol = size.rpartition("*")
    return int(factor or 1), symbol


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: Name in the graph.
        dtype: `float32`, `float16`, `bfloat16`, `int32`, `int64` or `bool`.
        shape: One entry per axis: a number, or the symbol of a size that changes from call to call.
            Equal symbols of one graph mean equal sizes.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype as numpy knows it; bfloat16 comes from ml_dtypes."""
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    def describe(self) -> str:
        """The spec in the words of an error message, such as `float32 (1, K, 1536)`."""
        return f"{self.dtype} ({', '.join(str(size) for size in self.shape)})"

    def to_json(self) -> dict[str, Any]:
        """The spec as it stands in the manifest."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TensorSpec":
        """Read a spec from the manifest."""
        return cls(value["name"], value["dtype"], tuple(value["shape"]))


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file: a component in one precision and form.

    Attributes:
        file: Path in the bundle, such as `onnx/block.fp32.onnx`.
        inputs: What the caller gives at every call.
        weights: Inputs that are filled from a weight file of the component, cast to these dtypes.
        outputs: What the graph gives.
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[TensorSpec, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The graph as it stands in the manifest."""
        return {
            "file": self.file,
            "inputs": [spec.to_json() for spec in self.inputs],
            "weights": [spec.to_json() for spec in self.weights],
            "outputs": [spec.to_json() for spec in self.outputs],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "GraphSpec":
        """Read a graph from the manifest."""
        inputs, weights, outputs = (
            tuple(TensorSpec.from_json(spec) for spec in value[key])
            for key in ("inputs", "weights", "outputs")
        )
        return cls(value["file"], inputs, outputs, weights)


@dataclass(frozen=True)
class ComponentSpec:
    """One part of the model: its graphs, and the files of its weights.

    Attributes:
        name: Such as `block`.
        graphs: By form: a precision (`fp32`, `fp16`, `bf16`), or `fp32-mha`, the form whose
            attention is com.microsoft.MultiHeadAttention. All compute the same.
        weight_files: Safetensors paths in the bundle: one per layer, in order. Empty where the
            graph carries its weights (in `<graph>.onnx.data`, shared by all precisions).
    """

    name: str
    graphs: Mapping[str, GraphSpec]
    weight_files: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The component as it stands in the manifest."""
        return {
            "graphs": {form: graph.to_json() for form, graph in self.graphs.items()},
            "weight_files": list(self.weight_files),
        }

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> "ComponentSpec":
        """Read a component from the manifest."""
        graphs = {form: GraphSpec.from_json(graph) for form, graph in value["graphs"].items()}
        return cls(name, graphs, tuple(value["weight_files"]))
