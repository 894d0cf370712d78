"""Build engines of the real sizes with TensorRT-RTX, and print their sizes and times.

Nothing is executed, and no GPU is needed. The weights of a block, of `context` and of the text
encoder are inputs of their graphs, so that they need not exist; those inside of other graphs are
made up. A build for SM75 is one of its own, for it can be in fp16 alone.

    scripts/engine_sizes.py                          the real sizes, for 540P; or some by --parts
    scripts/engine_sizes.py --bundle mini.bundle     every graph of a bundle
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from mc_engines.building.bounds import VideoLimits, bound_symbols
from mc_engines.building.compile import Request, build_plan, count_attention_kernels
from mc_engines.building.library import Library, open_library
from mc_engines.building.network import has_softmax
from mc_engines.bundle import Bundle
from mc_engines.errors import BuildError
from mc_engines.published import PUBLISHED, UMT5_XXL, WAN21_VAE
from mc_engines.specs import GraphSpec, Precision, TensorSpec
from mc_export.component import ComponentSource
from mc_export.onnx_export import export_component
from mc_export.passes.set_precision import set_precision
from mc_export.random_source import RandomSource
from mc_export.skyreels_components import transformer_components, transformer_tensors
from mc_export.t5 import text_encoder_components, text_encoder_tensors
from mc_export.wan_vae_components import vae_components, vae_tensors

BUILDS: tuple[tuple[Precision, tuple[int, ...]], ...] = (
    ("bf16", (80, 86, 89, 120)),
    ("fp16", (80, 86, 89, 120)),
    ("fp16", (75,)),
)
LIMITS = VideoLimits(544, 960, 97, 5)
MODELS = {"df-1.3b": "skyreels-df-1.3b-540p", "df-14b": "skyreels-df-14b-540p"}
PARTS = [*MODELS, "text", "vae"]


class Zeros(RandomSource):
    """A checkpoint of any size that takes no memory."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(shapes, torch.float32, seed=0)

    def load(self, name: str) -> Tensor:
        """A zero, seen as a tensor of the shape."""
        return torch.zeros(()).expand(self.shape(name))


def describe_graph(path: Path, model: ir.Model) -> GraphSpec:
    """Return the specs of a model that lies in a file; weights count as inputs."""

    def describe(values: Any) -> tuple[TensorSpec, ...]:
        names = {"float": "float32"}
        return tuple(
            TensorSpec(
                value.name,
                names.get(value.dtype.name.lower(), value.dtype.name.lower()),
                tuple(size if isinstance(size, int) else str(size) for size in value.shape),
            )
            for value in values
        )

    return GraphSpec(path.name, describe(model.graph.inputs), describe(model.graph.outputs))


def make_sources(name: str) -> Iterator[ComponentSource]:
    """Make the components of a transformer, of the text encoder, or of the VAE."""
    if name == "text":
        yield from text_encoder_components(UMT5_XXL, Zeros(text_encoder_tensors(UMT5_XXL)))
    elif name == "vae":
        yield from vae_components(
            WAN21_VAE, RandomSource(vae_tensors(WAN21_VAE), torch.bfloat16, seed=0)
        )
    else:
        config = PUBLISHED[MODELS[name]].transformer
        for source in transformer_components(config, Zeros(transformer_tensors(config))):
            if source.name != "timestep":
                yield source


def build_sources(library: Library, name: str) -> None:
    """Build every component of `make_sources`, each exported once, and print a line per build."""
    config = {"transformer": {"patch_size": [1, 2, 2]}}
    for source in make_sources(name):
        model = export_component(source)
        weights = [key for key, _ in source.module.named_parameters()] if source.layers else []
        for form, targets in BUILDS:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / f"{source.name}.{form}.onnx"
                low = set_precision(model, form, source.float32, frozenset(weights))
                graph = describe_graph(path, low)
                ir.save(low, path, external_data=f"{path.name}.data")
                request = Request(targets, [bound_symbols(config, LIMITS)])
                build(library, f"{name} {source.name}", form, graph, path, request)


def build_bundle(library: Library, folder: Path) -> None:
    """Build every graph of a bundle that a GPU runs, for the largest video that it was made for."""
    bundle = Bundle.open(folder)
    config = bundle.manifest.config
    video = config.get("video", {"height": LIMITS.height, "width": LIMITS.width})
    limits = VideoLimits(video["height"], video["width"], LIMITS.max_frames, LIMITS.chunk_frames)
    for form, targets in BUILDS:
        sizes, start = [], time.perf_counter()
        for name, component in bundle.manifest.components.items():
            if form in component.graphs:
                graph, path = component.graphs[form], bundle.graph_path(name, form)
                request = Request(targets, [bound_symbols(config, limits)])
                sizes.append(build(library, f"{folder.stem} {name}", form, graph, path, request))
        built = [size for size in sizes if size]
        cells = f"{sum(built) / 1e6:.2f} MB | {time.perf_counter() - start:.2f} s"
        title = f"all {len(built)} engines of {folder.stem}"
        print(f"| {title} | {form} | {' '.join(map(str, targets))} | {cells} | |", flush=True)


def build(
    library: Library, title: str, form: str, graph: GraphSpec, path: Path, request: Request
) -> int:
    """Build one engine, and print its size and time, or why there is none; return its bytes."""
    start = time.perf_counter()
    targets = " ".join(map(str, request.targets))
    try:
        plan = build_plan(library, graph, path, request)
    except BuildError as error:
        print(f"| {title} | {form} | {targets} | not built: {error} | | |", flush=True)
        return 0
    spent, kernels = time.perf_counter() - start, "none"
    if has_softmax(path):
        kernels = str(count_attention_kernels(plan) or "unknown")
    cells = f"{len(plan) / 1e6:.2f} MB | {spent:.2f} s | {kernels}"
    print(f"| {title} | {form} | {targets} | {cells} |", flush=True)
    return len(plan)


def main() -> None:
    """Build what is named, in this order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--bundle", type=Path)
    arguments = parser.parse_args()
    library = open_library("tensorrt-rtx")
    print(f"{library.backend} {library.version}: compiled, not executed\n")
    print("| component | dtype | SM | engine | build | attention kernels seen |")
    print("|---|---|---|---|---|---|", flush=True)
    if arguments.bundle is not None:
        build_bundle(library, arguments.bundle)
        return
    for name in arguments.parts:
        build_sources(library, name)


if __name__ == "__main__":
    main()
