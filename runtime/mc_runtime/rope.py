"""Rotary position tables of the chunk that a block pass is about to see.

A family asks its `Rope` once per chunk position; the block graph takes the result as its inputs
`cos` and `sin`, and a partial pass gathers the rows of its tokens from it. The manifest says which
kind a model has: powers of a base, or frequencies of its own.
"""

__all__ = ["BandRope", "PowerRope", "Rope", "Tables", "chunk_tables", "read_rope"]

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Tables: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]


class Rope(Protocol):
    """Where tokens are, as a model is told."""

    def tables(self, frames: int, height: int, width: int, first_frame: int = 0) -> Tables:
        """Compute cosine and sine of every token's rotation angles, three axes side by side.

        Every pair of head dimensions stands once, as a model with them in half-split order needs
        it: first the pairs of time, then those of height and width.

        Args:
            frames: Latent frames F of the chunk.
            height: Tokens in a column of a frame.
            width: Tokens in a row of a frame.
            first_frame: Position of the chunk's first latent frame.

        Returns:
            cos and sin, each shape (F*height*width, pairs), tokens in the order frame, row, column.

        Raises:
            ValueError: An axis has more positions than the model knows.
        """
        ...


@dataclass(frozen=True)
class PowerRope:
    """Pair i of an axis with d head dimensions turns by `position * theta ** (-2i / d)`.

    Attributes:
        axes: Head dimensions of time, height and width; their sum is D.
        theta: Base of the frequencies.
        max_positions: Positions that the model knows on each axis.

    Source:
        RoFormer, https://arxiv.org/abs/2104.09864, eq. 15, per axis as in Wan 2.1 and in
        diffusers 0.42.1, transformer_skyreels_v2.py, SkyReelsV2RotaryPosEmbed.
    """

    axes: tuple[int, int, int]
    theta: float
    max_positions: int

    def tables(self, frames: int, height: int, width: int, first_frame: int = 0) -> Tables:
        """Compute the angles; see `Rope.tables`."""
        ranges = ((first_frame, first_frame + frames), (0, height), (0, width))
        angles = []
        names = "time", "height", "width"
        for name, (start, stop), dims in zip(names, ranges, self.axes, strict=True):
            if stop > self.max_positions:
                raise ValueError(
                    f"rotary positions along {name}: expected at most {self.max_positions}, got "
                    f"{stop}. Generate a smaller video or shorter windows."
                )
            frequencies = 1.0 / self.theta ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
            angles.append(np.outer(np.arange(start, stop), frequencies))
        return _spread(angles)


@dataclass(frozen=True)
class BandRope:
    """Every axis turns by the same learnt bands; a frame is centred and scaled to a unit area.

    Time counts latent frames. Along a side of n tokens position i is at
    `(i - (n - 1) / 2) / (n - 1) * (n / r - 1)`, with r the geometric mean of both sides over 16.

    Attributes:
        bands: Angle per unit of position.

    Source:
        SandAI-org/MAGI-1 6ff822e, inference/model/dit/dit_module.py, LearnableRotaryEmbeddingCat.
    """

    bands: tuple[float, ...]

    def tables(self, frames: int, height: int, width: int, first_frame: int = 0) -> Tables:
        """Compute the angles; see `Rope.tables`."""
        scale = math.sqrt(height * width / 256)
        positions = (
            np.arange(first_frame, first_frame + frames, dtype=np.float64),
            _centre(height, scale),
            _centre(width, scale),
        )
        return _spread([np.outer(at, self.bands) for at in positions])


def _centre(count: int, scale: float) -> NDArray[np.float64]:
    """Positions of `count` tokens around the middle of their side."""
    offsets = np.arange(count) - (count - 1) / 2
    return offsets / max(count - 1, 1) * (count / scale - 1)


def read_rope(config: Mapping[str, Any]) -> Rope:
    """Read how a model is told positions.

    Args:
        config: The manifest's `config.transformer`.

    Returns:
        The kind that the model has.
    """
    if "rope_bands" in config:
        return BandRope(tuple(config["rope_bands"]))
    axes = tuple(config["rope_axes"])
    return PowerRope(axes, config["rope_theta"], config["rope_max_positions"])


def chunk_tables(rope: Rope, chunks: int, frames: int, grid: tuple[int, int]) -> list[Tables]:
    """Compute the tables of every chunk of a window.

    Args:
        rope: Of the model.
        chunks: Of the window.
        frames: Latent frames of each.
        grid: Tokens of a frame along height and width.

    Returns:
        By chunk, as `Rope.tables` gives them.
    """
    return [rope.tables(frames, *grid, first_frame=chunk * frames) for chunk in range(chunks)]


def _spread(angles: list[NDArray[np.float64]]) -> Tables:
    """Lay the angles of three axes, each shape (positions, pairs), out over the token grid."""
    grid = tuple(len(axis) for axis in angles)
    time, rows, columns = angles
    parts = (time[:, None, None], rows[None, :, None], columns[None, None])
    spread = [np.broadcast_to(part, (*grid, part.shape[-1])) for part in parts]
    table = np.concatenate(spread, axis=-1).reshape(math.prod(grid), -1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)
