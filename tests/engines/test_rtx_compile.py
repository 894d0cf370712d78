"""Every graph for devices compiles with TensorRT-RTX: compiled, not executed.

TensorRT-RTX compiles ahead of time for GPUs that are not there. This proves that each graph is
parsed, is typed as TensorRT wants it, and has kernels on every generation of GPUs named below, with
fused attention where there is attention. What the kernels compute nobody has seen.
"""

import onnx_ir as ir
import pytest
from engine_sizes import Zeros, describe_graph

from mc_engines.building.bounds import Bounds
from mc_engines.building.compile import Request, build_plan, count_attention_kernels
from mc_engines.building.library import open_library
from mc_engines.bundle import Bundle
from mc_engines.published import FAMILY_DEFAULTS, PUBLISHED, UMT5_XXL
from mc_engines.specs import GraphSpec
from mc_export.onnx_export import export_component
from mc_export.passes.set_precision import DATA_TYPES, set_precision
from mc_export.passes.store_weights import StoredWeights
from mc_export.skyreels_components import transformer_components, transformer_tensors
from mc_export.t5 import text_encoder_components, text_encoder_tensors

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)")

# Ampere (A100, RTX 30), Ada (RTX 40), Blackwell (RTX 50); bf16 needs the first of them.
TARGETS = (80, 86, 89, 120)
FORMS = ("fp16", "bf16")
# Smallest, typical and largest value of every symbol of a shape: one wide profile.
# 540P has 2040 positions; 5 latent frames of it are a chunk, 25 a window.
SIZES = {
    "K": Bounds(1, 10200, 10200),
    "L": Bounds(1, 10200, 10200),
    "S": Bounds(1, 51000, 51000),
    "M": Bounds(1, 51000, 51000),
    "F": Bounds(1, 5, 25),
    "P": Bounds(1, 2040, 3600),
    "T": Bounds(1, 64, 512),
    "h": Bounds(2, 68, 90),
    "w": Bounds(2, 120, 160),
}


def compile_graph(path, graph: GraphSpec) -> bytes:
    """Compile an ONNX file for all targets; its tensors are held against the specs."""
    return build_plan(open_library("tensorrt-rtx"), graph, path, Request(TARGETS, [SIZES]))


def fused_attentions(plan: bytes) -> int:
    return count_attention_kernels(plan) or 0


@pytest.fixture(scope="module")
def bundle(tiny_bundle):
    return Bundle.open(tiny_bundle)


@pytest.mark.parametrize("form", FORMS)
def test_every_graph_of_a_bundle_compiles(bundle, form):
    """Compiled, not executed; baked weights are read from the data file that forms share."""
    attentions = {}
    for name, component in bundle.manifest.components.items():
        if form in component.graphs:
            plan = compile_graph(bundle.graph_path(name, form), component.graphs[form])
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
        compile_graph(tmp_path / "graph.onnx", graph)


def default_block():
    config = PUBLISHED[FAMILY_DEFAULTS["skyreels"]].transformer
    tensors = Zeros(transformer_tensors(config))
    return next(s for s in transformer_components(config, tensors) if s.name == "block")


def text_layer():
    tensors = Zeros(text_encoder_tensors(UMT5_XXL))
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
        plan = compile_graph(path, describe_graph(path, low))
        assert fused_attentions(plan) == attentions
        assert len(plan) <= 3e6  # there are no weights in it


def test_in_float32_no_attention_is_fused(bundle):
    """Compiled, not executed: what the other tests look for in a plan can be missing from it."""
    plan = compile_graph(bundle.graph_path("block", "fp32"), bundle.graph("block", "fp32"))
    assert fused_attentions(plan) == 0
