"""Rules of `set_precision` on small graphs, and on random ones against a reading of the rules."""

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_engines.specs import ISLAND_SCOPE
from mc_export.component import ComponentSource
from mc_export.islands import Island
from mc_export.onnx_export import export_component
from mc_export.passes.round_bf16 import round_bf16
from mc_export.passes.set_precision import set_precision

FLOAT = ir.DataType.FLOAT
FLOATS = {FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
LOW = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

# `normal` and `scaled` are an island. The weights of that island are `gain` and `given_gain`;
# `shared` is read by it and by others as well.
GRAPH = """
<ir_version: 10, opset_import: ["" : 20]>
small (float[1, K, 4] x, float[K, 4] angles, int64[K] ids, float[4, 4] given, float[4] given_gain)
  => (float[1, K, 4] y, float[1, K, 4] scaled, float[K, 4] kept)
<float[4, 4] matrix = {0.1, 1.7, -0.3, 0.2, 1.1, 0.4, 0.5, -0.6, 0.7, 0.9, 1, 2, 3, 4, 5, 6.1},
 float[4] gain = {1.1, 1.2, 1.3, 1.4}, float[4] shared = {0.1, 0.2, 0.3, 0.4},
 int64[1] axes = {1}>
{
  hidden = MatMul(x, matrix)
  normal = Mul(hidden, gain)
  shifted = Add(normal, shared)
  scaled = Mul(shifted, given_gain)
  mixed = MatMul(scaled, given)
  more = Add(mixed, shared)
  turned = Mul(scaled, angles)
  numbers = Cast<to = 1>(ids)
  column = Unsqueeze(numbers, axes)
  sum = Add(turned, column)
  y = Add(more, sum)
  kept = Mul(angles, column)
}
"""
ISLAND = {"normal", "shifted", "scaled"}
KEEP = frozenset({"angles", "kept"})
WEIGHTS = frozenset({"given", "given_gain"})


def parse(text, island):
    """A model as `export_component` gives it: every value typed, islands marked."""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True)
    model = ir.from_proto(proto)
    for node in model.graph:
        if node.outputs[0].name in island:
            node.metadata_props[ISLAND_SCOPE] = "component.norm"
    return model


def check(model):
    """Let onnx infer every type and hold the stated ones against them."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def types(model):
    """Type of every value by its name; in the model's text names are unique."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values()]
    values += [output for node in graph for output in node.outputs]
    assert len({value.name for value in values}) == len(values)
    return {value.name: value.dtype for value in values}


def producers(model):
    return {node.outputs[0].name: node for node in model.graph}


def start(model):
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module", params=LOW)
def low(request):
    """The small graph in low precision, and that precision's type."""
    model = set_precision(parse(GRAPH, ISLAND), request.param, KEEP, WEIGHTS)
    check(model)
    return model, LOW[request.param]


def test_rule_1_what_nodes_outside_islands_give_is_low(low):
    model, kind = low
    found = types(model)
    for name in ("hidden", "mixed", "more", "turned", "column", "sum", "y"):
        assert found[name] == kind


def test_rule_2_what_nodes_inside_islands_give_stays_float32(low):
    model, _ = low
    found = types(model)
    assert found["normal"] == found["shifted"] == FLOAT
    assert found["scaled_float"] == FLOAT  # the island's value behind the output `scaled`


def test_rule_3_inputs_and_outputs_are_low_but_for_those_kept(low):
    model, kind = low
    inputs = {value.name: value.dtype for value in model.graph.inputs}
    outputs = {value.name: value.dtype for value in model.graph.outputs}
    assert (inputs["x"], inputs["angles"], inputs["ids"]) == (kind, FLOAT, ir.DataType.INT64)
    assert list(outputs.items()) == [("y", kind), ("scaled", kind), ("kept", FLOAT)]


def test_rule_4_weights_are_low_unless_islands_alone_read_them(low):
    model, kind = low
    found = types(model)
    assert found["matrix"] == found["given"] == found["shared"] == kind
    assert found["gain"] == found["given_gain"] == FLOAT
    matrix = model.graph.initializers["matrix"].const_value.numpy()
    to = np.float16 if kind == ir.DataType.FLOAT16 else ml_dtypes.bfloat16
    original = parse(GRAPH, ISLAND).graph.initializers["matrix"].const_value.numpy()
    np.testing.assert_array_equal(matrix, original.astype(to))


def test_rule_4_an_input_that_is_no_weight_is_low_even_if_islands_alone_read_it():
    model = set_precision(parse(GRAPH, ISLAND), "fp16", KEEP, frozenset())
    assert types(model)["given_gain"] == LOW["fp16"]
    check(model)


def test_rule_5_one_cast_per_tensor_stands_between_the_precisions(low):
    model, kind = low
    original = {node.outputs[0].name for node in parse(GRAPH, ISLAND).graph}
    added = [
        (node.op_type, node.inputs[0].name, node.outputs[0].dtype)
        for name, node in producers(model).items()
        if name not in original or name in {"scaled", "kept"}  # outputs keep their names
    ]
    assert sorted(added) == sorted(
        [
            ("Cast", "angles", kind),  # one for two readers
            ("Cast", "hidden", FLOAT),
            ("Cast", "shared", FLOAT),
            ("Mul", "shifted", FLOAT),  # the island's node, whose value is now `scaled_float`
            ("Cast", "scaled_float", kind),  # one for two readers and the output
            ("Mul", "angles_" + kind.name.lower(), kind),  # likewise of `kept`
            ("Cast", "kept_" + kind.name.lower(), FLOAT),
        ]
    )


def test_rule_6_a_cast_to_float32_becomes_one_to_low_precision(low):
    model, kind = low
    cast = producers(model)["numbers"]
    assert cast.attributes["to"].as_int() == kind
    assert cast.inputs[0].name == "ids"
    island = set_precision(parse(GRAPH, {*ISLAND, "numbers"}), "fp16", KEEP, WEIGHTS)
    assert producers(island)["numbers"].attributes["to"].as_int() == FLOAT
    check(island)


def test_nothing_else_changes(low):
    model, _ = low
    original = parse(GRAPH, ISLAND)
    assert [shapes(value) for value in model.graph.inputs] == [
        shapes(value) for value in original.graph.inputs
    ]
    kept = [node for node in model.graph if node.op_type != "Cast"]
    before = [node for node in original.graph if node.op_type != "Cast"]
    for node, same in zip(kept, before, strict=True):
        assert (node.op_type, shapes(node.outputs[0])) == (same.op_type, shapes(same.outputs[0]))
        assert node.attributes == same.attributes and node.metadata_props == same.metadata_props
        assert [origin(value) for value in node.inputs] == [value.name for value in same.inputs]


def shapes(value):
    return [str(size) for size in value.shape]


def origin(value):
    """The name that a value had before casts were put in."""
    cast = value.producer()
    if cast is not None and cast.op_type == "Cast" and cast.inputs[0].dtype in FLOATS:
        value = cast.inputs[0]
    return value.name.removesuffix("_float")


@pytest.mark.parametrize("precision", ["fp32", *LOW])
def test_the_original_is_left_as_it_is(precision):
    model = parse(GRAPH, ISLAND)
    before = ir.to_proto(model).SerializeToString()
    copy = set_precision(model, precision, KEEP, WEIGHTS)
    assert ir.to_proto(model).SerializeToString() == before
    assert copy is not model
    assert (ir.to_proto(copy).SerializeToString() == before) is (precision == "fp32")


OVERFLOWING = """
<ir_version: 10, opset_import: ["" : 20]>
square (float[3] x) => (float[3] y) <float thousand = {1000.0}>
{
  squared = Mul(x, x)
  small = Div(squared, thousand)
  y = Neg(small)
}
"""


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_an_island_computes_what_float16_cannot_hold():
    # onnx's own evaluator: ONNX Runtime's CPU keeps float32 from one float16 node to the next.
    x = np.array([300, 2, 1000], np.float16)
    results = []
    for island in ({"squared", "small"}, set()):
        model = set_precision(parse(OVERFLOWING, island), "fp16", frozenset(), frozenset())
        results += onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    np.testing.assert_array_equal(results[0], np.array([-90, -0.004, -1000], np.float16))
    assert np.isinf(results[1]).tolist() == [True, False, True]


class Halve(Island):
    def forward(self, x):
        return x.abs() * 0.5


class Nested(Island):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Tanh()

    def forward(self, x):
        return self.inner(x + 1)


class Islands(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.outside = Halve(), Nested(), torch.nn.Sigmoid()

    def forward(self, x):
        return self.outside(self.second(self.first(x) - 3))


def test_the_exporter_marks_the_nodes_of_islands_and_no_others():
    sample = {"x": torch.ones(2, 3)}
    source = ComponentSource("islands", Islands().eval(), sample, {"x": {0: "n"}}, ("y",))
    model = export_component(source)
    assert [(node.op_type, node.metadata_props.get(ISLAND_SCOPE)) for node in model.graph] == [
        *[(op, "component.first") for op in ("Abs", "Mul")],
        ("Sub", None),
        *[(op, "component.second") for op in ("Add", "Tanh")],
        ("Sigmoid", None),
    ]
    check(set_precision(model, "bf16", frozenset(), frozenset()))


INPUTS, BAKED = 3, 2
# A random graph: each node names its operation, whether it is an island's, and two of the values
# before it. The first values are the inputs, of which v0 is kept, then the baked weights.
NODES = st.lists(
    st.tuples(
        st.sampled_from(["Add", "Sub", "Mul"]),
        st.booleans(),
        st.integers(0, 1000),
        st.integers(0, 1000),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, deadline=None)
@given(nodes=NODES, keep=st.booleans(), seed=st.integers(0, 1000))
def test_random_graphs_compute_in_bf16_what_the_rules_say(nodes, keep, seed):
    draw = np.random.default_rng(seed)
    values = [draw.normal(size=4).astype(np.float32) for _ in range(INPUTS + BAKED)]
    kept = frozenset({"v0", "y"} if keep else {"v0"})
    model = set_precision(parse(*random_graph(nodes, values)), "bf16", kept, frozenset())
    check(model)
    (got,) = start(round_bf16(model)).run(None, {f"v{i}": values[i] for i in range(INPUTS)})
    np.testing.assert_array_equal(got, apply_rules(nodes, values, keep))


def random_graph(nodes, values):
    """The text of the graph, and the names of its islands."""
    inputs = ", ".join(f"float[4] v{i}" for i in range(INPUTS))
    weights = ", ".join(
        f"float[4] v{i} = {{{', '.join(map(repr, map(float, values[i])))}}}"
        for i in range(INPUTS, len(values))
    )
    lines, islands = [], set()
    for count, (op, island, *places) in enumerate(nodes, start=len(values)):
        name = "y" if count + 1 == len(values) + len(nodes) else f"v{count}"
        lines.append(f"{name} = {op}({', '.join(f'v{place % count}' for place in places)})")
        islands |= {name} if island else set()
    head = '<ir_version: 10, opset_import: ["" : 20]>'
    body = "\n".join(lines)
    return f"{head} g ({inputs}) => (float[4] y) <{weights}> {{ {body} }}", islands


def apply_rules(nodes, sources, keep):
    """Rules 1 to 5 as they read, in the arithmetic of ml_dtypes."""
    bf16 = ml_dtypes.bfloat16
    users = [
        (island, place % count)
        for count, (_, island, *places) in enumerate(nodes, start=INPUTS + BAKED)
        for place in places
    ]
    values = []
    for place, source in enumerate(sources):
        stays = place == 0 if place < INPUTS else all(i for i, used in users if used == place)
        values.append(source if stays else source.astype(bf16))
    compute = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply}
    for op, island, *places in nodes:
        kind = np.float32 if island else bf16
        values.append(compute[op](*(values[p % len(values)].astype(kind) for p in places)))
    return values[-1].astype(np.float32 if keep else bf16).astype(np.float32)


def test_every_graph_of_a_bundle_is_sound(tiny_bundle):
    paths = sorted((tiny_bundle / "onnx").glob("*.onnx"))
    assert len(paths) == 3 * 13 + 2
    for path in paths:
        onnx.checker.check_model(path, full_check=True)
