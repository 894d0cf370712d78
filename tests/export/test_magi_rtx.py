"""The graphs of MAGI-1 compile with TensorRT-RTX: compiled, not executed.

Like tests/engines/test_rtx_compile.py for the other family, whose words say what this proves.
"""

from pathlib import Path

import onnx_ir as ir
import pytest
from engine_sizes import Zeros, describe_graph

from mc_engines.building.bounds import Bounds
from mc_engines.building.compile import Request, build_plan, count_attention_kernels
from mc_engines.building.library import open_library
from mc_engines.bundle import Bundle
from mc_engines.published import MAGI
from mc_engines.specs import GraphSpec
from mc_export.component import ComponentSource
from mc_export.magi_components import transformer_components
from mc_export.magi_config import transformer_tensors
from mc_export.onnx_export import export_component
from mc_export.passes.set_precision import set_precision

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (extra rtx)")

TARGETS = (80, 86, 89, 120)
FORMS = ("fp16", "bf16")
# 720x1280 pixels have 3600 positions; 6 latent frames are a chunk, 5 of which are seen.
SIZES = {
    "K": Bounds(1, 12150, 21600),
    "L": Bounds(1, 12150, 21600),
    "S": Bounds(1, 85050, 151200),
    "M": Bounds(1, 60750, 108000),
    "F": Bounds(1, 6, 6),
    "P": Bounds(1, 2025, 3600),
    "T": Bounds(1, 128, 800),
}


def compile_graph(path: Path, graph: GraphSpec) -> bytes:
    return build_plan(open_library("tensorrt-rtx"), graph, path, Request(TARGETS, [SIZES]))


def test_every_graph_of_a_bundle_compiles(magi_bundle):
    bundle = Bundle.open(magi_bundle("magi-a"))
    components = bundle.manifest.components
    assert list(components["timestep"].graphs) == ["fp32"]
    for name in components.keys() - {"timestep"}:
        for form in FORMS:
            plan = compile_graph(bundle.graph_path(name, form), components[name].graphs[form])
            # To the chunks' keys, and to the text's.
            assert count_attention_kernels(plan) == (2 if name == "block" else None)


def real_sources(model: str) -> dict[str, ComponentSource]:
    config = MAGI[model].transformer
    tensors = Zeros(transformer_tensors(config))
    return {s.name: s for s in transformer_components(config, tensors)}


@pytest.mark.parametrize("model", ["magi-4.5b-distill", "magi-24b"])
def test_graphs_of_the_published_sizes_compile(tmp_path, model):
    """Their weights, but for those of `embed`, `head` and `text_projection`, are inputs."""
    sources = real_sources(model)
    del sources["timestep"]
    for name, source in sources.items():
        traced = export_component(source)
        weights = dict(source.module.named_parameters()) if source.layers else {}
        for form in FORMS:
            path = tmp_path / f"{name}.{form}.onnx"
            low = set_precision(traced, form, source.float32, frozenset(weights))
            graph = describe_graph(path, low)
            ir.save(low, path, external_data=f"{path.name}.data")
            plan = compile_graph(path, graph)
            if source.layers:
                assert len(plan) <= 3e6  # there are no weights in it
            if name == "block":
                assert count_attention_kernels(plan) == 2
