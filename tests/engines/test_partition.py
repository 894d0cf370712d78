"""Groups of layers with their weights inside: the same numbers as layer by layer."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from mc_engines.building.partition import Part, bake_layers, divide, graph_hash, graph_of
from mc_engines.bundle import Bundle
from mc_engines.onnxruntime_runner import OnnxRuntimeRunner, open_runner

SIZES = {"K": 6, "S": 20, "M": 14, "F": 2, "T": 5}
LAYER = "cross_k", "cross_v", "k_cache", "v_cache"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def draw(graph) -> dict[str, np.ndarray]:
    """Inputs of a group; of 14 visible slots, some are cached and some are new rows."""
    rng = np.random.default_rng(0)
    inputs = {
        spec.name: rng.standard_normal([SIZES.get(size, size) for size in spec.shape]).astype(
            spec.numpy_dtype
        )
        for spec in graph.inputs
    }
    inputs["frame_ids"] = np.array([0, 0, 0, 1, 1, 1], np.int32)
    inputs["kv_map"] = np.array([0, 1, 20, 3, 21, 5, 22, 7, 8, 23, 24, 25, 12, 13], np.int32)
    return inputs


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_a_group_computes_what_its_layers_compute_in_turn(bundle, tmp_path, layers) -> None:
    part = Part("block", layers)
    graph = graph_of(bundle, part, "fp32")
    inputs = draw(graph)
    path = bake_layers(bundle, part, "fp32", tmp_path)
    onnx.checker.check_model(path)
    got = OnnxRuntimeRunner(graph, path, 1).run(inputs)

    shared, x = open_runner(bundle, "block", threads=1), inputs["x"]
    for place, layer in enumerate(layers):
        of_layer = {name: inputs[f"{name}.{place}"] for name in LAYER}
        common = {
            name: inputs[name] for name in ("frame_ids", "modulation", "cos", "sin", "kv_map")
        }
        weights = bundle.layer_weights("block", layer, "fp32")
        outputs = shared.run({"x": x, **common, **of_layer}, weights)
        x = outputs["y"]
        for name in ("k_new", "v_new"):
            np.testing.assert_allclose(got[f"{name}.{place}"], outputs[name], atol=1e-5, rtol=0)
    np.testing.assert_allclose(got["y"], x, atol=1e-5, rtol=0)
    assert len(got) == 1 + 2 * len(layers) and np.abs(x).max() > 0.1


@pytest.mark.parametrize("form", ["fp16", "bf16"])
def test_weights_have_the_type_of_the_graph(bundle, tmp_path, form) -> None:
    path = bake_layers(bundle, Part("block", (0, 1)), form, tmp_path)
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    expected = bundle.layer_weights("block", 1, form)
    for name, array in expected.items():
        read = onnx.numpy_helper.to_array(stored[f"1/{name}"])
        assert read.dtype == array.dtype and (read == array).all()


def test_the_weights_count_in_the_hash_of_a_group(bundle) -> None:
    parts = [Part("block"), Part("block", (0,)), Part("block", (1,)), Part("block", (0, 1))]
    assert len({graph_hash(bundle, part, "fp32") for part in parts}) == 4
    assert graph_hash(bundle, parts[0], "fp32") != graph_hash(bundle, parts[0], "fp16")


def test_layers_are_divided_in_order_and_the_last_group_may_be_smaller(bundle) -> None:
    assert divide(bundle, ["embed", "block", "head"], 2) == [
        Part("embed"),
        Part("block", (0, 1)),
        Part("head"),
    ]
    assert [part.name for part in divide(bundle, ["block"], 1)] == ["block.00-00", "block.01-01"]
    assert divide(bundle, ["block"], None) == [Part("block")]


@pytest.mark.parametrize("size", [0, 3])
def test_more_layers_than_there_are_make_no_group(bundle, size) -> None:
    with pytest.raises(ValueError) as error:
        divide(bundle, ["block"], size)
    assert str(error.value) == (
        f"partition: expected groups of 1 to 2 layers, got {size}. Give another number."
    )
