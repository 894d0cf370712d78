"""Write attention as com.microsoft.MultiHeadAttention, for large passes on ONNX Runtime's CPU.

The plain form (MatMul, Softmax, MatMul) holds all scores: 24 GB for a quarter pass of DF-1.3B at
540P with 51,000 keys. ONNX Runtime's fused operator works in tiles instead, in a tenth of the
memory; it takes its flash path only for 3-D queries, keys and values (1, tokens, heads * D), so:

1. MatMul(q, Transpose(k)) -> Softmax -> MatMul(., v) becomes MultiHeadAttention(q, k, v) with
   scale 1, for q is scaled already;
2. q, k and v, which are (1, H, tokens, D), are transposed and flattened first;
3. the Transpose and Reshape that follow, back to (1, tokens, H*D), go away;
4. where something else follows, as where several heads of queries share one of keys, the result is
   laid out as (1, H, tokens, D) again.
"""

__all__ = ["fuse_attention"]

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

CONTRIB = "com.microsoft"


def fuse_attention(model: ir.Model, heads: int) -> ir.Model:
    """Return a copy whose attention is fused; the model is left as it is.

    Args:
        model: A float32 model, as `export_component` returns it.
        heads: Attention heads.

    Returns:
        The copy.

    Raises:
        ValueError: An attention is not written in that pattern.
    """
    copy = model.clone()
    graph = copy.graph
    softmaxes = [node for node in graph if node.op_type == "Softmax"]
    for softmax in softmaxes:
        _fuse(graph, softmax, heads)
    copy.opset_imports[CONTRIB] = 1
    RemoveUnusedNodesPass()(copy)
    return copy


def _fuse(graph: ir.Graph, softmax: ir.Node, heads: int) -> None:
    scores = _producer(softmax, 0, "MatMul")
    transposed = _producer(scores, 1, "Transpose")
    weighted = _consumer(softmax, "MatMul")
    replaced = _find_flattening(weighted)
    last = replaced[0]
    sources = (scores.inputs[0], transposed.inputs[0], weighted.inputs[1])
    inputs = [_flat(graph, source, last) for source in sources]
    result = last.outputs[0]
    fused = ir.Node(
        CONTRIB,
        "MultiHeadAttention",
        inputs,
        [ir.AttrInt64("num_heads", heads), ir.AttrFloat32("scale", 1.0)],
        outputs=[ir.Value(name=f"{result.name}_fused", shape=result.shape, type=result.type)],
    )
    graph.insert_before(last, fused)
    given = fused.outputs[0]
    if last is weighted:
        given.shape = None
        given = _by_heads(graph, given, result, last)
    for node, position in list(result.uses()):
        node.replace_input_with(position, given)
    graph.remove([*replaced, softmax, scores, transposed], safe=True)


def _find_flattening(weighted: ir.Node) -> list[ir.Node]:
    """The nodes back to (1, tokens, H*D), the last first, and the product before them."""
    following = weighted.outputs[0].consumers()
    if [node.op_type for node in following] != ["Transpose"]:
        return [weighted]
    return [_consumer(following[0], "Reshape"), following[0], weighted]


def _flat(graph: ir.Graph, value: ir.Value | None, before: ir.Node) -> ir.Value:
    """Turn (1, H, n, D) into (1, n, H*D)."""
    assert value is not None
    assert value.shape is not None
    width = int(value.shape[1]) * int(value.shape[3])  # type: ignore[arg-type]
    shape = _shape(graph, f"{value.name}_flat_shape", [1, -1, width])
    swapped = ir.Value(name=f"{value.name}_{before.name}_swapped", type=value.type)
    flat = ir.Value(name=f"{value.name}_{before.name}_flat", type=value.type)
    nodes = [
        ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", [0, 2, 1, 3])], outputs=[swapped]),
        ir.Node("", "Reshape", [swapped, shape], outputs=[flat]),
    ]
    graph.insert_before(before, nodes)
    return flat


def _by_heads(graph: ir.Graph, flat: ir.Value, like: ir.Value, before: ir.Node) -> ir.Value:
    """Turn (1, n, H*D) into (1, H, n, D), the shape of `like`."""
    assert like.shape is not None
    heads, size = int(like.shape[1]), int(like.shape[3])  # type: ignore[arg-type]
    shape = _shape(graph, f"{like.name}_heads_shape", [1, -1, heads, size])
    split = ir.Value(name=f"{like.name}_split", type=like.type)
    result = ir.Value(name=f"{like.name}_by_heads", shape=like.shape, type=like.type)
    nodes = [
        ir.Node("", "Reshape", [flat, shape], outputs=[split]),
        ir.Node("", "Transpose", [split], [ir.AttrInt64s("perm", [0, 2, 1, 3])], outputs=[result]),
    ]
    graph.insert_before(before, nodes)
    return result


def _shape(graph: ir.Graph, name: str, sizes: list[int]) -> ir.Value:
    """A constant shape for a Reshape."""
    if name not in graph.initializers:
        shape = ir.Value(
            name=name,
            const_value=ir.tensor(np.array(sizes, np.int64), name=name),
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([len(sizes)]),
        )
        graph.register_initializer(shape)
    return graph.initializers[name]


def _producer(node: ir.Node, position: int, op_type: str) -> ir.Node:
    value = node.inputs[position]
    producer = value.producer() if value is not None else None
    return _expect(producer, op_type, node)


def _consumer(node: ir.Node, op_type: str) -> ir.Node:
    consumers = node.outputs[0].consumers()
    return _expect(consumers[0] if len(consumers) == 1 else None, op_type, node)


def _expect(found: ir.Node | None, op_type: str, beside: ir.Node) -> ir.Node:
    if found is None or found.op_type != op_type:
        got = found.op_type if found is not None else "nothing"
        raise ValueError(
            f"{beside.op_type} of attention: expected {op_type} beside it, got {got}. "
            "Write attention as MatMul, Softmax, MatMul, Transpose, Reshape."
        )
    return found
