import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from mc_engines.errors import CheckpointError
from mc_export.onnx_export import ISLAND_SCOPE, export_component
from mc_export.passes.set_precision import set_precision
from mc_export.t5 import (
    describe_text_encoder,
    text_embedding_table,
    text_encoder_components,
    text_encoder_tensors,
)

TOLERANCE = 1e-4
KINDS = {"umt5": (UMT5EncoderModel, UMT5Config), "t5": (T5EncoderModel, T5Config)}
SIZES = {
    "square": dict(d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2),
    "narrow-heads": dict(d_model=24, d_kv=4, num_heads=3, d_ff=20, num_layers=3),
    "wide-heads": dict(d_model=16, d_kv=16, num_heads=2, d_ff=64, num_layers=1),
    "few-buckets": dict(
        d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2,
        relative_attention_num_buckets=8, relative_attention_max_distance=16,
        layer_norm_epsilon=1e-3,
    ),
}  # fmt: skip
PLAIN_OPS = {
    *("Add", "Cast", "Concat", "Div", "Gather", "Gelu", "Identity", "MatMul", "Mul", "Pow"),
    *("Reciprocal", "ReduceMean", "Reshape", "Shape", "Softmax", "Split", "Sqrt", "Transpose"),
}


class DictSource:
    """A checkpoint in memory that notes what was loaded."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.loaded = []

    def names(self):
        return frozenset(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype

    def load(self, name):
        self.loaded.append(name)
        return self.tensors[name]


def make_model(sizes, kind="umt5", seed=0):
    torch.manual_seed(seed)
    encoder, config = KINDS[kind]
    model = encoder(config(vocab_size=50, feed_forward_proj="gated-gelu", **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # transformers starts norms at one
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def source_of(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del tensors["encoder.embed_tokens.weight"]
    return DictSource(tensors)


def buckets_of(model, tokens):
    offset = torch.arange(tokens) - torch.arange(tokens)[:, None]
    attention = model.encoder.block[0].layer[0].SelfAttention
    given = {}
    if isinstance(model, T5EncoderModel):  # it is static there
        given = {
            "num_buckets": attention.relative_attention_num_buckets,
            "max_distance": attention.relative_attention_max_distance,
        }
    return attention._relative_position_bucket(offset, **given).to(torch.int32)


def encode(components, source, ids, buckets, run):
    """Drive the two graphs as a program would: `run(component, weights, *inputs)`."""
    layer, norm = components
    hidden = text_embedding_table(source)()["table"][ids][None]
    for load in layer.layers:
        hidden = run(layer, load(), hidden, buckets)
    return run(norm, norm.layers[0](), hidden)


def start(graph):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph.SerializeToString(), options)


def run_torch(component, weights, *inputs):
    return functional_call(component.module, weights, inputs)


@pytest.fixture(params=SIZES)
def sizes(request):
    return SIZES[request.param]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_layers_equal_transformers(sizes, kind, tokens):
    model = make_model(sizes, kind)
    source = source_of(model)
    ids = torch.arange(tokens) * 7 % 50
    components = text_encoder_components(model.config.to_dict(), source)
    got = encode(components, source, ids, buckets_of(model, tokens), run_torch)
    expected = model(ids[None]).last_hidden_state
    assert (got - expected).abs().max() <= TOLERANCE


def test_names_and_shapes_are_those_transformers_saves(sizes, kind, tmp_path):
    model = make_model(sizes, kind)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    expected = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    assert text_encoder_tensors(model.config.to_dict()) == expected


@torch.no_grad()
def test_a_layers_weights_fit_the_modules_parameters(sizes, kind):
    model = make_model(sizes, kind).to(torch.bfloat16)
    for component in text_encoder_components(model.config.to_dict(), source_of(model)):
        parameters = dict(component.module.named_parameters())
        for load in component.layers:
            weights = load()
            assert weights.keys() == parameters.keys()
            for name, weight in weights.items():
                assert weight.shape == parameters[name].shape
                assert weight.dtype == torch.bfloat16
                assert weight.is_contiguous()


def test_weights_are_loaded_one_layer_at_a_time():
    model = make_model(SIZES["narrow-heads"])
    source = source_of(model)
    layer, norm = text_encoder_components(model.config.to_dict(), source)
    assert source.loaded == []
    layer.layers[1]()
    assert len(source.loaded) == 10
    assert all(name.startswith("encoder.block.1.") for name in source.loaded)
    norm.layers[0]()
    assert source.loaded[10:] == ["encoder.final_layer_norm.weight"]


def test_all_layers_of_t5_take_the_biases_of_the_first():
    model = make_model(SIZES["narrow-heads"], "t5")
    source = source_of(model)
    layer, _ = text_encoder_components(model.config.to_dict(), source)
    biases = [load()["position_bias"] for load in layer.layers]
    first = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert len(biases) == 3
    assert all(torch.equal(bias, first) for bias in biases)


@torch.no_grad()
def test_graphs_equal_transformers_in_onnxruntime(kind):
    model = make_model(SIZES["narrow-heads"], kind, seed=3)
    source = source_of(model)
    components = text_encoder_components(model.config.to_dict(), source)
    sessions = {}
    for component in components:
        graph = onnx_ir.to_proto(export_component(component))
        assert {node.op_type for node in graph.graph.node} <= PLAIN_OPS
        sessions[component.name] = start(graph)

    def run(component, weights, *inputs):
        feed = dict(zip(component.inputs, inputs, strict=True)) | weights
        arrays = {name: tensor.numpy() for name, tensor in feed.items()}
        outputs = sessions[component.name].run(list(component.outputs), arrays)
        return torch.from_numpy(outputs[0])

    for tokens in (1, 5, 60):
        ids = torch.arange(tokens) * 7 % 50
        got = encode(components, source, ids, buckets_of(model, tokens), run)
        assert (got - model(ids[None]).last_hidden_state).abs().max() <= TOLERANCE


def test_islands_hold_the_norms_and_the_last_product_but_not_the_attention():
    model = make_model(SIZES["square"])
    layer, norm = text_encoder_components(model.config.to_dict(), source_of(model))
    nodes = list(export_component(layer).graph)
    inside = [node.op_type for node in nodes if ISLAND_SCOPE in node.metadata_props]
    assert inside.count("ReduceMean") == 2
    assert inside.count("Add") == 4  # an epsilon in each norm, and both sums
    assert [op for op in inside if op in ("MatMul", "Gelu")] == ["Gelu", "MatMul"]
    outside = [node.op_type for node in nodes if ISLAND_SCOPE not in node.metadata_props]
    assert outside.count("MatMul") == 5
    assert "Softmax" in outside
    assert all(ISLAND_SCOPE in node.metadata_props for node in export_component(norm).graph)


@torch.no_grad()
@pytest.mark.parametrize("islands", [True, False], ids=["islands", "all-float16"])
def test_values_beyond_float16_survive_in_the_float16_graph(islands):
    model = make_model(SIZES["square"])
    model.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(1e5)
    source = source_of(model)
    layer, _ = text_encoder_components(model.config.to_dict(), source)
    ids = torch.arange(9) % 50
    expected = model(ids[None], output_hidden_states=True).hidden_states[1]
    assert expected.abs().max() > 1e5
    graph = export_component(layer)
    if not islands:
        for node in graph.graph:
            node.metadata_props.pop(ISLAND_SCOPE, None)
    keep = layer.float32 if islands else frozenset()
    weights = layer.layers[0]()
    graph = onnx_ir.to_proto(set_precision(graph, "fp16", keep, frozenset(weights)))
    hidden = source.tensors["shared.weight"][ids][None]
    feed = {"hidden": hidden, "buckets": buckets_of(model, 9), **weights}
    for value in graph.graph.input:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16:
            feed[value.name] = feed[value.name].half()
    arrays = {name: tensor.numpy() for name, tensor in feed.items()}
    got = torch.from_numpy(start(graph).run(None, arrays)[0])
    assert bool(torch.isfinite(got).all()) is islands
    if islands:
        assert (got - expected).norm() <= 0.01 * expected.norm()


ALIASES = ("shared.weight", "encoder.embed_tokens.weight")


@pytest.mark.parametrize("names", [ALIASES[:1], ALIASES[1:], ALIASES])
def test_the_table_may_have_either_name_or_both(names):
    model = make_model(SIZES["square"])
    table = torch.zeros(50, 32, dtype=torch.bfloat16)
    source = DictSource(dict.fromkeys(names, table))
    expected = text_encoder_tensors(model.config.to_dict(), source.names())
    assert {name: shape for name, shape in expected.items() if name in ALIASES} == dict.fromkeys(
        names, (50, 32)
    )
    load = text_embedding_table(source)
    assert source.loaded == []
    assert load()["table"] is table


def test_a_checkpoint_without_table_is_refused():
    with pytest.raises(CheckpointError) as error:
        text_embedding_table(DictSource({}))
    assert str(error.value) == (
        "text encoder: expected a tensor shared.weight or encoder.embed_tokens.weight, got neither."
        " Use a complete checkpoint."
    )


def test_the_description_holds_what_a_program_needs():
    config = UMT5Config(
        d_model=40, num_layers=3, relative_attention_num_buckets=16,
        relative_attention_max_distance=64,
    ).to_dict()  # fmt: skip
    assert describe_text_encoder(config) == {
        "layers": 3,
        "dim": 40,
        "relative_buckets": 16,
        "relative_max_distance": 64,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mt5"},
            "text encoder config: expected model_type 'umt5' or 't5', got 'mt5'. "
            "Use a checkpoint whose text encoder is umT5, or T5 of version 1.1.",
        ),
        (
            {"feed_forward_proj": "relu"},
            "text encoder config: expected feed_forward_proj 'gated-gelu', got 'relu'. "
            "Use a checkpoint whose text encoder is umT5, or T5 of version 1.1.",
        ),
        (
            {"d_kv": None},
            "text encoder config: expected a positive number as d_kv, got None. "
            "Take config.json from where the weights come from.",
        ),
        (
            {"num_layers": 2.5},
            "text encoder config: expected a positive number as num_layers, got 2.5. "
            "Take config.json from where the weights come from.",
        ),
        (
            {"layer_norm_epsilon": 0},
            "text encoder config: expected a positive number as layer_norm_epsilon, got 0. "
            "Take config.json from where the weights come from.",
        ),
    ],
)
def test_other_configs_are_refused(change, message):
    config = UMT5Config(**SIZES["square"]).to_dict() | change
    entries = (
        text_encoder_tensors,
        describe_text_encoder,
        lambda config: text_encoder_components(config, DictSource({})),
    )
    for entry in entries:
        with pytest.raises(CheckpointError) as error:
            entry(config)
        assert str(error.value) == message
