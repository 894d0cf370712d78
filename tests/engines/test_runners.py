"""Both runners compute what the function or the file computes, and hold both to the graph."""

import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from mc_engines.bundle import Bundle
from mc_engines.bundle_writer import BundleWriter
from mc_engines.errors import BundleError, EngineError, MissingExtraError
from mc_engines.function_runner import FunctionRunner
from mc_engines.manifest import Manifest
from mc_engines.onnxruntime_runner import OnnxRuntimeRunner, open_runner
from mc_engines.specs import ComponentSpec, GraphSpec, TensorSpec

ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


def a_graph(dtype: str = "float32", **changes: tuple[TensorSpec, ...]) -> GraphSpec:
    """y = x @ w, twice = x + x."""
    tensors = {
        "inputs": (TensorSpec("x", dtype, ("K", 4)),),
        "outputs": (TensorSpec("y", dtype, ("K", 3)), TensorSpec("twice", dtype, ("K", 4))),
        "weights": (TensorSpec("w", dtype, (4, 3)),),
    }
    return GraphSpec("onnx/linear.onnx", **{**tensors, **changes})


def save_linear(path: Path, dtype: str = "float32") -> Path:
    values = {
        name: helper.make_tensor_value_info(name, ONNX_TYPES[dtype], shape)
        for name, shape in {"x": ["K", 4], "w": [4, 3], "y": ["K", 3], "twice": ["K", 4]}.items()
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Add", ["x", "x"], ["twice"]),
    ]
    inputs, outputs = [values["x"], values["w"]], [values["twice"], values["y"]]
    graph = helper.make_graph(nodes, "linear", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path)
    return path


def linear(inputs, weights):
    return {"y": inputs["x"] @ weights["w"], "twice": inputs["x"] + inputs["x"]}


@pytest.fixture(params=["onnxruntime", "function"])
def make(request, tmp_path):
    """Make a runner of a linear graph in a dtype, by either backend."""

    def of(dtype: str = "float32"):
        if request.param == "function":
            return FunctionRunner(a_graph(dtype), linear)
        path = save_linear(tmp_path / "linear.onnx", dtype)
        return OnnxRuntimeRunner(a_graph(dtype), path, threads=1)

    return of


def some_arrays(rows: int, dtype: str = "float32"):
    random = np.random.default_rng(rows)
    x, w = random.normal(size=(rows, 4)), random.normal(size=(4, 3))
    return {"x": x.astype(dtype)}, {"w": w.astype(dtype)}


# Both


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-2)])
def test_computes_the_outputs_by_name_for_any_size(make, dtype, tolerance, rows):
    inputs, weights = some_arrays(rows, dtype)
    outputs = make(dtype).run(inputs, weights)
    assert list(outputs) == ["y", "twice"]
    assert outputs["y"].dtype == outputs["twice"].dtype == dtype
    np.testing.assert_allclose(outputs["y"], inputs["x"] @ weights["w"], atol=tolerance)
    np.testing.assert_allclose(outputs["twice"], 2 * inputs["x"])


def test_takes_arrays_that_are_read_only_or_not_contiguous(make):
    inputs, weights = some_arrays(5)
    expected = make().run(inputs, weights)
    turned = np.asfortranarray(inputs["x"])
    weights["w"].flags.writeable = False
    np.testing.assert_allclose(make().run({"x": turned}, weights)["y"], expected["y"])


@pytest.mark.parametrize(
    ("inputs", "weights", "message"),
    [
        ({"x": np.ones((2, 4))}, {"w": np.ones((4, 3), np.float32)},
         r"linear.onnx: input 'x': expected float32 \(K, 4\), got float64 \(2, 4\)"),
        ({"x": np.ones((2, 5), np.float32)}, {"w": np.ones((4, 3), np.float32)},
         r"expected float32 \(K, 4\), K = 2, got float32 \(2, 5\)"),
        ({"x": np.ones((2, 4), np.float32)}, None, r"expected inputs \['w'\], got \[\]"),
        ({"z": np.ones((2, 4), np.float32)}, {"w": np.ones((4, 3), np.float32)},
         r"expected inputs \['x'\], got \['z'\]"),
    ],
)  # fmt: skip
def test_refuses_inputs_that_do_not_fit(make, inputs, weights, message):
    with pytest.raises(ValueError, match=message):
        make().run(inputs, weights)


def test_several_threads_may_run_it_at_once(make):
    runner, results = make(), {}

    def run(rows: int) -> None:
        inputs, weights = some_arrays(rows)
        for _ in range(20):
            results[rows] = runner.run(inputs, weights)["y"] - inputs["x"] @ weights["w"]

    threads = [threading.Thread(target=run, args=(rows,)) for rows in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(results) == {1, 2, 3, 4}
    assert all(np.abs(difference).max() < 1e-6 for difference in results.values())


# A function


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"y": np.ones((2, 3), np.float32)}, r"other outputs than its graph. .*\['twice', 'y'\]"),
        ({"y": np.ones((2, 3)), "twice": np.ones((2, 4), np.float32)},
         "expected float32 .* float64"),
        ({"y": np.ones((2, 3), np.float32), "twice": np.ones((3, 4), np.float32)},
         r"'twice': expected float32 \(K, 4\), K = 2, got float32 \(3, 4\)"),
        ({"y": np.ones((3, 3), np.float32), "twice": np.ones((3, 4), np.float32)},
         r"'y': expected float32 \(K, 3\), K = 2, got float32 \(3, 3\)"),
    ],
)  # fmt: skip
def test_a_function_is_held_to_its_outputs(outputs, message):
    runner = FunctionRunner(a_graph(), lambda inputs, weights: outputs)
    with pytest.raises(EngineError, match=message):
        runner.run(*some_arrays(2))


def test_a_function_may_compute_in_bfloat16():
    inputs, weights = some_arrays(2)
    x, w = inputs["x"].astype(ml_dtypes.bfloat16), weights["w"].astype(ml_dtypes.bfloat16)

    def round_linear(inputs, weights):
        return {name: a.astype(x.dtype) for name, a in linear(inputs, weights).items()}

    outputs = FunctionRunner(a_graph("bfloat16"), round_linear).run({"x": x}, {"w": w})
    assert outputs["y"].dtype == ml_dtypes.bfloat16


# ONNX Runtime


def test_a_bfloat16_graph_is_refused_before_it_is_loaded(tmp_path):
    message = r"linear.onnx: expected float32 or float16 on the CPU, got bfloat16, .* form fp32"
    with pytest.raises(EngineError, match=message):
        OnnxRuntimeRunner(a_graph("bfloat16"), tmp_path / "none.onnx")


def test_a_graph_that_cannot_be_loaded_names_its_file(tmp_path):
    (tmp_path / "linear.onnx").write_bytes(b"no model")
    with pytest.raises(EngineError, match=r"^onnx/linear.onnx: ONNX Runtime cannot load it: "):
        OnnxRuntimeRunner(a_graph(), tmp_path / "linear.onnx")


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (a_graph(weights=()), r"expected the inputs \['x'\], got \['w', 'x'\]. Export the bundle"),
        (a_graph(outputs=a_graph().outputs[:1]), r"the outputs \['y'\], got \['twice', 'y'\]"),
        (a_graph(weights=(TensorSpec("w", "float32", (4, 2)),)),
         r"'w': expected float32 \(4, 2\), got tensor\(float\) \[4, 3\]. Export the bundle again"),
        (a_graph(inputs=(TensorSpec("x", "float32", (4,)),)), r"'x': expected float32 \(4\), got"),
        (a_graph("float16"), r"'x': expected float16 \(K, 4\), got tensor\(float\) \['K', 4\]"),
    ],
)  # fmt: skip
def test_a_file_with_other_tensors_than_the_bundle_says_is_refused(tmp_path, graph, message):
    with pytest.raises(EngineError, match=message):
        OnnxRuntimeRunner(graph, save_linear(tmp_path / "linear.onnx"))


def test_a_failure_of_onnxruntime_names_the_file(tmp_path):
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [name]) for name in "xy"]
    nodes = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.int64([2]))),
        helper.make_node("Reshape", ["x", "c"], ["y"]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", info[:1], info[1:]),
        opset_imports=[helper.make_opsetid("", 20)], ir_version=10,
    )  # fmt: skip
    onnx.save(model, tmp_path / "reshape.onnx")
    graph = GraphSpec(
        "onnx/reshape.onnx",
        (TensorSpec("x", "float32", ("n",)),),
        (TensorSpec("y", "float32", ("m",)),),
    )
    runner = OnnxRuntimeRunner(graph, tmp_path / "reshape.onnx", threads=1)
    assert runner.run({"x": np.ones(2, np.float32)})["y"].shape == (2,)
    with pytest.raises(EngineError, match=r"^onnx/reshape.onnx: ONNX Runtime: .*[Rr]eshape"):
        runner.run({"x": np.ones(3, np.float32)})


def test_a_missing_onnxruntime_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = r"onnxruntime: not installed. Run: pip install 'motioncache\[cpu\]'"
    with pytest.raises(MissingExtraError, match=message):
        OnnxRuntimeRunner(a_graph(), save_linear(tmp_path / "linear.onnx"))


def test_the_threads_do_not_spin_and_are_as_many_as_asked(tmp_path):
    runner = OnnxRuntimeRunner(a_graph(), save_linear(tmp_path / "linear.onnx"), threads=2)
    options = runner._session.get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert runner._session.get_providers() == ["CPUExecutionProvider"]


# From a bundle


@pytest.fixture
def bundle(tmp_path):
    forms = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    graphs = {
        form: GraphSpec(f"onnx/linear.{form}.onnx", *(
            getattr(a_graph(dtype), key) for key in ("inputs", "outputs", "weights")))
        for form, dtype in forms.items()
    }  # fmt: skip
    with BundleWriter(tmp_path / "bundle") as writer:
        for form, dtype in forms.items():
            save_linear(writer.folder / f"onnx/linear.{form}.onnx", dtype)
        (writer.folder / "weights").mkdir()
        save_file(some_arrays(3)[1], writer.folder / "weights/linear.00.safetensors")
        spec = ComponentSpec("linear", graphs, ("weights/linear.00.safetensors",))
        writer.finish(Manifest("skyreels", None, "float32", (), {}, {"linear": spec}))
    return Bundle.open(tmp_path / "bundle")


@pytest.mark.parametrize(("form", "dtype"), [("fp32", "float32"), ("fp16", "float16")])
def test_a_graph_of_a_bundle_runs_with_its_mapped_weights(bundle, form, dtype):
    inputs, weights = some_arrays(3, dtype)
    runner = open_runner(bundle, "linear", form, threads=1)
    outputs = runner.run(inputs, bundle.layer_weights("linear", 0, form))
    np.testing.assert_allclose(outputs["y"], inputs["x"] @ weights["w"], rtol=1e-2, atol=1e-2)


def test_bf16_of_a_bundle_is_refused_on_the_cpu(bundle):
    with pytest.raises(EngineError, match=r"onnx/linear.bf16.onnx: expected float32 or float16"):
        open_runner(bundle, "linear", "bf16")


def test_an_unknown_graph_of_a_bundle_is_refused(bundle):
    with pytest.raises(BundleError, match="expected component 'block', got none"):
        open_runner(bundle, "block")
