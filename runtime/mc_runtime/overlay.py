"""A run's video with the recomputed tokens painted over: still parts untouched, moving ones tinted.

Neighbours: `mc-inspect --overlay` writes it, `trace_report` takes the place of its frames from
`Layout`. What a token did comes from the run's `DecisionTrace`.
"""

__all__ = ["LEGEND_HEIGHT", "Layout", "free_steps", "token_shares", "write_overlay"]

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.errors import require
from mc_runtime.video import VideoWriter, read_frames
from motioncache import DecisionTrace

Pixels = NDArray[np.uint8]

_TINT = np.array([230, 85, 0], np.float32)  # orange: told from grey and blue by every eye
_OPACITY = 0.65  # of the tint where a token is recomputed most often
_SHOWN_WIDTH = 640  # smaller videos are enlarged by whole factors, so that tokens can be seen
LEGEND_HEIGHT = 32  # pixels at the foot of every frame


@dataclass(frozen=True)
class Layout:
    """Where the latent frames of a run's video come from.

    Attributes:
        window: Of each latent frame of the video, shape (n,).
        chunk: Of that window, shape (n,).
        frame: Of that chunk, shape (n,).
        factor: Frames of every latent frame but the first, which is one frame.
    """

    window: NDArray[np.int64]
    chunk: NDArray[np.int64]
    frame: NDArray[np.int64]
    factor: int

    @classmethod
    def of(cls, trace: DecisionTrace) -> "Layout":
        """Read the windows of a run.

        Args:
            trace: Of the run.

        Returns:
            Its layout: a window adds its latent frames from `skip` on, up to the next one's.
        """
        windows, size = trace.run["windows"], trace.run["frames"]
        starts = np.array([window["first"] + window["skip"] for window in windows])
        first = np.array([window["first"] for window in windows])
        frames = np.arange(windows[-1]["first"] + windows[-1]["frames"])
        window = np.searchsorted(starts, frames, side="right") - 1
        chunk, frame = np.divmod(frames - first[window], size)
        factor = (trace.run["options"]["num_frames"] - 1) // max(len(frames) - 1, 1)
        return cls(window, chunk, frame, factor)

    def pixel_frames(self, latent_frame: int) -> range:
        """Return the video frames of a latent frame."""
        stop = latent_frame * self.factor + 1
        return range(max(stop - self.factor, 0), stop) if latent_frame else range(1)


def free_steps(trace: DecisionTrace) -> NDArray[np.bool_]:
    """Tell which steps are shown: those in which the policy had a choice.

    Args:
        trace: Of a run.

    Returns:
        Shape (rows, branches, chunks). Where there is none, as in a replay, every step counts.
    """
    free = trace.free()
    return free if free.any() else trace.recompute[..., 0] >= 0


def token_shares(trace: DecisionTrace, layout: Layout) -> NDArray[np.float64]:
    """Count how often each token of the video was recomputed.

    Args:
        trace: Of the run.
        layout: Of the run.

    Returns:
        Share of the `free_steps`, over both branches; NaN where there were none, as in a prefix.
        Shape (latent frames, h, w) in tokens.
    """
    free = free_steps(trace)
    per_chunk = []
    for rows in map(trace.rows_of, range(len(trace.window_start))):
        counted = free[rows]
        ones = ((trace.recompute[rows] == 1) & counted[..., None]).sum(axis=(0, 1))
        count = counted.sum(axis=(0, 1))[:, None]
        per_chunk.append(np.where(count, ones / np.maximum(count, 1), np.nan))
    shares = np.stack(per_chunk)  # (windows, chunks, L)
    height, width = trace.run["grid"]
    framed = shares.reshape(*shares.shape[:2], trace.run["frames"], height, width)
    tokens: NDArray[np.float64] = framed[layout.window, layout.chunk, layout.frame]
    return tokens


def write_overlay(trace: DecisionTrace, video: Path, output: Path) -> None:
    """Paint over every frame how often its tokens were recomputed, and a legend below.

    The tint grows from the token of the video that is recomputed least to the one that is most.
    A video that ends early, as that of an interrupted run does, is painted as far as it goes.

    Args:
        trace: Of the run.
        video: Its video.
        output: The mp4 to write.

    Raises:
        ValueError: The video is not that of the run.
        OSError: A file cannot be read or written.
        MissingExtraError: PyAV or matplotlib is not installed.
    """
    layout, options = Layout.of(trace), trace.run["options"]
    shares = token_shares(trace, layout)
    low, high = float(np.nanmin(shares, initial=1)), float(np.nanmax(shares, initial=0))
    if low >= high:  # above it where the run ended before its first step
        low, high = 0.0, 1.0
    strengths = _OPACITY * np.nan_to_num((shares - low) / (high - low))
    zoom = -(-_SHOWN_WIDTH // options["width"])
    width, height = zoom * options["width"], zoom * options["height"]
    legend = _draw_legend(width, low, high)
    _check_video(video, options)
    with VideoWriter(output, options["fps"], width, height + LEGEND_HEIGHT) as writer:
        places = _places(layout)
        framed = zip(places, read_frames(video), strict=False)
        for _, chunk in groupby(framed, key=lambda pair: _chunk_of(layout, pair[0])):
            painted = [
                np.concatenate([_enlarge(_paint(pixels, strengths[place]), zoom, zoom), legend])
                for place, pixels in chunk
            ]
            writer.write(np.stack(painted))


def _places(layout: Layout) -> Iterator[int]:
    """The latent frame of each video frame."""
    for place in range(len(layout.window)):
        for _ in layout.pixel_frames(place):
            yield place


def _chunk_of(layout: Layout, place: int) -> tuple[int, int]:
    return int(layout.window[place]), int(layout.chunk[place])


def _paint(pixels: Pixels, strength: NDArray[np.float64]) -> Pixels:
    """Blend a frame (H, W, 3) with the tint, by the strength of each token (h, w)."""
    size = pixels.shape[0] // strength.shape[0], pixels.shape[1] // strength.shape[1]
    alpha = _enlarge(strength.astype(np.float32), *size)[..., None]
    painted: Pixels = np.rint(pixels * (1 - alpha) + _TINT * alpha).astype(np.uint8)
    return painted


def _enlarge(image: NDArray[Any], down: int, across: int) -> NDArray[Any]:
    return image.repeat(down, axis=0).repeat(across, axis=1)


def _check_video(video: Path, options: dict[str, Any]) -> None:
    """Refuse a video of another size, or one that is longer than the run's.

    Raises:
        ValueError: With what is expected.
    """
    count, height, width = 0, 0, 0
    for pixels in read_frames(video):
        count, (height, width, _) = count + 1, pixels.shape
    limits = options["num_frames"], options["height"], options["width"]
    if (height, width) != limits[1:] or count > limits[0]:
        raise ValueError(
            "{}: expected at most {} frames of {}x{}, got {} of {}x{}. "
            "Pass the video of this run.".format(video, *limits, count, height, width)
        )


def _draw_legend(width: int, low: float, high: float) -> Pixels:
    """A strip, shape (32, width, 3): what the tint means, from the least to the most."""
    figure_module = require("matplotlib.figure", "bench")
    dpi = 100
    figure = figure_module.Figure(figsize=(width / dpi, LEGEND_HEIGHT / dpi), dpi=dpi)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set(xlim=(0, width), ylim=(0, LEGEND_HEIGHT))
    middle, text = LEGEND_HEIGHT / 2, {"va": "center_baseline", "fontsize": 9}
    bar = _paint(np.full((1, 256, 3), 200, np.uint8), np.linspace(0, _OPACITY, 256)[None])
    axes.text(12, middle, "token recomputed in", ha="left", **text)
    left, right = 0.3 * width, 0.78 * width
    axes.text(left - 8, middle, f"{low:.0%}", ha="right", **text)
    axes.imshow(bar, extent=(left, right, 8, LEGEND_HEIGHT - 8), aspect="auto")
    axes.text(right + 8, middle, f"{high:.0%} of the steps", ha="left", **text)
    axes.set(xlim=(0, width), ylim=(0, LEGEND_HEIGHT))
    buffer = BytesIO()
    figure.savefig(buffer, format="rgba", dpi=dpi)
    pixels = np.frombuffer(buffer.getvalue(), np.uint8).reshape(LEGEND_HEIGHT, width, 4)
    return pixels[..., :3].copy()
