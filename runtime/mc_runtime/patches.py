"""Latents to rows of patches and back, so that no graph needs the shape of the grid."""

__all__ = ["patchify", "unpatchify"]

import numpy as np
from numpy.typing import NDArray

Size = tuple[int, int, int]


def patchify(latents: NDArray[np.float32], patch: Size) -> NDArray[np.float32]:
    """Cut latents into patches.

    Args:
        latents: shape (c, F, h, w).
        patch: Latents per token along time (1), height and width.

    Returns:
        shape (1, L, c*ph*pw), tokens in the order frame, row, column, each patch channel first.
    """
    channels, frames, height, width = latents.shape
    _, down, across = patch
    grid = latents.reshape(channels, frames, height // down, down, width // across, across)
    rows = grid.transpose(1, 2, 4, 0, 3, 5).reshape(1, -1, channels * down * across)
    return np.ascontiguousarray(rows)


def unpatchify(
    rows: NDArray[np.float32], patch: Size, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Lay patches out as latents.

    Args:
        rows: shape (1, L, ph*pw*c), each patch channel last, as the head gives them.
        patch: Latents per token along time (1), height and width.
        shape: Of the latents, (c, F, h, w).

    Returns:
        Latents of that shape.
    """
    channels, frames, height, width = shape
    _, down, across = patch
    grid = rows.reshape(frames, height // down, width // across, down, across, channels)
    return np.ascontiguousarray(grid.transpose(5, 0, 1, 3, 2, 4).reshape(shape))
