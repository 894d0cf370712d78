"""Rotary position tables of the chunk that a block pass is about to see.

The loop asks `rope_tables` once per chunk position of a window; the block graph takes the result as
its inputs `cos` and `sin`, and a partial pass gathers the rows of its tokens from it.
"""

__all__ = ["rope_tables"]

import numpy as np
from numpy.typing import NDArray


def rope_tables(
    frames: int,
    height: int,
    width: int,
    axes: tuple[int, int, int],
    theta: float,
    max_positions: int,
    first_frame: int = 0,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute cosine and sine of every token's rotation angles, three axes side by side.

    Pair i of an axis with d head dimensions turns by `position * theta ** (-2i / d)`. The pairs
    of time come first, then those of height and width; every pair stands once, as a model with
    its head dimensions in half-split order needs it.

    Args:
        frames: Latent frames F of the chunk.
        height: Tokens in a column of a frame.
        width: Tokens in a row of a frame.
        axes: Head dimensions of time, height and width; their sum is D.
        theta: Base of the frequencies.
        max_positions: Positions that the model knows on each axis.
        first_frame: Position of the chunk's first latent frame in its window.

    Returns:
        cos and sin, each shape (F*height*width, D/2), tokens in the order frame, row, column.

    Raises:
        ValueError: An axis has more positions than the model knows.

    Source:
        RoFormer, https://arxiv.org/abs/2104.09864, eq. 15, per axis as in Wan 2.1 and in
        diffusers 0.42.1, transformer_skyreels_v2.py, SkyReelsV2RotaryPosEmbed.
    """
    ranges = ((first_frame, first_frame + frames), (0, height), (0, width))
    angles = []
    for name, (start, stop), dims in zip(("time", "height", "width"), ranges, axes, strict=True):
        if stop > max_positions:
            raise ValueError(
                f"rotary positions along {name}: expected at most {max_positions}, got {stop}. "
                "Generate a smaller video or shorter windows."
            )
        frequencies = 1.0 / theta ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
        angles.append(np.outer(np.arange(start, stop), frequencies))
    time, rows, columns = angles
    return (
        _spread(np.cos(time), np.cos(rows), np.cos(columns)),
        _spread(np.sin(time), np.sin(rows), np.sin(columns)),
    )


def _spread(
    time: NDArray[np.float64], rows: NDArray[np.float64], columns: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Lay the tables of three axes, each shape (positions, pairs), out over the token grid."""
    grid = (len(time), len(rows), len(columns))
    parts = (time[:, None, None], rows[None, :, None], columns[None, None])
    table = np.concatenate([np.broadcast_to(p, (*grid, p.shape[-1])) for p in parts], axis=-1)
    return table.reshape(-1, table.shape[-1]).astype(np.float32)
