"""Derive the fp16 or bf16 graph from the float32 one.

1. A tensor that a node outside an island gives becomes low precision.
2. A tensor that a node inside an island gives stays float32.
3. An input or output of the graph is low precision, unless the component keeps it float32.
4. A weight, baked or given as input, is low precision if any node outside islands reads it; one
   that only islands read (the weight of a norm) stays float32.
5. Where a node reads a tensor of the other precision, a Cast is put between, one per tensor.
6. A Cast to float32 outside an island becomes one to low precision.

Nothing else changes: the same nodes in the same order compute the same function. TensorRT networks
are strongly typed, so these types are what is built.
"""

__all__ = ["set_precision"]

from typing import TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir as ir

from mc_engines.specs import ISLAND_SCOPE, Precision

DATA_TYPES: dict[Precision, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
NUMPY_TYPES: dict[Precision, type[np.generic]] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}

Casts: TypeAlias = dict[tuple[ir.Value, ir.DataType], ir.Value]


def set_precision(
    model: ir.Model, precision: Precision, keep: frozenset[str], weights: frozenset[str]
) -> ir.Model:
    """Return a copy of the float32 model in another precision.

    Args:
        model: As `export_component` returns it; left as it is.
        precision: `fp32` returns an unchanged copy.
        keep: Inputs and outputs of the graph that stay float32.
        weights: Inputs of the graph that are weights (rule 4).

    Returns:
        The model in that precision.
    """
    copy = model.clone()  # shares type objects: set types, never their dtype (onnx-ir 1.1)
    if precision == "fp32":
        return copy
    low = DATA_TYPES[precision]
    _lower_sources(copy.graph, precision, keep, weights)
    for node in list(copy.graph):
        if not _in_island(node):
            _lower_node(node, low)
    casts: Casts = {}
    for node in list(copy.graph):
        wanted = ir.DataType.FLOAT if _in_island(node) else low
        for position, value in enumerate(node.inputs):
            if value is not None and _differs(value, wanted):
                node.replace_input_with(position, _cast(copy.graph, value, wanted, casts))
    _cast_outputs(copy.graph, low, keep, casts)
    return copy


def _in_island(node: ir.Node) -> bool:
    return ISLAND_SCOPE in node.metadata_props


def _differs(value: ir.Value, wanted: ir.DataType) -> bool:
    return value.dtype in DATA_TYPES.values() and value.dtype != wanted


def _read_by_islands_alone(value: ir.Value) -> bool:
    return all(_in_island(node) for node in value.consumers())


def _lower_sources(
    graph: ir.Graph, precision: Precision, keep: frozenset[str], weights: frozenset[str]
) -> None:
    """Rules 3 and 4, for what no node gives."""
    for value in graph.inputs:
        kept = value.name in keep or (value.name in weights and _read_by_islands_alone(value))
        if value.dtype == ir.DataType.FLOAT and not kept:
            value.type = ir.TensorType(DATA_TYPES[precision])
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or _read_by_islands_alone(value):
            continue
        lowered = tensor.numpy().astype(NUMPY_TYPES[precision])
        value.const_value = ir.tensor(lowered, dtype=DATA_TYPES[precision], name=value.name)
        value.type = ir.TensorType(DATA_TYPES[precision])


def _lower_node(node: ir.Node, low: ir.DataType) -> None:
    """Rules 1 and 6."""
    for output in node.outputs:
        if output.dtype == ir.DataType.FLOAT:
            output.type = ir.TensorType(low)
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", int(low))


def _cast(graph: ir.Graph, value: ir.Value, to: ir.DataType, casts: Casts) -> ir.Value:
    """The value in another type; right after its producer, once."""
    if (value, to) in casts:
        return casts[value, to]
    name = f"{value.name}_{to.name.lower()}"
    result = ir.Value(name=name, shape=value.shape, type=ir.TensorType(to))
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(to))], outputs=[result])
    producer = value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), node)
    else:
        graph.insert_after(producer, node)
    casts[value, to] = result
    return result


def _cast_outputs(graph: ir.Graph, low: ir.DataType, keep: frozenset[str], casts: Casts) -> None:
    """Rule 3, for outputs: the graph's output keeps its name, its producer's value gets another."""
    for position, value in enumerate(graph.outputs):
        wanted = ir.DataType.FLOAT if value.name in keep else low
        if _differs(value, wanted):
            assert value.name is not None and value.dtype is not None
            result = _cast(graph, value, wanted, casts)
            value.name, result.name = f"{value.name}_{value.dtype.name.lower()}", value.name
            graph.outputs[position] = result
