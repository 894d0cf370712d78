"""What an export and a run of it will take, by arithmetic alone: the plan of `mc-export --dry-run`.

Parameters are counted from the shapes that the adapters expect of a checkpoint, so that there is
no second formula for them. Bytes are decimal: 1 GB is 10^9.

Neighbours: `plan_run_sizes` says what a run holds in memory; a family's adapter says which of the
plans here are its own; `size_table` prints them.
"""

__all__ = [
    "ComponentSize",
    "SizePlan",
    "count_positions",
    "estimate_export",
    "plan_components",
    "plan_runs",
    "plan_sizes",
]

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mc_engines.decoder_tape import DecoderShape, Level
from mc_engines.host_sizes import hold_blocks, hold_decoder
from mc_engines.onnxruntime_runner import HELD_WEIGHTS_BYTES
from mc_engines.run_sizes import RunSizes, WindowShape, plan_run_sizes
from mc_export.component import ComponentSource
from mc_export.tensor_source import Shape

_TEMPORAL_FACTOR = 4

# The component that takes each tensor: the first whose pattern fits.
_COMPONENTS = {
    "transformer": {
        "context": r"blocks\.\d+\.attn2\.(to_k|to_v|norm_k)\..+",
        "block": r"blocks\..+",
        "text_projection": r"condition_embedder\.text_embedder\..+",
        "timestep": r"(condition_embedder|fps_embedding|fps_projection)\..+",
        "embed": r"patch_embedding\..+",
        "head": r".+",
    },
    "text_encoder": {
        "text_embedding": r"(shared|encoder\.embed_tokens)\.weight",
        "text_layer": r"encoder\.block\..+",
        "text_norm": r".+",
    },
    "vae": {"vae_encoder": r"(encoder|quant_conv)\..+", "vae_decoder": r".+"},
}
_UP = "decoder.up_blocks"
_LAYER = re.compile(r"(?:blocks|encoder\.block)\.(\d+)\.")
# Copied from file to file; it is no graph.
_TABLE = "text_embedding"

# Measured with torch 2.13, ONNX Runtime 1.31: what a process holds that has exported a tiny model.
_PROCESS_BYTES = 310_000_000


@dataclass(frozen=True)
class ComponentSize:
    """Weights of one component.

    Attributes:
        name: As in the bundle.
        layers: How often its graph runs, each time with weights of its own; 1 for most.
        parameters: Of all layers.
        bytes: On disk.
    """

    name: str
    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class SizePlan:
    """The plan of an export and of a run of it.

    Attributes:
        dtype: Of the weights as stored.
        video: Height and width in pixels, pixel frames of a window.
        chunk_tokens: L.
        window_tokens: S.
        components: Of the bundle, those that have weights.
        bundle: Bytes of all weights on disk.
        export_peak: Estimate of the memory that the export takes beside mapped files.
        cpu: A run in float32 in ONNX Runtime, whose passes and steps of the decoder are what its
            arenas keep of them; what a process holds anyway is not in it.
        device: A run in 16 bit whose transformer and caches lie on a device.
    """

    dtype: torch.dtype
    video: tuple[int, int, int]
    chunk_tokens: int
    window_tokens: int
    components: tuple[ComponentSize, ...]
    bundle: int
    export_peak: int
    cpu: RunSizes
    device: RunSizes


def plan_sizes(
    transformer: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Shape]],
    *,
    dtype: torch.dtype,
    height: int,
    width: int,
    base_num_frames: int,
    chunk: int,
    spatial_factor: int = 8,
) -> SizePlan:
    """Plan the sizes of an export and of a run.

    Args:
        transformer: The transformer's configuration, diffusers' keys.
        parts: Shape of each tensor by name, for `transformer`, and for `text_encoder` and `vae`
            where the checkpoint has them.
        dtype: Weights are stored in it.
        height: Pixels.
        width: Pixels.
        base_num_frames: Pixel frames of a window.
        chunk: Latent frames of a chunk.
        spatial_factor: Pixels per latent along each side.

    Returns:
        The plan.

    Raises:
        ValueError: The sizes are no whole number of patches or chunks.
    """
    chunk_tokens = chunk * count_positions(height, width, spatial_factor, transformer["patch_size"])
    window_tokens = chunk_tokens * _chunks(base_num_frames, chunk)
    components = tuple(
        component
        for part, shapes in parts.items()
        for component in _components(part, shapes, dtype.itemsize)
    )
    window = _describe_window(transformer, chunk_tokens, window_tokens)
    cpu, device = plan_runs(window, components, dtype)
    decode = _decoding_bytes(
        parts.get("vae", {}), (height // spatial_factor, width // spatial_factor), window, chunk
    )
    return SizePlan(
        dtype=dtype,
        video=(height, width, base_num_frames),
        chunk_tokens=chunk_tokens,
        window_tokens=window_tokens,
        components=components,
        bundle=sum(component.bytes for component in components),
        export_peak=estimate_export(components, dtype.itemsize),
        cpu=_hold_arenas(cpu, window, decode),
        device=device,
    )


def plan_components(
    sources: Iterable[ComponentSource],
    tables: Mapping[str, Mapping[str, Tensor]],
    dtype: torch.dtype,
) -> tuple[ComponentSize, ...]:
    """Count what the components of a family hold, without a formula of its own.

    Args:
        sources: The components.
        tables: Tensors by name of what the bundle holds beside them.
        dtype: Weights are stored in it.

    Returns:
        Components and tables that have weights.
    """
    counts = [
        (source.name, max(1, len(source.layers)), _count(source.module.parameters()))
        for source in sources
    ]
    counts += [(name, 1, _count(tensors.values())) for name, tensors in tables.items()]
    return tuple(
        ComponentSize(name, layers, layers * count, layers * count * dtype.itemsize)
        for name, layers, count in counts
        if count
    )


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _describe_window(
    transformer: Mapping[str, Any], chunk_tokens: int, window_tokens: int
) -> WindowShape:
    heads = transformer["num_attention_heads"]
    return WindowShape(
        transformer["num_layers"],
        heads,
        heads * transformer["attention_head_dim"],
        transformer["ffn_dim"],
        chunk_tokens,
        window_tokens,
    )


def plan_runs(
    window: WindowShape, components: tuple[ComponentSize, ...], dtype: torch.dtype
) -> tuple[RunSizes, RunSizes]:
    """Plan what a run holds, by arithmetic alone.

    Args:
        window: The largest of the run.
        components: Of the bundle.
        dtype: Weights are stored in it.

    Returns:
        A run in float32 in ONNX Runtime, without what its arenas keep, and one in 16 bit whose
        transformer and caches lie on a device.
    """
    weights = 0 if dtype == torch.float32 else _held_weights(components)
    cpu = plan_run_sizes(window, value_bytes=4, weights=weights, decode=0)
    resident = sum(c.parameters for c in components if c.name in _COMPONENTS["transformer"])
    return cpu, plan_run_sizes(window, value_bytes=2, weights=2 * resident, decode=0)


def _hold_arenas(sizes: RunSizes, window: WindowShape, decode: int) -> RunSizes:
    """Put in what ONNX Runtime keeps, which gives nothing back: passes and decoding add up."""
    plain, fused = hold_blocks(window)
    held = sizes.kv + sizes.context + sizes.residual + sizes.weights
    peak = held + plain + fused + decode
    return replace(sizes, pass_plain=plain, pass_fused=fused, decode=decode, peak=peak)


def _decoding_bytes(
    vae: Mapping[str, Shape], latents: tuple[int, int], window: WindowShape, chunk: int
) -> int:
    """Of decoding the chunks of a window; 0 without a decoder."""
    if f"{_UP}.0.resnets.0.conv1.weight" not in vae:
        return 0
    steps = chunk * window.window_tokens // window.chunk_tokens
    shape = _describe_decoder(vae)
    return hold_decoder(shape, *latents, steps, frames=chunk * _TEMPORAL_FACTOR).arenas


def _describe_decoder(vae: Mapping[str, Shape]) -> DecoderShape:
    """Read the decoder off the shapes of its convolutions, which are (out, in, ...)."""
    levels: list[Level] = []
    while (first := f"{_UP}.{len(levels)}.resnets.0.conv1.weight") in vae:
        block = f"{_UP}.{len(levels)}"
        count = sum(bool(re.fullmatch(rf"{block}\.resnets\.\d+\.conv1\.weight", n)) for n in vae)
        rate = f"{block}.upsamplers.0.time_conv.weight" in vae
        levels.append(Level(vae[first][1], vae[first][0], count, rate))
    return DecoderShape(vae["decoder.conv_in.weight"][1], tuple(levels))


def count_positions(
    height: int, width: int, spatial_factor: int, patch_size: tuple[int, int, int]
) -> int:
    """Count the tokens of a latent frame.

    Args:
        height: Pixels.
        width: Pixels.
        spatial_factor: Pixels per latent along each side.
        patch_size: Latents of a token along time, height and width.

    Returns:
        The count.

    Raises:
        ValueError: The sizes are no whole number of patches.
    """
    sides = [spatial_factor * patch for patch in patch_size[1:]]
    for name, size, side in zip(("height", "width"), (height, width), sides, strict=True):
        if size < side or size % side:
            nearest = [low for low in (size // side * side, (size // side + 1) * side) if low]
            raise ValueError(
                f"{name}: expected a multiple of {side}, got {size}. "
                f"Use {' or '.join(map(str, nearest))}."
            )
    return math.prod(size // side for size, side in zip((height, width), sides, strict=True))


def _chunks(base_num_frames: int, chunk: int) -> int:
    chunks, rest = divmod((base_num_frames - 1) / _TEMPORAL_FACTOR + 1, chunk)
    if chunks < 1 or rest:
        nearest = [
            (count * chunk - 1) * _TEMPORAL_FACTOR + 1
            for count in (int(chunks), int(chunks) + 1)
            if count > 0
        ]
        raise ValueError(
            f"base_num_frames: expected whole chunks of {chunk} latent frames, got "
            f"{base_num_frames}. Use {' or '.join(map(str, nearest))}."
        )
    return int(chunks)


def _components(part: str, shapes: Mapping[str, Shape], itemsize: int) -> list[ComponentSize]:
    patterns = _COMPONENTS[part]
    taken: dict[str, dict[str, Shape]] = {name: {} for name in patterns}
    for tensor, shape in shapes.items():
        name = next(name for name, pattern in patterns.items() if re.fullmatch(pattern, tensor))
        taken[name][tensor] = shape
    if part == "vae":
        taken = {
            f"{name}_{step}": tensors if step == "next" else _first_step(tensors)
            for name, tensors in taken.items()
            for step in ("first", "next")
        }
    return [_component(name, tensors, itemsize) for name, tensors in taken.items()]


def _first_step(tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    """Keep one slice of each kernel along time, and no convolution along time alone."""
    return {
        name: (*shape[:2], *shape[3:]) if len(shape) == 5 else shape
        for name, shape in tensors.items()
        if ".time_conv." not in name
    }


def _component(name: str, tensors: Mapping[str, Shape], itemsize: int) -> ComponentSize:
    layers = {match[1] for match in map(_LAYER.match, tensors) if match}
    parameters = sum(map(math.prod, tensors.values()))
    return ComponentSize(name, max(1, len(layers)), parameters, parameters * itemsize)


def _layer_bytes(components: tuple[ComponentSize, ...], name: str, itemsize: int) -> int:
    return sum(c.parameters // c.layers * itemsize for c in components if c.name == name)


def _held_weights(components: tuple[ComponentSize, ...]) -> int:
    """Block weights cast to float32: all of them, or one layer where that is too much."""
    total = sum(4 * c.parameters for c in components if c.name == "block")
    return total if total <= HELD_WEIGHTS_BYTES else _layer_bytes(components, "block", 4)


def estimate_export(components: tuple[ComponentSize, ...], itemsize: int) -> int:
    """Estimate the memory that an export takes beside mapped files.

    Args:
        components: Of the bundle.
        itemsize: Bytes of a stored weight.

    Returns:
        Bytes: the largest layer or baked component, as stored, in float32 in torch and in the
        engine.
    """
    copies = itemsize + 4 + 4
    return _PROCESS_BYTES + max(
        _layer_bytes(components, c.name, copies) for c in components if c.name != _TABLE
    )
