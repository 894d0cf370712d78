"""Parse an ONNX graph, and refuse what would not be computed as it stands there.

Neighbours: `library` has the parser, `compile` builds what comes out.
"""

__all__ = ["Parsed", "find_silent_drops", "has_softmax", "join_reasons", "parse_graph"]

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mc_engines.building.library import Library
from mc_engines.errors import BuildError, EngineError, require
from mc_engines.specs import ISLAND_SCOPE, GraphSpec, TensorSpec

# Operators whose inputs or attributes the parser takes and forgets, without an error: found by
# building them with TensorRT-RTX 1.7.1 and looking for a layer that has them. By operator: places
# of inputs, and names of attributes, that must not be there.
_DROPPED: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "Attention": ((6,), ("qk_matmul_output_mode",))
}
# Operators that need a plugin which the packages do not carry, although the parser knows them.
_NEED_A_PLUGIN = ("NonZero", "Compress", "Unique", "GroupQueryAttention")
# What takes the time: products of matrices, and convolutions, by operator and by layer.
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum")
_PRODUCT_LAYERS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM")


@dataclass(frozen=True)
class Parsed:
    """A network, with what has to live as long as it does.

    Attributes:
        network: Of the library.
        builder: That made it.
        parser: That filled it; it holds weights the network refers to.
        log: Gets what the library says.
    """

    network: Any
    builder: Any
    parser: Any
    log: Any


def parse_graph(library: Library, log: Any, graph: GraphSpec, path: Path) -> Parsed:
    """Parse a graph and hold its tensors against the specs.

    Args:
        library: To parse with.
        log: An ILogger of the library; must outlive the result.
        graph: What the file is to take and give.
        path: The ONNX file, its data file beside it.

    Returns:
        The network.

    Raises:
        EngineError: The graph has something that would be dropped or cannot be built, or is not
            the one of the specs.
        BuildError: The library cannot parse it.
    """
    drops = find_silent_drops(path)
    if drops:
        raise EngineError(
            f"{path.name}: expected operators that {library.backend} computes as they stand, got "
            f"{'; '.join(drops)}. Export the bundle again with this version."
        )
    builder = library.module.Builder(log)
    network = library.create_network(builder)
    parser = library.module.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        reasons = [f"{error.node_operator()}: {error.desc()}" for error in errors]
        raise BuildError(
            f"{path.name}: expected a graph that {library.backend} {library.version} can parse, "
            f"got: {join_reasons(reasons)}. Use another version, or run it with ONNX Runtime."
        )
    _check_tensors(library, path, network, graph)
    _check_products(library, path, network, graph)
    return Parsed(network, builder, parser, log)


def find_silent_drops(path: Path) -> list[str]:
    """Name the operators of an ONNX file that would be dropped in part, or cannot be built.

    Args:
        path: The file; its weights are not read.

    Returns:
        A few words for each; none is the good answer.

    Raises:
        MissingExtraError: onnx is not installed.
    """
    onnx = require("onnx", "rtx")
    faults = []
    for node in _walk(onnx.load(path, load_external_data=False)):
        inputs, attributes = _DROPPED.get(node.op_type, ((), ()))
        given = [node.input[place] for place in inputs if len(node.input) > place]
        named = [each.name for each in node.attribute if each.name in attributes]
        faults += [
            f"{node.op_type} with {name}, which is dropped" for name in [*given, *named] if name
        ]
        if node.op_type in _NEED_A_PLUGIN:
            faults.append(f"{node.op_type}, which needs a plugin")
    return faults


def has_softmax(path: Path) -> bool:
    """Say whether an ONNX file has a Softmax, which in these models means attention.

    Args:
        path: The file; its weights are not read.

    Returns:
        Whether it has.

    Raises:
        MissingExtraError: onnx is not installed.
    """
    nodes = _walk(require("onnx", "rtx").load(path, load_external_data=False))
    return any(node.op_type == "Softmax" for node in nodes)


def join_reasons(reasons: Sequence[str]) -> str:
    """Join what a library said, which may be nothing."""
    return "; ".join(reasons) or "no reason"


def _walk(model: Any) -> Iterator[Any]:
    """Every node of a model: of its functions, and inside of the branches of others."""
    pending = [*model.graph.node, *(node for each in model.functions for node in each.node)]
    while pending:
        node = pending.pop(0)
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                pending += graph.node


def _check_tensors(library: Library, path: Path, network: Any, graph: GraphSpec) -> None:
    """Hold names, types and sizes of the network against the specs: what is asked for is built.

    The symbols of inputs are compared as well; a parser gives outputs none.

    Raises:
        EngineError: They differ.
    """
    outputs = [_without_symbols(spec) for spec in graph.outputs]
    sides = (
        ("inputs", network.num_inputs, network.get_input, (*graph.inputs, *graph.weights)),
        ("outputs", network.num_outputs, network.get_output, outputs),
    )
    for side, count, get, specs in sides:
        got = _list(_describe(library, get(number)) for number in range(count))
        expected = _list(specs)
        if got != expected:
            raise EngineError(
                f"{path.name}: expected the {side} {expected}, got {got}. Export the bundle again."
            )


def _check_products(library: Library, path: Path, network: Any, graph: GraphSpec) -> None:
    """Hold the products of a 16-bit graph to 16 bits, but for those that it says stay float32.

    Raises:
        EngineError: There are more in float32.
    """
    specs = (*graph.inputs, *graph.weights, *graph.outputs)
    if not any(spec.dtype in ("float16", "bfloat16") for spec in specs):
        return
    kinds, single = library.module.LayerType, library.module.DataType.FLOAT
    wanted = [getattr(kinds, name) for name in _PRODUCT_LAYERS]
    layers = map(network.get_layer, range(network.num_layers))
    wide = [
        layer.name
        for layer in layers
        if layer.type in wanted and layer.get_input(0).dtype == single
    ]
    nodes = _walk(require("onnx", "rtx").load(path, load_external_data=False))
    allowed = sum(
        node.op_type in _PRODUCTS and any(each.key == ISLAND_SCOPE for each in node.metadata_props)
        for node in nodes
    )
    if len(wide) > allowed:
        raise EngineError(
            f"{path.name}: expected at most {allowed} products of float32 in a graph of 16 bits, "
            f"got {len(wide)}: {', '.join(wide)}. Export the bundle again."
        )


def _describe(library: Library, tensor: Any) -> TensorSpec:
    """The spec of a network's tensor."""
    kinds = library.module.DataType
    names = {kinds.FLOAT: "float32", kinds.HALF: "float16", kinds.BF16: "bfloat16"}
    sizes = (
        size if size >= 0 else tensor.get_dimension_name(axis) or "?"
        for axis, size in enumerate(tensor.shape)
    )
    return TensorSpec(tensor.name, names.get(tensor.dtype, tensor.dtype.name.lower()), tuple(sizes))


def _without_symbols(spec: TensorSpec) -> TensorSpec:
    sizes = (size if isinstance(size, int) else "?" for size in spec.shape)
    return replace(spec, shape=tuple(sizes))


def _list(specs: Iterable[TensorSpec]) -> str:
    ordered = sorted(specs, key=lambda spec: spec.name)
    return ", ".join(f"'{spec.name}' {spec.describe()}" for spec in ordered)
