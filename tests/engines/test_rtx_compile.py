"""Every graph for devices compiles with TensorRT-RTX: compiled, not executed.

TensorRT-RTX compiles ahead of time for GPUs that are not there. This proves that each graph is
parsed, is typed as TensorRT wants it, and has kernels on every generation of GPUs named below, with
fused attention where there is attention. What the kernels compute nobody has seen.
"""

import re

import onnx_ir as ir
import pytest
import torch

from mc_engines.bundle import Bundle
from mc_engines.specs import TensorSpec
from mc_export.onnx_export import export_component
from mc_export.passes.set_precision import DATA_TYPES, set_precision
from mc_export.passes.store_weights import StoredWeights
from mc_export.published import FAMILY_DEFAULTS, PUBLISHED, UMT5_XXL
from mc_export.random_source import RandomSource
from mc_export.skyreels_components import transformer_components, transformer_tensors
from mc_export.umt5 import text_encoder_components, text_encoder_tensors

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)")

# Ampere (A100, RTX 30), Ada (RTX 40), Blackwell (RTX 50); bf16 needs the first of them.
TARGETS = ("SM80", "SM86", "SM89", "SM120")
FORMS = ("fp16", "bf16")
# Smallest, typical and largest value of every symbol of a shape: one wide profile.
# 540P has 2040 positions; 5 latent frames of it are a chunk, 25 a window.
SIZES = {
    "K": (1, 10200, 10200),
    "L": (1, 10200, 10200),
    "S": (1, 51000, 51000),
    "M": (1, 51000, 51000),
    "F": (1, 5, 25),
    "P": (1, 2040, 3600),
    "T": (1, 64, 512),
    "h": (2, 68, 90),
    "w": (2, 120, 160),
}
TYPES = {
    "float32": trt.float32,
    "float16": trt.float16,
    "bfloat16": trt.bfloat16,
    "int32": trt.int32,
    "int64": trt.int64,
}
# A kernel that computes attention whole; a plan holds the names of its kernels as text.
FUSED_ATTENTION = re.compile(rb"_gemm_mha_v2_0x[0-9a-f]+")


class Log(trt.ILogger):
    """Keeps what TensorRT complains of."""

    def __init__(self):
        super().__init__()
        self.errors = []

    def log(self, severity, message):
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)


def size_of(symbol):
    """Bounds of a symbol; `8*h` is eight times h."""
    factor, _, base = symbol.rpartition("*")
    return [int(factor or 1) * size for size in SIZES[base]]


def compile_graph(path, inputs, outputs):
    """Compile an ONNX file for all targets, and hold its tensors against the specs."""
    log = Log()  # it, the builder and the network must outlive what they make
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert tensors(network.num_inputs, network.get_input) == expected_tensors(inputs)
    assert tensors(network.num_outputs, network.get_output) == expected_tensors(outputs)
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(TARGETS)
    for place, target in enumerate(TARGETS):
        assert config.set_compute_capability(getattr(trt.ComputeCapability, target), place)
    profile = builder.create_optimization_profile()
    for spec in inputs:
        sizes = [size_of(s) if isinstance(s, str) else [s] * 3 for s in spec.shape]
        profile.set_shape(spec.name, *zip(*sizes, strict=True))
    assert config.add_optimization_profile(profile) == 0  # -1: a bound is wrong
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, log.errors
    return bytes(plan)


def tensors(count, get):
    return {get(i).name: (get(i).dtype, tuple(get(i).shape)) for i in range(count)}


def expected_tensors(specs):
    return {
        spec.name: (TYPES[spec.dtype], tuple(-1 if isinstance(s, str) else s for s in spec.shape))
        for spec in specs
    }


def fused_attentions(plan):
    return len(set(FUSED_ATTENTION.findall(plan)))


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.mark.parametrize("form", FORMS)
def test_every_graph_of_a_bundle_compiles(bundle, form):
    """Compiled, not executed; baked weights are read from the data file that forms share."""
    attentions = {}
    for name, component in bundle.manifest.components.items():
        if form in component.graphs:
            graph = component.graphs[form]
            inputs = *graph.inputs, *graph.weights
            plan = compile_graph(bundle.graph_path(name, form), inputs, graph.outputs)
            attentions[name] = fused_attentions(plan)
    assert set(bundle.manifest.components) - set(attentions) == {"timestep"}
    assert attentions["block"] == 2  # to the chunk's keys and to the text's
    assert attentions["vae_encoder_next"] == attentions["vae_decoder_next"] == 1


def test_the_timesteps_are_a_table_of_the_host(bundle):
    assert list(bundle.component("timestep").graphs) == ["fp32"]


@pytest.mark.parametrize("stored", FORMS)
@pytest.mark.parametrize("component", ["head", "vae_decoder_first"])
def test_weights_stored_in_16_bit_compile_in_every_form(bundle, tmp_path, component, stored):
    """Compiled, not executed; a Cast of a weight is folded, also that of a convolution's kernel."""
    exact = ir.external_data.load_to_model(ir.load(bundle.graph_path(component, "fp32")))
    weights = StoredWeights(exact, tmp_path / "weights.onnx.data", DATA_TYPES[stored])
    for form in FORMS:
        graph = bundle.graph(component, form)
        keep = frozenset(x.name for x in (*graph.inputs, *graph.outputs) if x.dtype == "float32")
        model = set_precision(exact, form, keep, frozenset())
        ir.save(weights.link(model), tmp_path / "graph.onnx")
        compile_graph(tmp_path / "graph.onnx", graph.inputs, graph.outputs)


class Zeros(RandomSource):
    """A checkpoint of any size that takes no memory."""

    def load(self, name):
        return torch.zeros(()).expand(self.shape(name))


def default_block():
    config = PUBLISHED[FAMILY_DEFAULTS["skyreels"]].transformer
    tensors = Zeros(transformer_tensors(config), torch.float32, seed=0)
    return next(s for s in transformer_components(config, tensors) if s.name == "block")


def text_layer():
    tensors = Zeros(text_encoder_tensors(UMT5_XXL), torch.float32, seed=0)
    return text_encoder_components(UMT5_XXL, tensors)[0]


@pytest.mark.parametrize(("make", "attentions"), [(default_block, 2), (text_layer, 1)])
def test_layers_of_the_published_sizes_compile(tmp_path, make, attentions):
    """Compiled, not executed; heads of 128 channels and, in the text encoder, of 64."""
    source = make()
    model = export_component(source)
    weights = frozenset(name for name, _ in source.module.named_parameters())
    path = tmp_path / "layer.onnx"
    for form in FORMS:
        low = set_precision(model, form, source.float32, weights)
        ir.save(low, path)
        plan = compile_graph(path, specs(low.graph.inputs), specs(low.graph.outputs))
        assert fused_attentions(plan) == attentions
        assert len(plan) < 4e6  # there are no weights in it


def specs(values):
    names = {"float": "float32"}
    dtypes = [value.dtype.name.lower() for value in values]
    return [
        TensorSpec(
            value.name,
            names.get(dtype, dtype),
            tuple(size if isinstance(size, int) else str(size) for size in value.shape),
        )
        for value, dtype in zip(values, dtypes, strict=True)
    ]


def test_in_float32_no_attention_is_fused(bundle):
    """Compiled, not executed: what the other tests look for in a plan can be missing from it."""
    graph = bundle.graph("block", "fp32")
    inputs = *graph.inputs, *graph.weights
    plan = compile_graph(bundle.graph_path("block", "fp32"), inputs, graph.outputs)
    assert fused_attentions(plan) == 0
