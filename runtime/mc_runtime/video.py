"""Video files: frames to mp4 chunk by chunk, and the last frames of a file to continue.

PyAV (the extra `video`) is imported when a file is opened. Neighbours: `VideoPipeline` yields the
frames, `mc-generate` writes them.
"""

__all__ = ["VideoWriter", "check_output", "read_video"]

import os
from collections import deque
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_engines.errors import require

Frames = NDArray[np.uint8]

CODEC = "libx264"
# One thread: x264's output depends on how many there are, and the same frames must give the same
# bytes on every machine.
CODEC_OPTIONS = {"preset": "medium", "crf": "16", "threads": "1"}


def check_output(path: Path, overwrite: bool) -> None:
    """Refuse an output that could not be written, before the work starts.

    Args:
        path: Of a file.
        overwrite: Accept one that exists.

    Raises:
        ValueError: It exists, or its folder is missing or cannot be written into.
    """
    folder = path.absolute().parent
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: expected a new file, got one that exists. Pass --overwrite.")
    if path.is_dir():
        raise ValueError(f"{path}: expected a file, got a folder. Name a file in it.")
    if not folder.is_dir():
        raise ValueError(f"{path}: expected an existing folder, got none. Run: mkdir -p {folder}")
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"{path}: expected a folder that can be written into, got {folder}. Choose another."
        )


class VideoWriter:
    """Writes an mp4 (H.264, yuv420p) under a hidden name, which `close` makes the final one.

    What was written before an interrupt is a playable file once it is closed; a crash leaves the
    hidden file alone, and what was at the path before.

    Args:
        path: Of the video.
        fps: Frames per second.
        width: Pixels, even.
        height: Pixels, even.

    Raises:
        MissingExtraError: PyAV is not installed.
    """

    def __init__(self, path: Path, fps: int, width: int, height: int) -> None:
        av = require("av", "video")
        self.path = path
        self._hidden = path.absolute().with_name(f".{path.name}.partial-{os.getpid()}")
        self._container: Any = av.open(
            str(self._hidden), "w", format="mp4", options={"fflags": "+bitexact"}
        )
        self._stream: Any = self._container.add_stream(CODEC, rate=fps, options=CODEC_OPTIONS)
        self._stream.width, self._stream.height = width, height
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, fps)
        self._frame = av.VideoFrame
        self.frames = 0

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, frames: Frames) -> None:
        """Append frames of shape (n, height, width, 3), uint8."""
        for pixels in frames:
            frame = self._frame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = self.frames, self._stream.codec_context.time_base
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def close(self) -> None:
        """Finish the file and give it its name; without frames, leave none."""
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            container.mux(self._stream.encode())
            container.close()
            if self.frames:
                self._hidden.replace(self.path)
        finally:
            with suppress(FileNotFoundError):
                self._hidden.unlink()


def read_video(path: Path, width: int, height: int, frames: int) -> Frames:
    """Read the last frames of a video, cut to the aspect ratio around the centre, then resized.

    Args:
        path: Any file that FFmpeg decodes.
        width: Pixels of the result.
        height: Pixels of the result.
        frames: How many from the end.

    Returns:
        shape (frames, height, width, 3), uint8.

    Raises:
        ValueError: It is no video, or has too few frames.
        MissingExtraError: PyAV is not installed.
    """
    av = require("av", "video")
    last: deque[Any] = deque(maxlen=frames)
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(container.streams.video[0]):
                last.append(frame)
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: expected a video, got: {error}.") from error
    if len(last) < frames:
        raise ValueError(
            f"{path}: expected at least {frames} frames to continue, got {len(last)}. "
            "Pass a longer clip, or a smaller --overlap-history."
        )
    return np.stack([_resize(frame, width, height) for frame in last])


def _resize(frame: Any, width: int, height: int) -> Frames:
    scale = max(width / frame.width, height / frame.height)
    across, down = max(width, round(frame.width * scale)), max(height, round(frame.height * scale))
    resized = frame.reformat(across, down, "rgb24", interpolation="BICUBIC").to_ndarray()
    top, left = (down - height) // 2, (across - width) // 2
    pixels: Frames = resized[top : top + height, left : left + width]
    return pixels
