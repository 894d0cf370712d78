"""What a video begins with: frames to continue, an image, or latents.

Neighbours: `VideoPipeline.generate` takes them; the family says how many frames are continued, and
its plan refuses what it cannot begin with.
"""

__all__ = ["Prefix", "choose_prefix"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_runtime.families.family import Family
from mc_runtime.inputs import check_array
from mc_runtime.schedule import LatentGrid

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Prefix:
    """What is given of a video; None of both where nothing is.

    Attributes:
        frames: To be encoded, shape (n, height, width, 3), uint8.
        latents: As they are, shape (c, n, h, w).
    """

    frames: NDArray[np.uint8] | None = None
    latents: NDArray[np.float32] | None = None

    def count(self, grid: LatentGrid) -> int:
        """Latent frames that these are, or will be once they are encoded."""
        if self.latents is not None:
            return int(self.latents.shape[1])
        return 0 if self.frames is None else grid.latent_frames(len(self.frames))


def choose_prefix(
    video: NDArray[np.uint8] | None,
    image: NDArray[np.uint8] | None,
    latents: NDArray[np.float32] | None,
    options: Any,
    family: Family,
    grid: LatentGrid,
    latent_shape: Callable[[Any, Any], Shape],
) -> Prefix:
    """Take the one of three that is given, held against the size of the video.

    Args:
        video: Frames, of which the family continues the last.
        image: A frame, which is shown for as long as a first latent frame lasts.
        latents: Of an earlier run, all of them.
        options: Of the run.
        family: Of the model.
        grid: Of the model.
        latent_shape: From latent frames, or a symbol, and options to the shape of latents.

    Returns:
        What the video begins with.

    Raises:
        ValueError: More than one is given, or one of another size.
    """
    given = {"video": video, "image": image, "prefix_latents": latents}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(
            f"video to continue: expected one of {', '.join(given)}, got {' and '.join(names)}. "
            "Pass one of them."
        )
    if latents is not None:
        _check_latents(latents, grid, latent_shape("n", options))
        return Prefix(latents=latents)
    size = options.height, options.width, 3
    if image is not None:
        _check_frames("image", image, size)
        return Prefix(np.repeat(image[None], grid.first_frames, axis=0))
    if video is None:
        return Prefix()
    _check_frames("video", video, ("n", *size))
    if len(video) < grid.first_frames:
        raise ValueError(
            f"video: expected at least {grid.first_frames} frames, which make a latent frame, got "
            f"{len(video)}. Pass a longer video, or one frame as image."
        )
    count = max(grid.latent_frames(family.continued(len(video), options)), 1)
    return Prefix(video[-grid.pixel_frames(count) :])


def _check_latents(latents: NDArray[np.float32], grid: LatentGrid, shape: Shape) -> None:
    """Refuse latents of another kind, and those of a model whose first latent frame is special.

    Raises:
        ValueError: They cannot begin a video.
    """
    if grid.first_frames != grid.temporal_factor:
        raise ValueError(
            f"prefix_latents: expected none, as of this model a first latent frame stands for "
            f"{grid.first_frames} frame and any other for {grid.temporal_factor}, got some. "
            "Pass the frames as video."
        )
    check_array("prefix_latents", latents, shape)


def _check_frames(name: str, frames: NDArray[np.uint8], shape: Shape) -> None:
    """Refuse pixels of another kind, size or number.

    Raises:
        ValueError: With the shape.
    """
    fits = frames.ndim == len(shape) and frames.shape[-3:] == shape[-3:]
    if not fits or not len(frames) or frames.dtype != np.uint8:
        raise ValueError(
            f"{name}: expected uint8 ({', '.join(map(str, shape))}), "
            f"got {frames.dtype} {frames.shape}. Resize the frames."
        )
