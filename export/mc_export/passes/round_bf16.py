"""The twin of a bf16 graph that ONNX Runtime's CPU can run.

ONNX Runtime 1.31 has no bfloat16 kernels on the CPU. In the twin every bfloat16 tensor is float32,
rounded to bfloat16 where it is made by a Cast there and back:

1. an input, and a baked weight, becomes float32 and is rounded where it enters; but for inputs that
   are said to be rounded already, as weights are, which would otherwise be there three times;
2. an output of a node becomes float32 and is rounded right after the node;
3. a Cast to bfloat16 becomes such a pair; a Cast from bfloat16 reads float32.

Sums inside a node run in float32, as on a device's tensor cores.
"""

__all__ = ["round_bf16"]

import numpy as np
import onnx_ir as ir

BF16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
ROUNDING = "rounding"  # metadata key of the pair's two Casts


def round_bf16(model: ir.Model, rounded: frozenset[str] = frozenset()) -> ir.Model:
    """Return the twin of a bf16 model; the model is left as it is.

    Args:
        model: As `set_precision` returns it for bf16.
        rounded: Inputs of the graph that bfloat16 values will be given to, in float32.

    Returns:
        A model without bfloat16 tensors, but for those between the two Casts of a rounding.
    """
    twin = model.clone()
    graph = twin.graph
    nodes = list(graph)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == BF16:
            exact = tensor.numpy().astype(np.float32)
            value.const_value = ir.tensor(exact, name=value.name)
            value.type = ir.TensorType(FLOAT)
    for value in [*graph.inputs, *(output for node in nodes for output in node.outputs)]:
        if value.dtype == BF16 and value.name in rounded:
            value.type = ir.TensorType(FLOAT)
        elif value.dtype == BF16:
            _round(graph, value)
    return twin


def _round(graph: ir.Graph, value: ir.Value) -> None:
    """Make the value float32 and let all who read it read its rounding instead."""
    value.type = ir.TensorType(FLOAT)
    producer = value.producer()
    readers = list(value.uses())
    narrow = ir.Value(name=f"{value.name}_narrow", shape=value.shape, type=ir.TensorType(BF16))
    wide = ir.Value(name=f"{value.name}_rounded", shape=value.shape, type=ir.TensorType(FLOAT))
    pair = [
        ir.Node("", "Cast", [source], [ir.AttrInt64("to", int(to))], outputs=[result])
        for source, to, result in ((value, BF16, narrow), (narrow, FLOAT, wide))
    ]
    for node in pair:
        node.metadata_props[ROUNDING] = value.name or ""
    if producer is None:
        graph.insert_before(next(iter(graph)), pair)
    else:
        if producer.op_type == "Cast":
            producer.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
        graph.insert_after(producer, pair)
    for node, position in readers:
        node.replace_input_with(position, wide)
    for position, output in enumerate(graph.outputs):
        if output is value:
            value.name, wide.name = f"{value.name}_exact", value.name
            graph.outputs[position] = wide
