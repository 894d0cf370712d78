"""Write one component into a bundle's folder: its graphs in every precision, its weights, proved.

Neighbours: the adapters make `ComponentSource`s; `export_component`, the passes and
`compare_outputs` do the work in this order; `export_bundle` calls this for each component.
"""

__all__ = ["STORED_TYPES", "write_component", "write_weights"]

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from safetensors.torch import save_file

from mc_engines.bundle import Bundle
from mc_engines.errors import CheckpointError
from mc_engines.manifest import FileEntry, Manifest
from mc_engines.onnxruntime_runner import OnnxRuntimeRunner
from mc_engines.runner import Array
from mc_engines.specs import ComponentSpec, GraphSpec, Precision, TensorSpec
from mc_export.component import ComponentSource
from mc_export.islands import cast_real, narrow
from mc_export.onnx_export import export_component
from mc_export.parity import Comparison, compare_outputs, hold_to_own_error
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
    dtype: torch.dtype | None
    spec: ComponentSpec


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

    Raises:
        CheckpointError: A weight does not fit float16, in which it was to be stored.
    """
    if not source.layers:
        _round_parameters(source, STORED_TYPES[baked])
    model = export_component(source)
    report(f"{source.name}: traced")
    graphs = _write_graphs(source, model, folder, baked)
    files = _write_layers(source, folder, dtype, report)
    spec = ComponentSpec(source.name, graphs, files)
    rows = _prove(_Written(source, folder, dtype, spec))
    report(f"{source.name}: compared with torch")
    return spec, rows


def write_weights(
    file: str, weights: Mapping[str, torch.Tensor], folder: Path, dtype: torch.dtype | None
) -> None:
    """Write one safetensors file of a bundle.

    Args:
        file: Its path in the bundle.
        weights: Tensors by name.
        folder: The bundle's folder.
        dtype: Of the stored tensors; None keeps each tensor's own.

    Raises:
        CheckpointError: A tensor does not fit float16, in which it was to be stored.
    """
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    save_file(_stored(file, weights, dtype), path)


def _write_layers(
    source: ComponentSource, folder: Path, dtype: torch.dtype | None, report: Report
) -> tuple[str, ...]:
    """Write a file per layer, one layer at a time in memory; return their paths in the bundle."""
    files = tuple(
        f"weights/{source.name}.{layer:02d}.safetensors" for layer in range(len(source.layers))
    )
    for file, load in zip(files, source.layers, strict=True):
        write_weights(file, load(), folder, dtype)
        report(f"{source.name}: {file} written")
    return files


def _stored(
    where: str, weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The weights as the bundle stores them."""
    stored = {key: weight.to(dtype or weight.dtype).contiguous() for key, weight in weights.items()}
    for key, weight in stored.items():
        if dtype == torch.float16 and not all(x.isfinite() for x in torch.aminmax(weight)):
            raise CheckpointError(
                f"{where}: weight '{key}': expected values that fit float16, got "
                f"{weights[key].abs().max():g}. Export with --dtype bf16 or fp32."
            )
    return stored


def _round_parameters(source: ComponentSource, dtype: torch.dtype) -> None:
    """Let the module compute with the weights that its graphs will hold."""
    parameters = dict(source.module.named_parameters())
    for key, weight in _stored(source.name, parameters, dtype).items():
        parameters[key].data = weight.float()  # not written in place: it may be a mapped file


def _write_graphs(
    source: ComponentSource, model: ir.Model, folder: Path, baked: Precision
) -> dict[str, GraphSpec]:
    onnx = folder / "onnx"
    onnx.mkdir(exist_ok=True)
    stored = StoredWeights(model, onnx / f"{source.name}.onnx.data", DATA_TYPES[baked])
    weights = frozenset(name for name, _ in _layer_parameters(source))
    models: dict[str, ir.Model] = {
        precision: set_precision(model, precision, source.float32, weights)
        for precision in source.precisions
    }
    if source.heads:
        models[FUSED_FORM] = fuse_attention(model, source.heads)
    graphs = {}
    for form, each in models.items():
        file = f"onnx/{source.name}.{form}.onnx"
        ir.save(stored.link(each), folder / file)
        graphs[form] = _graph_spec(file, each, weights)
    return graphs


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
    name, count = written.spec.name, len(written.source.layers)
    layers: list[int | None] = [*sorted({0, count - 1})] if count else [None]
    expected = {layer: _reference(written, layer) for layer in layers}
    files = {file: FileEntry(0, "") for file in written.spec.weight_files}
    manifest = Manifest("", None, "", (), {}, {name: written.spec}, files=files)
    draft = Bundle(written.folder, manifest, "")
    rows: list[Comparison] = []
    with tempfile.TemporaryDirectory(dir=written.folder, prefix=".twin-") as scratch:
        for form in written.spec.graphs:
            runner = _runner(written, form, Path(scratch))
            inputs = _inputs(written.source, runner)
            for layer, reference in expected.items():
                got = runner.run(inputs, _weights(draft, name, layer, form))
                compared = compare_outputs(name, form, layer, got, reference, written.source.depth)
                rows += _hold_to_own_error(written, form, layer, compared, reference)
    return rows


def _hold_to_own_error(
    written: _Written,
    form: str,
    layer: int | None,
    rows: list[Comparison],
    expected: dict[str, Array],
) -> list[Comparison]:
    """Hold bf16, and fp16 where it does not pass, to what torch errs in that type."""
    if form == "bf16" or (form == "fp16" and not all(row.passes for row in rows)):
        narrowed = _reference(written, layer, "bf16" if form == "bf16" else "fp16")
        return hold_to_own_error(rows, narrowed, expected)
    return rows


@torch.no_grad()
def _reference(
    written: _Written, layer: int | None, precision: Precision = "fp32"
) -> dict[str, Array]:
    """What torch computes in a precision, with the weights that were to be stored."""
    source, weights = written.source, {}
    module, dtype, inputs = source.module, STORED_TYPES[precision], dict(source.inputs)
    if dtype != torch.float32:
        module = narrow(module, dtype)
        inputs = {
            key: value if key in source.float32 else cast_real(value, dtype)
            for key, value in inputs.items()
        }
    if layer is not None:
        stored = _stored(source.name, source.layers[layer](), written.dtype)
        own = dict(module.named_parameters())
        weights = {key: weight.to(own[key].dtype) for key, weight in stored.items()}
    results = torch.func.functional_call(module, weights, (), inputs)
    results = results if isinstance(results, tuple) else (results,)
    return {key: value.float().numpy() for key, value in zip(source.outputs, results, strict=True)}


def _runner(written: _Written, form: str, scratch: Path) -> OnnxRuntimeRunner:
    """Load a form for the CPU; bf16 by its twin."""
    graph = written.spec.graphs[form]
    path = written.folder / graph.file
    if form != "bf16":
        return OnnxRuntimeRunner(graph, path, threads=2)
    weights = frozenset(spec.name for spec in graph.weights)
    twin, path = round_bf16(ir.load(path), weights), scratch / "twin.onnx"
    ir.save(twin, path, external_data="twin.onnx.data")
    return OnnxRuntimeRunner(_graph_spec(path.name, twin, weights), path, threads=2)


def _weights(
    draft: Bundle, component: str, layer: int | None, form: str
) -> dict[str, Array] | None:
    """A layer's weights as a form takes them; the twin of bf16 takes its in float32."""
    if layer is None:
        return None
    weights = draft.layer_weights(component, layer, form)
    if form == "bf16":
        return {name: weight.astype(np.float32) for name, weight in weights.items()}
    return weights


def _inputs(source: ComponentSource, runner: OnnxRuntimeRunner) -> dict[str, Array]:
    return {
        spec.name: source.inputs[spec.name].numpy().astype(spec.numpy_dtype)
        for spec in runner.graph.inputs
    }
