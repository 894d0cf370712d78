"""Trace a component into its float32 ONNX graph.

Neighbours: the adapters make `ComponentSource`s, the passes derive the other precisions from what
`export_component` returns, `compare_outputs` proves them.
"""

__all__ = ["export_component"]

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Generator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from mc_engines.specs import ISLAND_SCOPE
from mc_export.component import ComponentSource
from mc_export.islands import Island

OPSET = 20  # the newest that TensorRT 10.x parses
CONVOLUTION_OPSET = 22  # the first with bfloat16 convolutions
IR_VERSION = 10  # the newest that every supported ONNX Runtime reads

_SCOPES_KEY = "pkg.torch.onnx.name_scopes"


class _Stateless(nn.Module):
    """A module whose parameters are arguments, so that they become inputs of the graph."""

    def __init__(self, component: nn.Module) -> None:
        super().__init__()
        self.component = component

    def forward(self, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(self.component, weights, (), inputs)


def export_component(source: ComponentSource) -> ir.Model:
    """Trace the component with torch.export and translate it to ONNX in float32.

    Every node that came from an `Island` carries the metadata `ISLAND_SCOPE`.

    Args:
        source: The component. Weights become graph inputs, after the others, where it has layers.

    Returns:
        The model; its inputs and outputs have the names and symbols of the source.
    """
    layered = bool(source.layers)
    weights = {name: p.detach() for name, p in source.module.named_parameters()} if layered else {}
    sizes = _Sizes()
    dynamic = {
        name: {axis: sizes[symbol] for axis, symbol in source.dynamic.get(name, {}).items()}
        for name in source.inputs
    }
    convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in source.module.modules())
    with _quiet_exporter():
        program = torch.onnx.export(
            _Stateless(source.module).eval(),
            (),
            kwargs={"inputs": dict(source.inputs), "weights": weights},
            dynamic_shapes={"inputs": dynamic, "weights": dict.fromkeys(weights)},
            input_names=[*source.inputs, *weights],
            output_names=list(source.outputs),
            opset_version=CONVOLUTION_OPSET if convolves else OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # torch returns None only for the old exporter
    model = program.model
    _name_sizes(model, source)
    _mark_islands(model, source.module)
    _drop_traces(model)
    model.graph.name = source.name
    model.ir_version = IR_VERSION
    return model


class _Sizes(dict[str, Any]):
    """torch's objects for the symbols of sizes; `8*h` is eight times that of `h`."""

    def __missing__(self, symbol: str) -> Any:
        factor, star, base = symbol.rpartition("*")
        self[symbol] = int(factor) * self[base] if star else torch.export.Dim(symbol)
        return self[symbol]


def _name_sizes(model: ir.Model, source: ComponentSource) -> None:
    """Give every size the symbol of the source; torch's own names (s47) say nothing."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, symbol in source.dynamic.get(value.name or "", {}).items():
            assert value.shape is not None
            names[_base(str(value.shape[axis]))] = _base(symbol)
    nodes = [output for node in model.graph for output in node.outputs]
    for value in (*model.graph.inputs, *nodes):
        if value.shape is not None:
            value.shape = ir.Shape([_rename(size, names) for size in value.shape])


def _base(symbol: str) -> str:
    """`h` of `8*h`."""
    return symbol.rpartition("*")[2]


def _rename(size: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), str(size))


def _mark_islands(model: ir.Model, module: nn.Module) -> None:
    """Mark the nodes that came from an island; a node without a scope (Split) did not."""
    islands = {
        f"component.{name}".rstrip(".")
        for name, part in module.named_modules()
        if isinstance(part, Island)
    }
    for node in model.graph:
        scopes = node.metadata_props.get(_SCOPES_KEY, "")
        for scope in islands:
            if f"'{scope}'" in scopes:
                node.metadata_props[ISLAND_SCOPE] = scope


def _drop_traces(model: ir.Model) -> None:
    """Remove the exporter's stack traces: they name files of the machine that exported."""
    for node in model.graph:
        for key in [key for key in node.metadata_props if key != ISLAND_SCOPE]:
            del node.metadata_props[key]
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.producer_version = None


@contextlib.contextmanager
def _quiet_exporter() -> Generator[None]:
    """Silence the exporter's progress lines and its remarks about operators we do not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
