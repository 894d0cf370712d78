"""The twin of a bf16 graph: the same graph but for its type, and rounded after every node."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from mc_export.onnx_export import ISLAND_SCOPE
from mc_export.passes.round_bf16 import ROUNDING, round_bf16
from mc_export.passes.set_precision import set_precision

BF16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT

# Every kind of place a rounding can stand: an input, a baked weight, a node, a Cast to bf16 (of
# the integers) and from it (before the island), an output that others read too, and kept ones.
GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
small (float[K, 4] x, float[K, 4] angles, int64[K] ids)
  => (float[K, 4] y, float[K, 4] sum, float[K, 4] turned)
<float[4] weight = {0.1, 0.7, -0.3, 0.2}, float[4] gain = {1.1, 1.2, 1.3, 1.4}, int64[1] axes = {1}>
{
  scaled = Mul(x, weight)
  island = Mul(scaled, gain)
  numbers = Cast<to = 1>(ids)
  column = Unsqueeze(numbers, axes)
  sum = Add(island, column)
  turned = Mul(sum, angles)
  y = Sub(sum, turned)
}
"""
KEEP = frozenset({"angles", "turned"})


def parse(text, island=()):
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True)
    model = ir.from_proto(proto)
    for node in model.graph:
        if node.outputs[0].name in island:
            node.metadata_props[ISLAND_SCOPE] = "component.norm"
    return model


def without_roundings(twin, names=None):
    """The twin without the pairs of these values, or of all; who read a pair reads its source."""
    copy = twin.clone()
    pairs = [node for node in copy.graph if ROUNDING in node.metadata_props]
    pairs = [node for node in pairs if not names or node.metadata_props[ROUNDING] in names]
    for node in pairs:
        source, result = node.inputs[0], node.outputs[0]
        for reader, position in list(result.uses()):
            reader.replace_input_with(position, source)
        for position, output in enumerate(copy.graph.outputs):
            if output is result:
                source.name, result.name = result.name, None
                copy.graph.outputs[position] = source
    copy.graph.remove(pairs, safe=True)
    return copy


def in_one_type(model):
    """Everything a graph is made of, with bfloat16 and float32 called by one name."""
    graph = model.graph

    def value(x):
        return x and (x.name, FLOAT if x.dtype == BF16 else x.dtype, str(x.shape))

    def attribute(node, name, x):
        to = name == "to" and node.op_type == "Cast" and x.value == BF16
        return name, x.type, int(FLOAT) if to else x.value

    def node(x):
        attributes = sorted(attribute(x, name, a) for name, a in x.attributes.items())
        ends = [value(y) for y in x.inputs], [value(y) for y in x.outputs]
        return x.domain, x.op_type, x.overload, x.name, attributes, ends, x.metadata_props

    def weight(name, x):
        array = x.const_value.numpy()
        exact = array.astype(np.float32) if x.dtype == BF16 else array
        return name, value(x), exact.dtype, exact.tobytes()

    return {
        "ir_version": model.ir_version,
        "opsets": model.opset_imports,
        "inputs": [value(x) for x in graph.inputs],
        "outputs": [value(x) for x in graph.outputs],
        "weights": [weight(name, x) for name, x in graph.initializers.items()],
        "nodes": [node(x) for x in graph],
    }


def assert_same_but_for_type(model):
    twin = round_bf16(model)
    onnx.checker.check_model(ir.to_proto(twin), full_check=True)
    bare, expected = in_one_type(without_roundings(twin)), in_one_type(model)
    assert bare.keys() == expected.keys()
    for key, part in expected.items():
        assert bare[key] == part
    rounded = {x.name for x in every_value(model) if x.dtype == BF16}
    pairs = {}
    for node in twin.graph:
        if ROUNDING in node.metadata_props:
            to = node.attributes["to"].as_int()
            pairs.setdefault(node.metadata_props[ROUNDING], []).append(to)
    assert pairs == {name: [BF16, FLOAT] for name in rounded}


def every_value(model):
    """Inputs and what nodes give: where a rounding stands if the value is bfloat16."""
    return [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]


@pytest.fixture(scope="module")
def low():
    return set_precision(parse(GRAPH, {"island"}), "bf16", KEEP, frozenset())


def test_the_twin_differs_from_the_graph_in_nothing_but_the_type(low):
    before = ir.to_proto(low).SerializeToString()
    assert_same_but_for_type(low)
    assert ir.to_proto(low).SerializeToString() == before


CHAIN = """
<ir_version: 10, opset_import: ["" : 20]>
chain (float[N] x) => (float[N] y)
<float weight = {0.7}, float shift = {-0.3}>
{
  scaled = Mul(x, weight)
  shifted = Add(scaled, shift)
  squared = Mul(shifted, shifted)
  mixed = Sub(squared, scaled)
  y = Mul(mixed, shifted)
}
"""


def run(model, x):
    """As the exporter's proof does: ONNX Runtime's own optimisations are on."""
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.fixture(scope="module")
def chain():
    """The twin of the chain, its input, and what bf16 arithmetic gives."""
    twin = round_bf16(set_precision(parse(CHAIN), "bf16", frozenset(), frozenset()))
    given = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    bf16 = ml_dtypes.bfloat16
    x, weight, shift = given.astype(bf16), bf16(0.7), bf16(-0.3)
    scaled = x * weight
    shifted = scaled + shift
    y = (shifted * shifted - scaled) * shifted
    assert y.dtype == bf16
    return twin, given, y.astype(np.float32)


def test_onnxruntime_rounds_the_twin_after_every_node(chain):
    twin, given, expected = chain
    np.testing.assert_array_equal(run(twin, given), expected)


@pytest.mark.parametrize("name", ["x", "scaled", "shifted", "squared", "mixed", "y"])
def test_every_single_rounding_can_be_seen_in_the_result(chain, name):
    twin, given, expected = chain
    without = without_roundings(twin, {name})
    assert len(without.graph) == len(twin.graph) - 2
    assert (run(without, given) != expected).any()


def test_an_input_that_is_rounded_already_is_taken_as_it_is(chain):
    twin, given, expected = chain
    model = set_precision(parse(CHAIN), "bf16", frozenset(), frozenset())
    taken = round_bf16(model, frozenset({"x"}))
    assert len(taken.graph) == len(twin.graph) - 2
    rounded = given.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(run(taken, rounded), expected)


def test_the_twins_of_a_whole_bundle_differ_in_nothing_but_the_type(tiny_bundle):
    paths = sorted((tiny_bundle / "onnx").glob("*.bf16.onnx"))
    assert len(paths) == 13
    for path in paths:
        assert_same_but_for_type(ir.external_data.load_to_model(ir.load(path)))
