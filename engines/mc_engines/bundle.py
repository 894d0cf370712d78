"""A bundle: the folder in which an exported model lives.

Neighbours: `BundleWriter` writes it, `verify` finds what is wrong with it, `open_runner` runs a
graph of it. docs/bundle.md specifies it for programs in other languages.
"""

__all__ = ["Bundle"]

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mc_engines.errors import BundleError
from mc_engines.manifest import Manifest, read_manifest
from mc_engines.runner import Array
from mc_engines.safetensors_map import map_safetensors
from mc_engines.specs import ComponentSpec, GraphSpec, TensorSpec
from mc_engines.verify import find_file_faults


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. Nothing is loaded: graphs are named, weights are mapped.

    Attributes:
        path: The folder.
        manifest: What it holds.
        hash: sha256 of `manifest.json`. As the manifest holds the hash of every file, this
            identifies the whole bundle.
    """

    path: Path
    manifest: Manifest
    hash: str

    @classmethod
    def open(cls, path: str | Path) -> "Bundle":
        """Open a bundle whose manifest is sound and whose files are all there, in their sizes.

        Engines need not be: who wants one checks it, and mc-build makes it again.

        Args:
            path: The folder.

        Returns:
            The bundle. The content of the files is not read: `find_faults` does that.

        Raises:
            BundleError: The bundle is damaged, incomplete or of another schema version; a path
                leads outside; something is a link.
        """
        folder = Path(path)
        manifest, digest = read_manifest(folder)
        for fault in find_file_faults(folder, manifest, engines=False):
            raise BundleError(fault)
        return cls(folder, manifest, digest)

    @property
    def model_hash(self) -> str:
        """sha256 of what decides the output: config, graphs, weights and tokenizer.

        Unlike `hash` it stays when presets, engines or reports are added.
        """
        value = self.manifest.to_json()
        decisive = ("onnx", "weights", "tokenizer")
        files = {
            path: entry.sha256
            for path, entry in self.manifest.files.items()
            if path.split("/")[0] in decisive
        }
        parts = [value["family"], value["config"], value["components"], sorted(files.items())]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def component(self, name: str) -> ComponentSpec:
        """Look up a component.

        Args:
            name: Such as `block`.

        Returns:
            Its graphs and weight files.

        Raises:
            BundleError: The bundle has no such component.
        """
        spec = self.manifest.components.get(name)
        if spec is None:
            missing = " and ".join(self.manifest.missing)
            way_out = (
                f"Its checkpoint lacked {missing}: export again from one that has it."
                if missing
                else f"It has {', '.join(self.manifest.components)}."
            )
            raise BundleError(f"{self.path}: expected component '{name}', got none. {way_out}")
        return spec

    def graph(self, component: str, form: str) -> GraphSpec:
        """Look up a graph of a component.

        Args:
            component: Such as `block`.
            form: Such as `fp32`.

        Returns:
            Its file, inputs, weights and outputs.

        Raises:
            BundleError: The bundle has no such component, or not in this form.
        """
        graphs = self.component(component).graphs
        if form not in graphs:
            raise BundleError(
                f"{self.path}: component '{component}': expected form '{form}', "
                f"got only {', '.join(graphs)}."
            )
        return graphs[form]

    def graph_path(self, component: str, form: str) -> Path:
        """Return where the ONNX file of a graph lies.

        Args:
            component: Such as `block`.
            form: Such as `fp32`.

        Returns:
            A path in the bundle.

        Raises:
            BundleError: The bundle has no such graph.
        """
        return self.path / self.graph(component, form).file

    def map_tensors(self, file: str) -> dict[str, Array]:
        """Map a safetensors file of the bundle.

        Args:
            file: Its path in the manifest, such as `weights/text_embed.safetensors`.

        Returns:
            Read-only views of the mapped file, by tensor name, in the stored dtypes.

        Raises:
            BundleError: The bundle has no such file, or it is damaged.
        """
        if file not in self.manifest.files:
            raise BundleError(f"{self.path}: expected file '{file}', got none in the manifest.")
        return map_safetensors(self.path / file)

    def layer_weights(self, component: str, layer: int, form: str) -> dict[str, Array]:
        """Return the weights of one layer as the graph takes them.

        Args:
            component: One whose weights are graph inputs, such as `block`.
            layer: From 0.
            form: Such as `fp32`.

        Returns:
            One array per spec of the graph's weights. Where the stored dtype is the graph's, a
            view of the mapped file; else a copy.

        Raises:
            ValueError: The component has no such layer.
            BundleError: A tensor is missing, unexpected, of another shape, or too large for
                float16.
        """
        graph = self.graph(component, form)
        files = self.component(component).weight_files
        if not 0 <= layer < len(files):
            raise ValueError(
                f"{component}: expected a layer from 0 to {len(files) - 1}, got {layer}."
            )
        stored = self.map_tensors(files[layer])
        expected = {spec.name for spec in graph.weights}
        if set(stored) != expected:
            raise BundleError(
                f"{self.path / files[layer]}: expected the tensors of {graph.file}, got "
                f"{sorted(stored.keys() - expected)} too many and without "
                f"{sorted(expected - stored.keys())}. Export the bundle again."
            )
        return {
            spec.name: _cast(self.path / files[layer], spec, stored[spec.name])
            for spec in graph.weights
        }


def _cast(path: Path, spec: TensorSpec, stored: Array) -> Array:
    if stored.shape != spec.shape:
        raise BundleError(
            f"{path}: tensor '{spec.name}': expected {spec.describe()}, got {stored.shape}. "
            "Export the bundle again."
        )
    if stored.dtype == spec.numpy_dtype:
        return stored
    with np.errstate(over="ignore"):
        array = stored.astype(spec.numpy_dtype)
    if spec.dtype == "float16" and np.isinf(array).any():
        raise BundleError(
            f"{path}: tensor '{spec.name}': expected values that fit float16, got "
            f"{np.abs(stored.astype(np.float32)).max():g}. Use the form bf16 or fp32."
        )
    return array
