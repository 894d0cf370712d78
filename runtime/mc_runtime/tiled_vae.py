"""Between pixels and latents in overlapping tiles, each a sequence of tokens: MAGI-1's autoencoder.

Tiles follow one another in time and overlap in space, where neighbours are blended. Nothing is kept
from tile to tile, so a chunk is decoded by itself. `mc_export.magi_vae` says what the graphs
compute. Neighbours: `mc_runtime.vae` is the other kind; the pipeline decodes each chunk when it is
clean.

Axes: f, h, w latents of a tile, N their number, C channels of tokens, z channels of latents.

Source: SandAI-org/MAGI-1 6ff822e, inference/infra/parallelism/tile_parallel.py, inference/model/vae
and inference/pipeline/video_process.py.
"""

__all__ = [
    "DECODED",
    "ENCODED",
    "TiledDecoder",
    "TiledEncoder",
    "TiledVaeConfig",
    "open_decoder",
    "open_encoder",
]

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.runner import Array, Arrays, Runner
from mc_runtime.vae import Coding, VaeParts, VaeState, check_latents, to_pixels

Pixels = NDArray[np.float32]
Place = tuple[int, int]  # of a tile in its row and column


@dataclass(frozen=True)
class TiledVaeConfig:
    """What driving the autoencoder takes; the fields are those of the bundle's `config.vae`.

    Attributes:
        z_dim: z.
        spatial_factor: Pixels per position of a latent frame, along each side.
        temporal_factor: Frames per latent frame.
        latents_scale: By which an encoder's latents are multiplied.
        layers: Of each transformer.
        positions: Latents along time, height and width that positions were learnt for.
        tile: Latents of a tile, along the same.
        overlap: Latents that a tile shares with the next, along each side.
    """

    z_dim: int
    spatial_factor: int
    temporal_factor: int
    latents_scale: float
    layers: int
    positions: Sequence[int]
    tile: Sequence[int]
    overlap: int

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels that a latent stands for."""
        return self.temporal_factor, self.spatial_factor, self.spatial_factor


@dataclass(frozen=True)
class TokenStack:
    """One way through the autoencoder, from patches of a tile to its tokens.

    Attributes:
        embed: Runs `vae_..._embed`.
        block: Runs `vae_..._block`.
        layer_weights: Gives the weights of its layers.
        layers: How many there are.
        positions: Of the token before those of a tile, then of the tokens, shape (1 + F*H*W, C).
        grid: F, H and W.
    """

    embed: Runner
    block: Runner
    layer_weights: Callable[[int], Arrays]
    layers: int
    positions: Array
    grid: Sequence[int]

    def run(self, patches: Sequence[Array]) -> list[Array]:
        """Map tiles, layer by layer, so that the weights of one are in memory at a time.

        Args:
            patches: Tiles of shape (f, h, w, channels).

        Returns:
            Their tokens, shape (f, h, w, C).
        """
        sizes = [tile.shape[:3] for tile in patches]
        positions = {size: self._positions_of(size) for size in set(sizes)}
        tokens = [self._embed(tile, positions[tile.shape[:3]]) for tile in patches]
        for layer in range(self.layers):
            weights = self.layer_weights(layer)
            tokens = [self.block.run({"x": x}, weights)["y"] for x in tokens]
        return [x[0, 1:].reshape(*size, x.shape[-1]) for x, size in zip(tokens, sizes, strict=True)]

    def _positions_of(self, size: tuple[int, ...]) -> Array:
        learnt = self.positions[1:].astype(np.float32).reshape(*self.grid, -1)
        return resize_grid(learnt, size).reshape(1, -1, learnt.shape[-1])

    def _embed(self, tile: Array, positions: Array) -> Array:
        """Tokens (1, 1 + N, C)."""
        patches = np.ascontiguousarray(tile.reshape(1, -1, tile.shape[-1]), np.float32)
        x = self.embed.run({"patches": patches, "positions": positions})["x"]
        first = self.positions[:1].astype(x.dtype)[None]
        return np.concatenate([first, x], axis=1)


@dataclass(frozen=True)
class TiledDecoder:
    """Turns latents into frames.

    Attributes:
        stack: From latents to tokens.
        head: Runs `vae_decoder_head`.
        config: The autoencoder's constants.
    """

    stack: TokenStack
    head: Runner
    config: TiledVaeConfig

    def decode(
        self, latents: NDArray[np.float32], state: VaeState | None = None
    ) -> tuple[Pixels, VaeState]:
        """Decode the latent frames of a chunk.

        Args:
            latents: As the transformer knows them, shape (z, F, H, W).
            state: Not used, as chunks are decoded one by one.

        Returns:
            Frames in [-1, 1], shape (F * temporal_factor, height, width, 3), and an empty state.

        Raises:
            ValueError: The latents have another shape or dtype.
            EngineError: A graph failed.
        """
        check_latents(latents, self.config.z_dim)
        scaled = (latents / np.float32(self.config.latents_scale)).transpose(1, 2, 3, 0)
        length = self.config.tile[0]
        parts = [self._decode(scaled[at : at + length]) for at in range(0, len(scaled), length)]
        return np.clip(np.concatenate(parts), -1, 1), VaeState({})

    def _decode(self, latents: Array) -> Pixels:
        """Decode latents (f, H, W, z) that follow one another in one tile."""
        tiles = cut_tiles(latents, self.config.tile[1:], self.config.overlap)
        decoded = dict(zip(tiles, self.decode_tiles(list(tiles.values())), strict=True))
        factor = self.config.spatial_factor
        stride = [(size - self.config.overlap) * factor for size in self.config.tile[1:]]
        return join_tiles(decoded, stride, self.config.overlap * factor)

    def decode_tiles(self, tiles: Sequence[Array]) -> list[Pixels]:
        """Decode tiles, which know nothing of each other.

        Args:
            tiles: As the autoencoder knows latents, each shape (f, h, w, z).

        Returns:
            Of each, frames that are not clipped yet, shape (frames, height, width, 3).
        """
        decoded = (self.head.run({"x": x[None]})["frames"][0] for x in self.stack.run(tiles))
        return [np.ascontiguousarray(x.transpose(1, 2, 3, 0), np.float32) for x in decoded]


@dataclass(frozen=True)
class TiledEncoder:
    """Turns frames into latents: the mode of the posterior, so nothing is drawn.

    Attributes:
        stack: From pixels to tokens.
        head: Runs `vae_encoder_head`.
        config: The autoencoder's constants.
    """

    stack: TokenStack
    head: Runner
    config: TiledVaeConfig

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode a video.

        Args:
            frames: Shape (n * temporal_factor, height, width, 3), uint8; height and width multiples
                of the spatial factor.

        Returns:
            Latents as the transformer knows them, shape (z, n, H, W).

        Raises:
            ValueError: The frames have another count, size, shape or dtype.
            EngineError: A graph failed.
        """
        patches = self._cut_patches(frames)
        length = self.config.tile[0]
        parts = [self._encode(patches[at : at + length]) for at in range(0, len(patches), length)]
        latents = np.concatenate(parts).transpose(3, 0, 1, 2)
        return np.ascontiguousarray(latents) * np.float32(self.config.latents_scale)

    def _cut_patches(self, frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Lay out the pixels of each latent, shape (n, H, W, 3 * pixels): by colour, then time."""
        length, side, _ = self.config.patch
        shaped = frames.ndim == 4 and frames.shape[3] == 3 and frames.dtype == np.uint8
        if (
            not shaped
            or not frames.size
            or len(frames) % length
            or any(size % side for size in frames.shape[1:3])
        ):
            raise ValueError(
                f"video: expected uint8 (n, height, width, 3), n a multiple of {length}, height "
                f"and width of {side}, got {frames.dtype} {frames.shape}. Crop the video."
            )
        n, height, width, _ = frames.shape
        blocks = frames.reshape(n // length, length, height // side, side, width // side, side, 3)
        patches = blocks.transpose(0, 2, 4, 6, 1, 3, 5)
        return patches.reshape(n // length, height // side, width // side, -1)

    def _encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode patches (f, H, W, pixels) that follow one another in one tile."""
        tiles = cut_tiles(patches, self.config.tile[1:], self.config.overlap)
        encoded = dict(zip(tiles, self.encode_tiles(list(tiles.values())), strict=True))
        stride = [size - self.config.overlap for size in self.config.tile[1:]]
        return join_tiles(encoded, stride, self.config.overlap, blended=True)

    def encode_tiles(self, tiles: Sequence[NDArray[np.uint8]]) -> list[Array]:
        """Encode tiles, which know nothing of each other.

        Args:
            tiles: Patches of pixels, each shape (f, h, w, pixels).

        Returns:
            Of each, latents as the autoencoder knows them, shape (f, h, w, z).
        """
        encoded = []
        for x in self.stack.run([to_pixels(tile) for tile in tiles]):
            latents = self.head.run({"x": x.reshape(1, -1, x.shape[-1])})["latents"]
            encoded.append(latents.reshape(*x.shape[:3], -1))
        return encoded


def open_decoder(parts: VaeParts) -> TiledDecoder:
    """Open the decoder of a bundle; see `Family.open_decoder`."""
    return TiledDecoder(*_open("decoder", parts))


def open_encoder(parts: VaeParts) -> TiledEncoder:
    """Open the encoder of a bundle; see `Family.open_encoder`."""
    return TiledEncoder(*_open("encoder", parts))


def _open(half: str, parts: VaeParts) -> tuple[TokenStack, Runner, TiledVaeConfig]:
    embed, block, head = (
        parts.open(f"vae_{half}_{name}", form)
        for name, form in (("embed", "fp32"), ("block", "fp32-mha"), ("head", "fp32"))
    )
    config = TiledVaeConfig(**parts.config)
    weights = partial(parts.layer_weights, f"vae_{half}_block")
    positions = parts.tensors("weights/vae_positions.safetensors")[half]
    stack = TokenStack(embed, block, weights, config.layers, positions, config.positions)
    return stack, head, config


def _tile_shape(
    config: TiledVaeConfig, size: tuple[int, int], channels: int
) -> tuple[int, int, int, int]:
    """A tile at the corner of a picture of h and w latents."""
    frames, height, width = config.tile
    return frames, min(height, size[0]), min(width, size[1]), channels


def _prepare_decoder(decoder: TiledDecoder, size: tuple[int, int]) -> tuple[int, Callable[[], Any]]:
    shape = _tile_shape(decoder.config, size, decoder.config.z_dim)
    tile = np.random.default_rng(0).standard_normal(shape, np.float32)
    return math.prod(shape[:3]), partial(decoder.decode_tiles, [tile])


def _prepare_encoder(encoder: TiledEncoder, size: tuple[int, int]) -> tuple[int, Callable[[], Any]]:
    shape = _tile_shape(encoder.config, size, 3 * math.prod(encoder.config.patch))
    tile = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return math.prod(shape[:3]), partial(encoder.encode_tiles, [tile])


DECODED = Coding("vae_decoder_block", "a tile", _prepare_decoder)
ENCODED = Coding("vae_encoder_block", "a tile", _prepare_encoder)


def resize_grid(grid: Array, sizes: Sequence[int]) -> Array:
    """Interpolate values that belong to the middles of cells, axis by axis, to other cells.

    Args:
        grid: Shape (F, H, W, C).
        sizes: f, h, w.

    Returns:
        shape (f, h, w, C); beyond the outermost middles the values there.

    Example:
        >>> resize_grid(np.float32([0, 4]).reshape(1, 1, 2, 1), (1, 1, 4)).ravel().tolist()
        [0.0, 1.0, 3.0, 4.0]
    """
    for axis, size in enumerate(sizes):
        count = grid.shape[axis]
        if size == count:
            continue
        step = np.float32(count) / np.float32(size)
        at = np.clip((np.arange(size, dtype=np.float32) + 0.5) * step - 0.5, 0, None)
        low = np.minimum(at.astype(np.intp), count - 1)
        share = (at - low).astype(np.float32)
        share = share.reshape([-1 if i == axis else 1 for i in range(grid.ndim)])
        high = np.minimum(low + 1, count - 1)
        grid = grid.take(low, axis) * (1 - share) + grid.take(high, axis) * share
    return grid


def cut_tiles(values: Array, size: Sequence[int], overlap: int) -> Mapping[Place, Array]:
    """Cut a picture into tiles, row by row; those at its ends are as large as what is left.

    Args:
        values: Shape (f, H, W, C).
        size: Rows and columns of a tile.
        overlap: Rows and columns that it shares with the next.

    Returns:
        By row and column of tiles: shape (f, h, w, C).
    """
    starts = [
        range(0, count, step - overlap) for count, step in zip(values.shape[1:3], size, strict=True)
    ]
    return {
        (i, j): values[:, top : top + size[0], left : left + size[1]]
        for i, top in enumerate(starts[0])
        for j, left in enumerate(starts[1])
    }


def join_tiles(
    tiles: Mapping[Place, Array], stride: Sequence[int], overlap: int, blended: bool = False
) -> Array:
    """Put tiles together; where two overlap, one fades into the other.

    Args:
        tiles: Of `cut_tiles`, or what became of them.
        stride: Rows and columns from a tile to the next.
        overlap: Rows and columns that fade.
        blended: Whether a tile fades into what its neighbours became, as the original encodes; else
            into what they were, as it decodes. They differ where four tiles meet.

    Returns:
        shape (f, H, W, C).
    """
    neighbours: dict[Place, Array] = dict(tiles)
    rows: dict[int, list[Any]] = {}
    for (i, j), tile in tiles.items():
        joined = tile
        if i:
            joined = _fade(neighbours[i - 1, j], joined, overlap, 1)
        if j:
            joined = _fade(neighbours[i, j - 1], joined, overlap, 2)
        if blended:
            neighbours[i, j] = joined
        rows.setdefault(i, []).append(joined[:, : stride[0], : stride[1]])
    return np.concatenate([np.concatenate(row, axis=2) for row in rows.values()], axis=1)


def _fade(before: Array, tile: Array, overlap: int, axis: int) -> Array:
    """Let the end of the tile before fade into the beginning of a tile."""
    count = min(before.shape[axis], tile.shape[axis], overlap)
    share = np.arange(count, dtype=np.float32) / np.float32(count)
    share = share.reshape([-1 if i == axis else 1 for i in range(tile.ndim)])
    end = before.take(range(before.shape[axis] - count, before.shape[axis]), axis)
    begin, rest = np.split(tile, [count], axis)
    return np.concatenate([end * (1 - share) + begin * share, rest], axis)
