"""How far a policy's frames are from the uncached ones: PSNR, SSIM, LPIPS.

Each is measured over the whole frame and over the moving region alone, where a still background
cannot hide errors. Neighbours: `mc-bench` compares what `VideoPipeline` gave with and without a
policy; `scripts/make_lpips.py` makes the graph that `Lpips` opens.
"""

__all__ = [
    "MOVING_LEVELS",
    "MOVING_MARGIN",
    "Fidelity",
    "Lpips",
    "RegionScores",
    "Scores",
    "compare_videos",
    "find_moving_pixels",
]

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from mc_engines.errors import EngineError, require
from mc_engines.onnxruntime_runner import OnnxRuntimeRunner
from mc_engines.specs import GraphSpec, TensorSpec

# In 8-bit levels, 3 % of the range: a decoder of latents lets a still background flicker by a few
# levels from frame to frame, which would make a moving region of the whole frame.
MOVING_LEVELS = 8
MOVING_MARGIN = 2  # pixels to each side: soft edges move too, by less than the threshold
_SSIM_WINDOW = 7  # pixels, all of one weight: scikit-image's default
_LPIPS_SIDE = 31  # pixels of the smallest frame from which AlexNet's last layer sees anything
# Of a batch, in which there is at least one frame: one of 540P takes about 60 MB.
_LPIPS_PIXELS = 2**19

_Frames = NDArray[np.uint8]
_Region = NDArray[np.bool_]
_PerFrame = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """How near some frames of a video are to the reference, in one region of them.

    Attributes:
        frames: Frames that have pixels in the region; the means go over these, and are None
            if there are none.
        identical: Those of them that equal the reference in every pixel of the region.
        psnr: Mean over the others, in dB; None if there are none.
        ssim: Mean, at most 1; None if all pixels of the region are within 3 of the border.
        lpips: Mean, 0 or more, of frames that show the test video in the region and the reference
            elsewhere; None without a graph.
    """

    frames: int
    identical: int
    psnr: float | None
    ssim: float | None
    lpips: float | None


@dataclass(frozen=True)
class RegionScores:
    """The same frames, seen twice.

    Attributes:
        whole: Over all pixels.
        moving: Over those that `find_moving_pixels` finds.
    """

    whole: Scores
    moving: Scores


@dataclass(frozen=True)
class Fidelity:
    """What `compare_videos` measured.

    Attributes:
        video: Over all frames.
        chunks: Over the frames of each chunk.
    """

    video: RegionScores
    chunks: tuple[RegionScores, ...]

    def to_json(self) -> dict[str, Any]:
        """The scores as they stand in a report: dicts with the names of the fields."""
        return {"video": asdict(self.video), "chunks": [asdict(chunk) for chunk in self.chunks]}


class Lpips:
    """The distance of two pictures as people see it, by a graph of AlexNet.

    Args:
        path: ONNX file that `scripts/make_lpips.py` made.
        threads: Threads of one operator; None lets ONNX Runtime take every physical core.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        EngineError: There is no such file, or it is not an LPIPS graph.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        picture = ("N", 3, "H", "W")
        inputs = tuple(TensorSpec(name, "float32", picture) for name in ("reference", "test"))
        graph = GraphSpec(str(path), inputs, (TensorSpec("distance", "float32", ("N",)),))
        try:
            self._runner = OnnxRuntimeRunner(graph, path, threads)
        except EngineError as error:
            got = "another file" if path.is_file() else "no file"
            raise EngineError(
                f"{path}: expected an LPIPS graph, got {got}. "
                f"Run: python scripts/make_lpips.py {path}"
            ) from error

    def distance(self, reference: _Frames, test: _Frames) -> NDArray[np.float32]:
        """Measure pairs of frames, a few at a time so that memory is bounded.

        Args:
            reference: shape (n, height, width, 3), uint8.
            test: Alike.

        Returns:
            Distances, shape (n,): 0 for equal frames, about 1 for unlike ones.

        Raises:
            ValueError: Another dtype, unequal shapes, no frame, or less than 31 pixels to a side.
            EngineError: ONNX Runtime failed.
        """
        _check_videos(reference, test, _LPIPS_SIDE)
        count, height, width, _ = reference.shape
        size = max(1, _LPIPS_PIXELS // (height * width))
        batches = [slice(first, first + size) for first in range(0, count, size)]
        return np.concatenate([self._measure(reference[batch], test[batch]) for batch in batches])

    def _measure(self, reference: _Frames, test: _Frames) -> NDArray[np.float32]:
        inputs = {"reference": _to_picture(reference), "test": _to_picture(test)}
        return self._runner.run(inputs)["distance"]


def compare_videos(
    reference: _Frames,
    test: _Frames,
    chunks: Sequence[slice] = (),
    lpips: Lpips | None = None,
) -> Fidelity:
    """Measure how near a video is to the uncached one, per chunk and over all.

    PSNR is 10 log10(255^2 / e) with e the mean squared error of a frame's pixels and channels.
    SSIM is scikit-image's, with its uniform window of 7 x 7 pixels: the mean of the map over
    channels and pixels, the outermost 3 pixels left out, where the window leaves the frame.

    Args:
        reference: Frames of the uncached run before encoding, shape (n, height, width, 3), uint8.
        test: Alike, of the run with a policy.
        chunks: The frames of each chunk.
        lpips: The graph for LPIPS; without it there is none.

    Returns:
        The scores; what moves is found in the reference alone, so that all policies are judged
        on the same pixels.

    Raises:
        ValueError: Another dtype, unequal shapes, less than 7 pixels to a side (31 with LPIPS),
            or no frame, in all or in a chunk.
        MissingExtraError: scikit-image is not installed.
        EngineError: ONNX Runtime failed.

    Example:
        >>> video = np.zeros((2, 8, 8, 3), np.uint8)
        >>> compare_videos(video, video + np.uint8(1)).video.whole.psnr  # 20 log10(255)
        48.13...
    """
    _check_videos(reference, test, _SSIM_WINDOW)
    _check_chunks(chunks, len(reference))
    moving = find_moving_pixels(reference)
    whole: _Region = np.broadcast_to(np.True_, moving.shape)
    regions = _measure_frames(reference, test, (whole, moving), lpips)
    video, *parts = (
        RegionScores(*(region.gather(frames) for region in regions))
        for frames in (slice(None), *chunks)
    )
    return Fidelity(video, tuple(parts))


def find_moving_pixels(video: _Frames) -> _Region:
    """Find where a video moves: pixels that change against the frame before, and a margin.

    A pixel changes if one of its channels does by more than `MOVING_LEVELS`. So both the place
    that something leaves and the one it comes to belong. The first frame takes the second's.

    Args:
        video: shape (n, height, width, 3), uint8.

    Returns:
        shape (n, height, width), bool; all False for a single frame.
    """
    moving = np.zeros(video.shape[:3], np.bool_)
    for index in range(1, len(video)):
        change = np.abs(video[index].astype(np.int16) - video[index - 1]).max(axis=-1)
        moving[index] = _widen(change > MOVING_LEVELS)
    moving[0] = moving[min(1, len(video) - 1)]
    return moving


def _widen(region: _Region) -> _Region:
    """Add the squares of `MOVING_MARGIN` pixels to each side of every pixel of (h, w)."""
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (MOVING_MARGIN, MOVING_MARGIN)
        windows = sliding_window_view(np.pad(region, padding), 2 * MOVING_MARGIN + 1, axis)
        region = np.logical_or.reduce(windows, axis=-1)
    return region


@dataclass(frozen=True)
class _Measured:
    """What each frame has in one region; NaN where it has no pixels there. Each of shape (n,)."""

    psnr: _PerFrame  # in dB, infinite where nothing differs
    ssim: _PerFrame
    lpips: _PerFrame

    def gather(self, frames: slice) -> Scores:
        psnr = self.psnr[frames]
        judged = psnr[~np.isnan(psnr)]
        differ = np.isfinite(judged)
        return Scores(
            frames=judged.size,
            identical=int((~differ).sum()),
            psnr=_mean(judged[differ]),
            ssim=_mean(self.ssim[frames]),
            lpips=_mean(self.lpips[frames]),
        )


def _measure_frames(
    reference: _Frames, test: _Frames, regions: Sequence[_Region], lpips: Lpips | None
) -> list[_Measured]:
    count = len(reference)
    psnr, ssim, distance = np.full((3, len(regions), count), np.nan)
    inner = (slice(_SSIM_WINDOW // 2, -(_SSIM_WINDOW // 2)),) * 2
    for index, pair in enumerate(zip(reference, test, strict=True)):
        error, similarity = _map_errors(*pair), _map_ssim(*pair)
        for row, region in enumerate(regions):
            pixels = region[index]
            if pixels.any():
                psnr[row, index] = _to_decibels(error[pixels].mean())
            if pixels[inner].any():
                ssim[row, index] = similarity[inner][pixels[inner]].mean()
    if lpips is not None:
        for row, region in enumerate(regions):
            shown = np.where(region[..., None], test, reference)
            judged = ~np.isnan(psnr[row])
            distance[row] = np.where(judged, lpips.distance(reference, shown), np.nan)
    return [_Measured(*rows) for rows in zip(psnr, ssim, distance, strict=True)]


def _map_errors(reference: _Frames, test: _Frames) -> NDArray[np.int32]:
    """Squared error of each pixel and channel, shape (height, width, 3)."""
    difference = reference.astype(np.int32) - test
    return difference * difference


def _map_ssim(reference: _Frames, test: _Frames) -> NDArray[np.float64]:
    """SSIM around each pixel, per channel, shape (height, width, 3)."""
    metrics = require("skimage.metrics", "bench")
    similarity: NDArray[np.float64]
    _, similarity = metrics.structural_similarity(
        reference, test, win_size=_SSIM_WINDOW, channel_axis=-1, data_range=255, full=True
    )
    return similarity


def _to_decibels(error: float) -> float:
    return 10 * float(np.log10(255**2 / error)) if error else np.inf


def _mean(values: _PerFrame) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _to_picture(frames: _Frames) -> NDArray[np.float32]:
    """Frames as the graph takes them: shape (n, 3, height, width), from -1 to 1."""
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2), np.float32) / np.float32(127.5) - 1


def _check_videos(reference: _Frames, test: _Frames, side: int) -> None:
    fits = reference.dtype == np.uint8 and reference.ndim == 4 and reference.shape[3] == 3
    if not fits or not len(reference) or min(reference.shape[1:3]) < side:
        raise ValueError(
            f"reference frames: expected uint8 (n, height, width, 3) of at least {side} pixels to "
            f"a side, got {reference.dtype} {reference.shape}. Give pixels as the decoder does."
        )
    if (test.dtype, test.shape) != (reference.dtype, reference.shape):
        raise ValueError(
            f"test frames: expected uint8 {reference.shape} as the reference has, "
            f"got {test.dtype} {test.shape}. Compare runs with the same options."
        )


def _check_chunks(chunks: Sequence[slice], count: int) -> None:
    for index, frames in enumerate(chunks):
        if not len(range(count)[frames]):
            raise ValueError(
                f"chunk {index}: expected some of the {count} frames, got none from "
                f"{frames.start}:{frames.stop}. Give the frames that the chunk decoded to."
            )
