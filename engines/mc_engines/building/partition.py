"""What becomes one engine: a component, or a group of its layers with their weights inside.

Shared is the rule: one graph serves every layer, and takes the weights as inputs. A baked group
runs its layers one after the other in one go: fewer calls, and weights that the library can lay out
as it likes, for engines as large as the weights. The graph of a group is made of that of one layer.

Neighbours: `bundle.graph` has that graph, `provide_engine` builds a part.
"""

__all__ = ["Part", "bake_layers", "divide", "graph_hash", "graph_of"]

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mc_engines.bundle import Bundle
from mc_engines.errors import require
from mc_engines.specs import GraphSpec, TensorSpec

_LAYERED = "block"
_OF_A_LAYER = ("cross_k", "cross_v", "k_cache", "v_cache", "k_new", "v_new")
_ALIGNMENT = 4096  # of a tensor in a data file, so that it can be mapped


@dataclass(frozen=True)
class Part:
    """What one engine computes.

    Attributes:
        component: Such as `block`.
        layers: Of the group, whose weights are inside, in order; empty: weights are inputs, or in
            the graph of the component.

    Example:
        >>> Part("block", (0, 1, 2)).name
        'block.00-02'
    """

    component: str
    layers: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Such as `block`, or `block.00-04`."""
        ends = f".{self.layers[0]:02}-{self.layers[-1]:02}" if self.layers else ""
        return self.component + ends


def divide(bundle: Bundle, components: Sequence[str], size: int | None) -> list[Part]:
    """Divide components into what becomes one engine each.

    Args:
        bundle: Of the components.
        components: Their names.
        size: Layers of a group; None: the layers share one engine.

    Returns:
        The parts; the last group may be smaller.

    Raises:
        ValueError: There are not so many layers.
    """
    count = len(bundle.component(_LAYERED).weight_files)
    if size is not None and not 1 <= size <= count:
        raise ValueError(
            f"partition: expected groups of 1 to {count} layers, got {size}. Give another number."
        )
    parts = []
    for name in components:
        if name == _LAYERED and size is not None:
            starts = range(0, count, size)
            parts += [Part(name, tuple(range(count))[start : start + size]) for start in starts]
        else:
            parts.append(Part(name))
    return parts


def graph_of(bundle: Bundle, part: Part, form: str) -> GraphSpec:
    """Return what a part takes and gives: of a group, keys and values have a layer's place behind.

    Args:
        bundle: Of the component.
        part: Of the bundle.
        form: Precision of its graph.

    Returns:
        The specs; those of a group name a file that `bake_layers` makes.

    Raises:
        BundleError: The bundle has no such graph.
    """
    graph = bundle.graph(part.component, form)
    if not part.layers:
        return graph

    def spread(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        places = range(len(part.layers))
        single = [spec for spec in specs if spec.name not in _OF_A_LAYER]
        own = [
            replace(spec, name=f"{spec.name}.{place}")
            for place in places
            for spec in specs
            if spec.name in _OF_A_LAYER
        ]
        return (*single, *own)

    file = f"onnx/{part.name}.{form}.onnx"
    return GraphSpec(file, spread(graph.inputs), spread(graph.outputs))


def graph_hash(bundle: Bundle, part: Part, form: str) -> str:
    """Hash the graph of a part, with the weights that are inside.

    Args:
        bundle: Of the component.
        part: Of the bundle.
        form: Precision of its graph.

    Returns:
        sha256, hexadecimal.

    Raises:
        BundleError: The bundle has no such graph.
    """
    graph, files = bundle.graph(part.component, form), bundle.manifest.files
    data = files.get(f"onnx/{part.component}.onnx.data")
    weight_files = bundle.component(part.component).weight_files
    parts = [
        files[graph.file].sha256,
        None if data is None else data.sha256,
        [files[weight_files[layer]].sha256 for layer in part.layers],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def bake_layers(bundle: Bundle, part: Part, form: str, folder: Path) -> Path:
    """Write the graph of a group of layers, and a file of their weights beside it.

    Args:
        bundle: Of the layers.
        part: With layers.
        form: Precision of the graph.
        folder: To write to.

    Returns:
        The ONNX file; its tensors are those of `graph_of`.

    Raises:
        BundleError: A weight is missing, or too large for float16.
        MissingExtraError: onnx is not installed.
        OSError: The folder cannot be written.
    """
    onnx = require("onnx", "rtx")
    graph = bundle.graph(part.component, form)
    model = onnx.load(bundle.graph_path(part.component, form))
    layer_nodes, constants = list(model.graph.node), [*model.graph.initializer]
    infos = {info.name: info for info in (*model.graph.input, *model.graph.output)}
    baked = model.graph
    for field in ("node", "initializer", "input", "output", "value_info"):
        baked.ClearField(field)
    baked.initializer.extend(constants)
    path = folder / f"{part.name}.{form}.onnx"
    with path.with_name(f"{path.name}.data").open("wb") as data:
        for place, layer in enumerate(part.layers):
            names = _rename(graph, place, place + 1 == len(part.layers))
            names |= {constant.name: constant.name for constant in constants}
            baked.node.extend(_copy(onnx, node, names, place) for node in layer_nodes)
            for name, array in bundle.layer_weights(part.component, layer, form).items():
                baked.initializer.append(_store(onnx, data, f"{place}/{name}", array))
    group = graph_of(bundle, part, form)
    for specs, values in ((group.inputs, baked.input), (group.outputs, baked.output)):
        for spec in specs:
            values.append(infos[spec.name.partition(".")[0]])
            values[-1].name = spec.name
    onnx.save(model, path)
    return path


def _rename(graph: GraphSpec, place: int, last: bool) -> dict[str, str]:
    """Name the inputs and outputs of a layer in the graph of the group; y becomes the next x."""
    names = {
        spec.name: f"{spec.name}.{place}" if spec.name in _OF_A_LAYER else spec.name
        for spec in (*graph.inputs, *graph.outputs)
    }
    names["x"] = f"{place - 1}/y" if place else "x"
    names["y"] = "y" if last else f"{place}/y"
    return names


def _copy(onnx: Any, node: Any, names: dict[str, str], place: int) -> Any:
    """Copy a node; what is inside of a layer has the layer's place before its name."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{place}/{node.name}"
    for values in (copy.input, copy.output):
        values[:] = [name and names.get(name, f"{place}/{name}") for name in values]
    return copy


def _store(onnx: Any, data: Any, name: str, array: Any) -> Any:
    """Append an array to a data file, and return the tensor that names its place there."""
    data.write(bytes(-data.tell() % _ALIGNMENT))
    place = {"location": Path(data.name).name, "offset": data.tell(), "length": array.nbytes}
    data.write(array.tobytes())
    tensor = onnx.TensorProto(
        name=name,
        dims=array.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
