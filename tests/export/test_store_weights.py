"""`StoredWeights`: one data file for every precision of a component, as ONNX Runtime reads it."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from mc_export.onnx_export import ISLAND_SCOPE
from mc_export.passes.round_bf16 import round_bf16
from mc_export.passes.set_precision import DATA_TYPES, NUMPY_TYPES, set_precision
from mc_export.passes.store_weights import StoredWeights

# A matrix, a gain that an island alone reads, one of 1,024 bytes and one of 1,020.
SHAPES = {"matrix": (5, 300), "gain": (300,), "kilobyte": (256,), "small": (255,)}
LARGE = ["matrix", "gain", "kilobyte"]
PAGE = 4096


def values_of(name):
    return np.random.default_rng(len(name)).normal(size=SHAPES[name]).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    """A float32 graph that gives each of its weights; the matrix through a shape that it holds."""
    outputs = ", ".join(f"float{list(shape)} {name}_out" for name, shape in SHAPES.items())
    given = ", ".join(f"float[{np.prod(shape)}] {name}" for name, shape in SHAPES.items())
    text = f"""
    <ir_version: 10, opset_import: ["" : 20]>
    weights (float[1] zero, {given}) => ({outputs})
    <int64[2] shape = {{5, 300}}>
    {{
      flat = Add(matrix, zero)
      matrix_out = Reshape(flat, shape)
      gain_out = Add(gain, zero)
      kilobyte_out = Add(kilobyte, zero)
      small_out = Add(small, zero)
    }}
    """
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), strict_mode=True)
    result = ir.from_proto(proto)
    for value in result.graph.inputs[1:]:
        value.const_value = ir.tensor(values_of(value.name).ravel(), name=value.name)
        result.graph.register_initializer(value)
    del result.graph.inputs[1:]
    gain = next(node for node in result.graph if node.outputs[0].name == "gain_out")
    gain.metadata_props[ISLAND_SCOPE] = "component.norm"
    return result


@pytest.fixture(scope="module", params=DATA_TYPES)
def saved(request, model, tmp_path_factory):
    """How the weights are stored, the folder, and the bytes of the data file when it was made."""
    folder = tmp_path_factory.mktemp(request.param)
    weights = StoredWeights(model, folder / "x.onnx.data", DATA_TYPES[request.param])
    data = (folder / "x.onnx.data").read_bytes()
    before = ir.to_proto(model).SerializeToString()
    for precision in DATA_TYPES:
        low = set_precision(model, precision, frozenset(), frozenset())
        ir.save(weights.link(low), folder / f"x.{precision}.onnx")
    assert ir.to_proto(model).SerializeToString() == before
    return request.param, folder, data


@pytest.mark.parametrize("precision", DATA_TYPES)
def test_onnxruntime_reads_the_stored_values(saved, precision):
    stored, folder, _ = saved
    path = folder / f"x.{precision}.onnx"
    if precision == "bf16":  # which ONNX Runtime's CPU cannot run
        path = folder / "twin.onnx"
        ir.save(round_bf16(ir.load(folder / "x.bf16.onnx")), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    zero = np.zeros(1, np.float16 if precision == "fp16" else np.float32)
    for name, got in zip(SHAPES, session.run(None, {"zero": zero}), strict=True):
        expected = values_of(name)
        if name in LARGE:
            expected = expected.astype(NUMPY_TYPES[stored])
        if name != "gain":
            expected = expected.astype(NUMPY_TYPES[precision])
        expected = expected.astype(NUMPY_TYPES[precision]).astype(np.float32)
        np.testing.assert_array_equal(got.astype(np.float32), expected)


def test_all_precisions_read_one_file_that_is_written_once(saved):
    stored, folder, data = saved
    assert [path.name for path in folder.glob("*.data*")] == ["x.onnx.data"]
    assert (folder / "x.onnx.data").read_bytes() == data
    places = []
    for precision in DATA_TYPES:
        proto = onnx.load(folder / f"x.{precision}.onnx", load_external_data=False)
        onnx.checker.check_model(folder / f"x.{precision}.onnx", full_check=True)
        tensors = [tensor for tensor in proto.graph.initializer if tensor.external_data]
        places.append(
            {
                tensor.name: {entry.key: entry.value for entry in tensor.external_data}
                for tensor in tensors
            }
        )
        assert {tensor.data_type for tensor in tensors} == {DATA_TYPES[stored]}
    assert places[0] == places[1] == places[2]
    assert list(places[0]) == LARGE
    for name, place in places[0].items():
        offset, length = int(place["offset"]), int(place["length"])
        assert place["location"] == "x.onnx.data"
        assert offset % PAGE == 0
        expected = values_of(name).astype(NUMPY_TYPES[stored])
        assert data[offset : offset + length] == expected.tobytes()
    assert len(data) == offset + length


def test_small_constants_stay_in_the_graph(saved):
    _, folder, _ = saved
    for precision in DATA_TYPES:
        proto = onnx.load(folder / f"x.{precision}.onnx", load_external_data=False)
        inline = {tensor.name for tensor in proto.graph.initializer if not tensor.external_data}
        assert inline == {"small", "shape"}


def test_a_cast_stands_only_where_stored_and_wanted_type_differ(saved):
    stored, folder, _ = saved
    for precision in DATA_TYPES:
        graph = ir.load(folder / f"x.{precision}.onnx").graph
        types = {node.inputs[0].name: node for node in graph if node.op_type == "Cast"}
        wanted = {name: DATA_TYPES[precision] for name in LARGE} | {"gain": DATA_TYPES["fp32"]}
        differ = {name for name, kind in wanted.items() if kind != DATA_TYPES[stored]}
        assert differ == set(types) & set(LARGE)
        assert all(types[name].attributes["to"].as_int() == wanted[name] for name in differ)


def test_without_large_weights_there_is_no_file(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[2] x) => (float[2] y) <float[2] w = {1.5, 2.5}> { y = Add(x, w) }"""
    model = ir.from_onnx_text(text)
    linked = StoredWeights(model, tmp_path / "x.onnx.data", DATA_TYPES["bf16"]).link(model)
    assert list(tmp_path.iterdir()) == []
    assert ir.to_proto(linked) == ir.to_proto(model)
