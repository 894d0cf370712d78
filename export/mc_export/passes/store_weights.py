"""Move baked weights into one data file that all precisions of a component share.

1. Float weights of 1 kB and more go to the data file, once, in the dtype the bundle stores.
2. A graph of another precision reads them through a Cast, which a runtime folds when it loads.
3. Smaller constants stay in the graph: ONNX Runtime refuses external ones that feed shapes.

The float32 values come from the float32 graph, so that nothing is rounded twice.
"""

__all__ = ["StoredWeights"]

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mc_export.passes.set_precision import DATA_TYPES, NUMPY_TYPES

MIN_BYTES = 1024
ALIGNMENT = 4096  # of each tensor in the file, so that it can be mapped


class StoredWeights:
    """The data file of one component, written when this is made; `link` makes graphs read it.

    Args:
        model: The component's float32 graph, whose weights are written.
        path: The data file, such as `onnx/head.onnx.data`. Not made if there is nothing to store.
        dtype: `fp32`, `fp16` or `bf16`: how the weights are stored.
    """

    def __init__(self, model: ir.Model, path: Path, dtype: ir.DataType) -> None:
        self._dtype = dtype
        self._tensors: dict[str, ir.ExternalTensor] = {}
        stored = {
            name: value.const_value
            for name, value in model.graph.initializers.items()
            if value.const_value is not None
            and value.const_value.dtype == ir.DataType.FLOAT
            and value.const_value.nbytes >= MIN_BYTES
        }
        if stored:
            self._write(stored, path)

    def _write(self, stored: Mapping[str, ir.TensorProtocol], path: Path) -> None:
        to = NUMPY_TYPES[next(key for key, value in DATA_TYPES.items() if value == self._dtype)]
        with path.open("wb") as file:
            for name, tensor in stored.items():
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                values = np.ascontiguousarray(tensor.numpy().astype(to, copy=False))
                self._tensors[name] = ir.ExternalTensor(
                    path.name,
                    file.tell(),
                    values.nbytes,
                    self._dtype,
                    shape=ir.Shape(values.shape),
                    name=name,
                    base_dir=path.parent,
                )
                file.write(values.reshape(-1).view(np.uint8).data)

    def link(self, model: ir.Model) -> ir.Model:
        """Return a copy of a graph of this component that reads its weights from the file.

        Args:
            model: The float32 graph, or one that `set_precision` made of it.

        Returns:
            The graph to be saved beside the data file.
        """
        copy = model.clone()
        for name, tensor in self._tensors.items():
            value = copy.graph.initializers[name]
            if value.dtype != self._dtype:
                self._cast(copy.graph, value)
            value.const_value = tensor
            value.type = ir.TensorType(self._dtype)
        return copy

    def _cast(self, graph: ir.Graph, value: ir.Value) -> None:
        """Let the readers of a weight read a Cast of it to the type they had."""
        assert value.dtype is not None
        result = ir.Value(name=f"{value.name}_cast", shape=value.shape, type=value.type)
        readers = list(value.uses())
        to = ir.AttrInt64("to", int(value.dtype))
        graph.insert_before(next(iter(graph)), ir.Node("", "Cast", [value], [to], outputs=[result]))
        for node, position in readers:
            node.replace_input_with(position, result)
