"""Frames to an mp4 file, chunk by chunk, and the frames of a video file to pixels.

`VideoPipeline` gives the frames that `VideoWriter` takes, and continues what `read_video` gives.
`overlay` and `trace_report` show what `read_frames` gives.
"""

__all__ = ["VideoWriter", "read_frames", "read_video"]

from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mc_engines.errors import require
from mc_runtime.output_file import hidden_path, write_failure

# swscale's best paths: chroma interpolated at full size, rounding that no CPU does differently.
_SCALING = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
# H.264's codes for BT.709 primaries, transfer and matrix (all 1), and for limited range.
_BT709, _LIMITED_RANGE = 1, 1
_PROCESSOR = Path("/proc/cpuinfo")


class VideoWriter:
    """An mp4 file that grows chunk by chunk: H.264, yuv420p, BT.709.

    Equal frames give equal bytes, on any number of cores. Frames are written to a hidden file
    beside `path` that gets its name in `close`. Leaving the `with` block closes, also on an error
    or on Ctrl-C: what was written by then is a whole video. On a full disk the chunks that still
    fitted are kept.

    Args:
        path: File to write.
        fps: Frames per second.
        width: Pixels; even.
        height: Pixels; even.

    Raises:
        MissingExtraError: PyAV is not installed.
    """

    def __init__(self, path: Path, fps: int, width: int, height: int) -> None:
        self._av = require("av", "video")
        self._path, self._temporary = path, hidden_path(path)
        self._shape = (height, width, 3)
        self._frames = 0
        self._open = True
        # A hybrid file is fragmented, one fragment a chunk, until it is closed; then it is a
        # plain mp4. So a disk that fills up costs the chunks that did not fit, no others.
        self._container = self._av.open(
            str(self._temporary),
            "w",
            format="mp4",
            options={"movflags": "hybrid_fragmented", "fflags": "+bitexact"},
        )
        self._stream = self._container.add_stream(
            "libx264",
            rate=fps,
            options={"preset": "medium", "crf": "18", "flags": "+bitexact", **_without_avx512()},
        )
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        # x264's output depends on its number of threads, which by default follows the machine.
        self._stream.codec_context.thread_count = 1
        for tag in ("colorspace", "color_primaries", "color_trc"):
            setattr(self._stream.codec_context, tag, _BT709)
        self._stream.codec_context.color_range = _LIMITED_RANGE
        self._to_yuv = self._av.filter.Graph()
        source = self._to_yuv.add_buffer(
            width=width, height=height, format="rgb24", time_base=Fraction(1, fps)
        )
        _link(
            self._to_yuv,
            source,
            ("scale", f"{_SCALING}:out_color_matrix=bt709:out_range=tv"),
            ("format", "yuv420p"),
        )

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Append the frames of a chunk; they begin with a key frame.

        Args:
            frames: Pixels, shape (frames, height, width, 3), uint8.

        Raises:
            ValueError: The frames have another dtype or shape.
            OSError: The file cannot be written, for example because the disk is full.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape:
            height, width, _ = self._shape
            raise ValueError(
                f"{self._path}: expected frames uint8 (n, {height}, {width}, 3), "
                f"got {frames.dtype} {frames.shape}."
            )
        try:
            for index, pixels in enumerate(frames):
                self._container.mux(self._stream.encode(self._next_frame(pixels, index == 0)))
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Finish the file and give it its name; without any frame, leave none.

        Raises:
            OSError: The file cannot be written; it then holds the chunks that fitted.
        """
        if not self._open:
            return
        self._open = False
        whole = False
        try:
            if self._frames:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            whole = True
        except OSError as error:
            raise self._failure(error) from error
        finally:
            if self._frames and (whole or _cut_to_whole_chunks(self._temporary)):
                self._temporary.replace(self._path)
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError:
            if error is None:  # otherwise the first error says more
                raise

    def _next_frame(self, pixels: NDArray[np.uint8], key: bool) -> Any:
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts = self._frames
        self._to_yuv.push(frame)
        frame = self._to_yuv.pull()
        frame.pict_type = self._av.video.frame.PictureType["I" if key else "NONE"]
        self._frames += 1
        return frame

    def _failure(self, error: OSError) -> OSError:
        return write_failure(self._path, error, " The chunks that fitted are kept.")


def read_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Decode a video file frame by frame, upright and at its own size.

    Args:
        path: Any file that FFmpeg decodes.

    Yields:
        Pixels, shape (height, width, 3), uint8.

    Raises:
        ValueError: The file is not a video, or is damaged.
        OSError: The file cannot be read.
        MissingExtraError: PyAV is not installed.
    """
    graph = None
    for frame in _decode(path):
        graph = graph or _open_graph(frame, frame.width, frame.height)
        yield _to_pixels(graph, frame)


def read_video(path: Path, width: int, height: int, frames: int) -> NDArray[np.uint8]:
    """The last frames of a video file, at the size that is asked for.

    The picture is turned upright, the middle is cut out in the aspect ratio of `width` to `height`,
    and that is scaled bicubically (with a wider filter where it shrinks). Frames are taken as they
    come: the rate of the file does not matter. Pixels are taken to be square.

    Args:
        path: Any file that FFmpeg decodes.
        width: Pixels.
        height: Pixels.
        frames: How many frames.

    Returns:
        Pixels, shape (frames, height, width, 3), uint8.

    Raises:
        ValueError: The file is not a video, is damaged, or has too few frames.
        OSError: The file cannot be read.
        MissingExtraError: PyAV is not installed.
    """
    last = deque(_decode(path), maxlen=frames)
    if len(last) < frames:
        raise ValueError(
            f"{path}: expected at least {frames} frames, got {len(last)}. "
            "Give a longer video, or a smaller --overlap-history."
        )
    stored = (height, width) if _turns(last[0]) % 2 else (width, height)
    graph = _open_graph(last[0], *stored)
    return np.stack([_to_pixels(graph, frame) for frame in last])


def _decode(path: Path) -> Iterator[Any]:
    """Yield the frames of a file as they are stored."""
    av = require("av", "video")
    try:
        with av.open(str(path.absolute())) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: expected a video, got a file without pictures.")
            yield from container.decode(video=0)
    except OSError:
        raise
    except av.error.FFmpegError as error:
        raise ValueError(
            f"{path}: expected a video, got a file that FFmpeg does not decode "
            f"({error.strerror}). Give an mp4 or another whole video file."
        ) from error


def _turns(frame: Any) -> int:
    """Quarter turns, counterclockwise, that set a frame upright."""
    turns: int = round(frame.rotation / 90)
    return turns


def _open_graph(frame: Any, width: int, height: int) -> Any:
    """Cut out the middle and scale it to RGB; unlike PyAV's own, this heeds the colour matrix."""
    scale = min(frame.width / width, frame.height / height)
    graph = require("av", "video").filter.Graph()
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format.name,
        time_base=frame.time_base,
    )
    _link(
        graph,
        source,
        ("crop", f"{round(width * scale)}:{round(height * scale)}:exact=1"),
        ("scale", f"{width}:{height}:{_SCALING}"),
        ("format", "rgb24"),
    )
    return graph


def _to_pixels(graph: Any, frame: Any) -> NDArray[np.uint8]:
    graph.push(frame)
    pixels: NDArray[np.uint8] = np.rot90(graph.pull().to_ndarray(), _turns(frame))
    return pixels


def _without_avx512() -> dict[str, str]:
    """Options that keep x264 to AVX2 where it would use AVX-512."""
    # With AVX-512, the x264 of PyAV 18.1 gave other bytes for the same frames in one run of four,
    # in a process that also ran ONNX Runtime; with AVX2 in none of 400.
    known = _PROCESSOR.read_text(errors="replace") if _PROCESSOR.exists() else ""
    return {"x264-params": "asm=avx2"} if "avx512f" in known else {}


def _link(graph: Any, source: Any, *filters: tuple[str, str]) -> None:
    nodes = [graph.add(name, arguments) for name, arguments in filters]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()


def _cut_to_whole_chunks(path: Path) -> bool:
    """Cut a file that broke off after its last whole fragment; tell whether one is whole."""
    size, position, whole = path.stat().st_size, 0, 0
    with path.open("r+b") as file:
        while position < size:
            file.seek(position)
            header = file.read(16)
            position += _box_size(header)
            if header[4:8] == b"mdat" and position <= size:
                whole = position
        file.truncate(whole)
    return whole > 0


def _box_size(header: bytes) -> int:
    """Size of an ISO media box in bytes; 1 in its first word means that 64 bits follow the name."""
    size = int.from_bytes(header[:4])
    return int.from_bytes(header[8:16]) if size == 1 else size
