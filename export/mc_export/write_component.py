"""Write one component into a bundle's folder: its graphs in every precision, its weights, proved.

Neighbours: the adapters make `ComponentSource`s; `export_component`, the passes and
`compare_outputs` do the work in this order; `export_bundle` calls this for each component.
"""

__all__ = ["STORED_TYPES", "write_component", "write_weights"]

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import save_file

from mc_engines.bundle import Bundle
from mc_engines.manifest import FileEntry, Manifest
from mc_engines.onnxruntime_runner import OnnxRuntimeRunner
from mc_engines.runner import Array
from mc_engines.specs import ComponentSpec, GraphSpec, Precision, TensorSpec
from mc_export.component import ComponentSource
from mc_export.onnx_export import export_component
from mc_export.parity import Comparison, compare_outputs
from mc_export.passes.fuse_attention import fuse_attention
from mc_export.passes.round_bf16 import round_bf16
from mc_export.passes.set_precision import DATA_TYPES, set_precision
from mc_export.passes.store_weights import StoredWeights

STORED_TYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
FUSED_FORM = "fp32-mha"

Report = Callable[[str], None]


@dataclass(frozen=True)
class _Written:
    """A component in the bundle's folder, with what is needed to prove it."""

    source: ComponentSource
    folder: Path
    spec: ComponentSpec
    twin: ir.Model | None  # of the bf16 graph


def write_component(
    source: ComponentSource,
    folder: Path,
    dtype: torch.dtype | None,
    baked: Precision,
    report: Report = lambda _: None,
) -> tuple[ComponentSpec, list[Comparison]]:
    """Write a component's graphs and weights, and compare each graph with torch.

    Args:
        source: The component.
        folder: The bundle's folder, still hidden.
        dtype: Of the stored layer weights; None keeps each tensor's own.
        baked: How weights inside graphs are stored.
        report: Called with a few words whenever a step is done.

    Returns:
        The component's spec for the manifest, and one comparison per form, proved layer (the first
        and the last) and output.
    """
    model = export_component(source)
    report(f"{source.name}: traced")
    written = _write_graphs(source, model, folder, baked)
    files = write_weights(source.name, source.layers, folder, dtype, report)
    written = replace(written, spec=replace(written.spec, weight_files=files))
    rows = _prove(written)
    report(f"{source.name}: compared with torch")
    return written.spec, rows


def write_weights(
    name: str,
    layers: Sequence[Callable[[], dict[str, torch.Tensor]]],
    folder: Path,
    dtype: torch.dtype | None,
    report: Report,
) -> tuple[str, ...]:
    """Write one safetensors file per layer; one layer at a time is in memory.

    Args:
        name: Of the component.
        layers: Loaders of each layer's tensors.
        folder: The bundle's folder.
        dtype: Of the stored tensors; None keeps each tensor's own.
        report: Called after each file.

    Returns:
        The files' paths in the bundle, in the order of the layers.
    """
    files = tuple(f"weights/{name}.{layer:02d}.safetensors" for layer in range(len(layers)))
    for file, load in zip(files, layers, strict=True):
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        save_file({key: _stored(tensor, dtype) for key, tensor in load().items()}, path)
        report(f"{name}: {file} written")
    return files


def _stored(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor.to(dtype or tensor.dtype).contiguous()


def _write_graphs(
    source: ComponentSource, model: ir.Model, folder: Path, baked: Precision
) -> _Written:
    onnx = folder / "onnx"
    onnx.mkdir(exist_ok=True)
    stored = StoredWeights(model, onnx / f"{source.name}.onnx.data", DATA_TYPES[baked])
    weights = frozenset(name for name, _ in _layer_parameters(source))
    models: dict[str, ir.Model] = {
        precision: set_precision(model, precision, source.float32, weights)
        for precision in source.precisions
    }
    twin = round_bf16(models["bf16"]) if "bf16" in models else None
    if source.heads:
        models[FUSED_FORM] = fuse_attention(model, source.heads)
    graphs = {}
    for form, each in models.items():
        file = f"onnx/{source.name}.{form}.onnx"
        ir.save(stored.link(each), folder / file)
        graphs[form] = _graph_spec(file, each, weights)
    return _Written(source, folder, ComponentSpec(source.name, graphs), twin)


def _layer_parameters(source: ComponentSource) -> list[tuple[str, torch.nn.Parameter]]:
    return list(source.module.named_parameters()) if source.layers else []


def _graph_spec(file: str, model: ir.Model, weights: frozenset[str]) -> GraphSpec:
    values = model.graph.inputs
    return GraphSpec(
        file,
        tuple(_tensor_spec(value) for value in values if value.name not in weights),
        tuple(_tensor_spec(value) for value in model.graph.outputs),
        tuple(_tensor_spec(value) for value in values if value.name in weights),
    )


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.dtype is not None and value.shape is not None
    sizes = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    names = {ir.DataType.FLOAT: "float32"}
    return TensorSpec(value.name, names.get(value.dtype, value.dtype.name.lower()), sizes)


def _prove(written: _Written) -> list[Comparison]:
    """Run every form in ONNX Runtime beside torch; of layers, the first and the last."""
    count = len(written.source.layers)
    layers: list[int | None] = [*sorted({0, count - 1})] if count else [None]
    files = {file: FileEntry(0, "") for file in written.spec.weight_files}
    manifest = Manifest("", None, "", (), {}, {written.spec.name: written.spec}, files=files)
    draft = Bundle(written.folder, manifest, "")
    rows: list[Comparison] = []
    with tempfile.TemporaryDirectory(dir=written.folder, prefix=".twin-") as scratch:
        for form in written.spec.graphs:
            runner, weights_form = _runner(written, form, Path(scratch))
            for layer in layers:
                rows += _compare(written, draft, form, layer, runner, weights_form)
    return rows


def _runner(written: _Written, form: str, scratch: Path) -> tuple[OnnxRuntimeRunner, str]:
    """Load a form for the CPU, and say in which form it takes its weights; bf16 by its twin."""
    graph = written.spec.graphs[form]
    if form != "bf16" or written.twin is None:
        return OnnxRuntimeRunner(graph, written.folder / graph.file, threads=2), form
    path = scratch / "twin.onnx"
    ir.save(written.twin, path)
    weights = frozenset(spec.name for spec in graph.weights)
    return OnnxRuntimeRunner(_graph_spec(path.name, written.twin, weights), path, threads=2), "fp32"


def _compare(
    written: _Written,
    draft: Bundle,
    form: str,
    layer: int | None,
    runner: OnnxRuntimeRunner,
    weights_form: str,
) -> list[Comparison]:
    source, name = written.source, written.spec.name
    exact = draft.layer_weights(name, layer, "fp32") if layer is not None else {}
    weights = draft.layer_weights(name, layer, weights_form) if layer is not None else None
    inputs = {
        spec.name: source.inputs[spec.name].numpy().astype(spec.numpy_dtype)
        for spec in runner.graph.inputs
    }
    got = runner.run(inputs, weights)
    expected = _reference(source, exact)
    return compare_outputs(name, form, layer, got, expected, source.depth)


@torch.no_grad()
def _reference(source: ComponentSource, weights: dict[str, Array]) -> dict[str, Array]:
    """What torch computes in float32."""
    # torch wants arrays it may write to; the views of a mapped file are not, so they are copied.
    tensors = {key: torch.from_numpy(np.require(a, requirements="W")) for key, a in weights.items()}
    results = torch.func.functional_call(source.module, tensors, (), dict(source.inputs))
    results = results if isinstance(results, tuple) else (results,)
    return {key: value.numpy() for key, value in zip(source.outputs, results, strict=True)}
