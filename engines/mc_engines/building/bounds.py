"""How large each tensor of a run can get: from the largest video to the bounds of every symbol.

The shapes are those of the bundle's specs; nothing is written twice. Neighbours: `compile` makes
optimization profiles of the bounds.
"""

__all__ = [
    "Bounds",
    "Shape",
    "VideoLimits",
    "bound_symbols",
    "bound_tensor",
    "bucket_symbols",
    "fits",
]

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mc_engines.run_sizes import count_text_tokens
from mc_engines.specs import TensorSpec, split_size

Shape = tuple[int, ...]
_WAN_FACTORS = {"spatial_factor": 8, "temporal_factor": 4}  # where a bundle has no VAE


@dataclass(frozen=True)
class Bounds:
    """The sizes that a symbol can take: smallest, usual, largest."""

    least: int
    usual: int
    most: int


@dataclass(frozen=True)
class VideoLimits:
    """The largest video that engines are built for.

    Attributes:
        height: Pixels.
        width: Pixels.
        max_frames: Pixel frames of one window.
        chunk_frames: Latent frames of a chunk.
    """

    height: int
    width: int
    max_frames: int
    chunk_frames: int


def bound_symbols(config: Mapping[str, Any], limits: VideoLimits) -> dict[str, Bounds]:
    """Bound the symbols of a bundle's specs.

    Args:
        config: Of the manifest.
        limits: The largest video.

    Returns:
        By symbol: K recomputed and L all tokens of a chunk, S and M keys of a window, F latent
        frames of a chunk, P positions of a frame, T tokens of a prompt, h and w latents; of an
        autoencoder that works in tiles, f latent frames and N tokens of one.

    Raises:
        ValueError: A size is no whole number of tokens, or a window holds no chunk.

    Example:
        >>> config = {"transformer": {"patch_size": [1, 2, 2]}}
        >>> bound_symbols(config, VideoLimits(544, 960, 97, 5))["S"].most
        51000
    """
    factors = config.get("vae", _WAN_FACTORS)
    _, *patch = config["transformer"]["patch_size"]
    latents = []
    for name, size, side in zip(
        ("height", "width"), (limits.height, limits.width), patch, strict=True
    ):
        step = side * factors["spatial_factor"]
        if size < step or size % step:
            below = size // step * step
            nearest = [each for each in (below, below + step) if each > 0] or [step]
            raise ValueError(
                f"{name}: expected a multiple of {step}, got {size}. "
                f"Use {' or '.join(map(str, nearest))}."
            )
        latents.append(size // factors["spatial_factor"])
    if limits.chunk_frames < 1:
        raise ValueError(
            f"causal_block_size: expected at least 1, got {limits.chunk_frames}. Raise it."
        )
    frames = (limits.max_frames - 1) // factors["temporal_factor"] + 1
    if frames < limits.chunk_frames:
        least = (limits.chunk_frames - 1) * factors["temporal_factor"] + 1
        raise ValueError(
            f"max_frames: expected at least {least}, a chunk of {limits.chunk_frames} latent "
            f"frames, got {limits.max_frames}. Raise it."
        )
    positions = math.prod(latents) // math.prod(patch)
    chunk, window = limits.chunk_frames * positions, frames * positions
    text = count_text_tokens(config)
    return _bound_tiles(factors.get("tile", [])) | {
        "K": Bounds(1, chunk, chunk),
        "L": Bounds(1, chunk, chunk),
        "S": Bounds(1, window, window),
        "M": Bounds(1, window, window),
        "F": Bounds(1, limits.chunk_frames, limits.chunk_frames),
        "P": Bounds(1, positions, positions),
        "T": Bounds(1, text, text),
        "h": Bounds(patch[0], latents[0], latents[0]),
        "w": Bounds(patch[1], latents[1], latents[1]),
    }


def _bound_tiles(tile: Sequence[int]) -> dict[str, Bounds]:
    """Bound latent frames and tokens of the tiles that an autoencoder works in, if it does."""
    if not tile:
        return {}
    frames, tokens = tile[0], math.prod(tile) + 1  # the token before those of the tile
    return {"f": Bounds(1, frames, frames), "N": Bounds(1, tokens, tokens)}


def bucket_symbols(symbols: Mapping[str, Bounds], share: float) -> dict[str, Bounds]:
    """Fix the recomputed tokens to a share of a chunk's, as an engine of fixed sizes has them."""
    tokens = math.ceil(share * symbols["K"].most)
    return {**symbols, "K": replace(symbols["K"], least=tokens, usual=tokens, most=tokens)}


def bound_tensor(spec: TensorSpec, symbols: Mapping[str, Bounds]) -> tuple[Shape, Shape, Shape]:
    """Return the smallest, usual and largest shape of a tensor; `8*h` is eight times h.

    Args:
        spec: Of the tensor.
        symbols: Of `bound_symbols`.

    Raises:
        ValueError: A symbol has no bounds.

    Example:
        >>> spec = TensorSpec("x", "float32", (1, "K", 64))
        >>> bound_tensor(spec, {"K": Bounds(1, 320, 320)})
        ((1, 1, 64), (1, 320, 64), (1, 320, 64))
    """
    bounds = [_bound_size(spec, size, symbols) for size in spec.shape]
    least, usual, most = (
        tuple(getattr(each, name) for each in bounds) for name in ("least", "usual", "most")
    )
    return least, usual, most


def fits(shape: Shape, least: Shape, most: Shape) -> bool:
    """Say whether a shape lies within bounds, axis by axis."""
    return len(shape) == len(least) and all(
        low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
    )


def _bound_size(spec: TensorSpec, size: int | str, symbols: Mapping[str, Bounds]) -> Bounds:
    if isinstance(size, int):
        return Bounds(size, size, size)
    times, symbol = split_size(size)
    if symbol not in symbols:
        raise ValueError(
            f"tensor '{spec.name}': expected sizes of {', '.join(symbols)}, got '{size}'. "
            "Export the bundle again with this version."
        )
    base = symbols[symbol]
    return Bounds(times * base.least, times * base.usual, times * base.most)
