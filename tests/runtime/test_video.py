"""Frames go to an mp4 and come back; whatever happens, the file at the path is a whole one."""

import resource
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import av
import numpy as np
import pytest

from mc_runtime import video
from mc_runtime.output_file import check_output, replace_file
from mc_runtime.video import VideoWriter, read_frames, read_video

WIDTH, HEIGHT = 64, 48


def smooth(count, width=WIDTH, height=HEIGHT):
    t, y, x = np.ogrid[:count, :height, :width]
    waves = [np.sin(x / 17 + t / 5 + c) * np.cos(y / 13 - t / 7) for c in range(3)]
    return np.stack([np.rint(127 + 100 * wave) for wave in waves], axis=-1).astype(np.uint8)


def noisy(count):
    return np.random.default_rng(0).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)


def write(path, frames):
    with VideoWriter(path, 24, frames.shape[2], frames.shape[1]) as writer:
        writer.write(frames)
    return path


def write_chunks(path, frames):
    with VideoWriter(path, 24, WIDTH, HEIGHT) as writer:
        for chunk in np.split(frames, 8):
            writer.write(chunk)
    return path


def decode(path):
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return np.stack(frames), container.streams.video[0].average_rate


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@contextmanager
def files_no_larger_than(size):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_frames_come_back(tmp_path):
    frames = smooth(20)
    decoded, rate = decode(write(tmp_path / "out.mp4", frames))
    assert decoded.shape == frames.shape
    assert rate == 24
    assert min(map(psnr, frames, decoded)) > 35


def test_same_frames_give_the_same_bytes(tmp_path):
    first, second = (write(tmp_path / f"{n}.mp4", noisy(12)).read_bytes() for n in "ab")
    assert first == second
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert "creation_time" not in container.metadata | container.streams.video[0].metadata


def test_the_bytes_do_not_depend_on_the_number_of_cores(tmp_path):
    # x264 notes its settings in the stream; smaller pictures get one thread in any case.
    content = write(tmp_path / "out.mp4", smooth(2, 640, 480)).read_bytes()
    assert b" threads=1 " in content


def test_other_frames_give_other_bytes(tmp_path):
    frames = noisy(12)
    assert (
        write(tmp_path / "a.mp4", frames).read_bytes()
        != write(tmp_path / "b.mp4", frames[::-1]).read_bytes()
    )


def test_every_chunk_begins_with_a_key_frame(tmp_path):
    """Then a chunk is a fragment of its own, and a full disk costs only those that do not fit."""
    path = tmp_path / "out.mp4"
    with VideoWriter(path, 24, WIDTH, HEIGHT) as writer:
        for _ in range(3):
            writer.write(noisy(20))
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    assert keys == [0, 20, 40]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_keeps_the_frames_that_were_written(tmp_path, error):
    path = tmp_path / "out.mp4"
    with pytest.raises(error), VideoWriter(path, 24, WIDTH, HEIGHT) as writer:
        writer.write(smooth(9))
        raise error
    assert len(decode(path)[0]) == 9
    assert list(tmp_path.iterdir()) == [path]


def test_without_frames_there_is_no_file(tmp_path):
    with VideoWriter(tmp_path / "out.mp4", 24, WIDTH, HEIGHT):
        pass
    assert not list(tmp_path.iterdir())


def test_close_twice_is_close_once(tmp_path):
    with VideoWriter(tmp_path / "out.mp4", 24, WIDTH, HEIGHT) as writer:
        writer.write(smooth(2))
        writer.close()
    assert len(decode(tmp_path / "out.mp4")[0]) == 2


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = write(tmp_path / "out.mp4", smooth(3))
    with VideoWriter(path, 24, WIDTH, HEIGHT) as writer:
        writer.write(smooth(5))
        assert len(decode(path)[0]) == 3
    assert len(decode(path)[0]) == 5


@pytest.mark.parametrize("missing", [1, 400, 3000, 50_000, 70_000])
def test_a_full_disk_is_told_and_keeps_the_chunks_that_fitted(tmp_path, missing):
    path = tmp_path / "out.mp4"
    frames = np.repeat(noisy(80)[..., :1], 3, axis=-1)
    size = write_chunks(tmp_path / "whole.mp4", frames).stat().st_size
    (tmp_path / "whole.mp4").unlink()
    with pytest.raises(OSError) as caught, files_no_larger_than(size - missing):
        write_chunks(path, frames)
    assert str(caught.value) == (
        f"{path}: expected a file that can be written, got: File too large. "
        "Make room, or choose another folder. The chunks that fitted are kept."
    )
    assert list(tmp_path.iterdir()) == [path]
    decoded, _ = decode(path)
    assert len(decoded) in range(10, 81, 10)
    assert min(map(psnr, frames[: len(decoded)], decoded)) > 25


def test_a_disk_that_takes_nothing_leaves_the_old_file(tmp_path):
    path = write(tmp_path / "out.mp4", smooth(3))
    with pytest.raises(OSError, match="File too large"), files_no_larger_than(600):
        write(path, noisy(5))
    assert list(tmp_path.iterdir()) == [path]
    assert len(decode(path)[0]) == 3


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(av.error.FFmpegError):
        write(tmp_path / "out.mp4", smooth(1, WIDTH + 1))


def read_17(path):
    return read_video(path, WIDTH, HEIGHT, 17)


def read_all(path):
    return np.stack(list(read_frames(path)))


def test_frames_are_read_at_their_size_in_the_colours_they_were_written_in(tmp_path):
    colours = np.array([(200, 40, 40), (40, 160, 60), (50, 60, 210)], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (3, HEIGHT, WIDTH, 3))
    read = read_all(write(tmp_path / "in.mp4", frames))
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).max() <= 6


def test_both_readers_give_the_same_pixels(tmp_path):
    path = write(tmp_path / "in.mp4", smooth(20))
    assert (read_17(path) == read_all(path)[-17:]).all()


def test_read_takes_the_last_frames(tmp_path):
    frames = smooth(30)
    read = read_video(write(tmp_path / "in.mp4", frames), WIDTH, HEIGHT, 17)
    assert read.shape == (17, HEIGHT, WIDTH, 3)
    assert read.dtype == np.uint8
    assert min(map(psnr, frames[-17:], read)) > 35


@pytest.mark.parametrize(("width", "height"), [(96, 48), (48, 96)])
def test_read_cuts_around_the_centre(tmp_path, width, height):
    frames = np.zeros((5, height, width, 3), np.uint8)
    top, left = (height - 48) // 2, (width - 48) // 2
    frames[:, top : top + 48, left : left + 48] = 200
    read = read_video(write(tmp_path / "in.mp4", frames), 48, 48, 5)
    assert abs(read[:, 2:-2, 2:-2].astype(int) - 200).max() < 10


def test_read_resizes(tmp_path):
    frames = smooth(5, 128, 96)
    read = read_video(write(tmp_path / "in.mp4", frames), WIDTH, HEIGHT, 5)
    half = frames.reshape(5, HEIGHT, 2, WIDTH, 2, 3).mean((2, 4))
    assert psnr(half, read) > 35


def test_read_refuses_a_short_video(tmp_path):
    path = write(tmp_path / "in.mp4", smooth(16))
    with pytest.raises(ValueError) as caught:
        read_video(path, WIDTH, HEIGHT, 17)
    assert str(caught.value) == (
        f"{path}: expected at least 17 frames, got 16. "
        "Give a longer video, or a smaller --overlap-history."
    )


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 100])
@pytest.mark.parametrize("read", [read_17, read_all])
def test_read_refuses_what_is_no_video(tmp_path, content, read):
    path = tmp_path / "in.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}: expected a video, got a file that FFmpeg does not decode (Invalid data found "
        "when processing input). Give an mp4 or another whole video file."
    )


@pytest.mark.parametrize("read", [read_17, read_all])
def test_read_needs_a_file(tmp_path, read):
    with pytest.raises(OSError, match="No such file"):
        read(tmp_path / "none.mp4")


def test_read_turns_a_picture_upright(tmp_path):
    frames = smooth(5)
    path = write(tmp_path / "in.mp4", frames)
    # The matrix of a track header: a, b, u, c, d, v, x, y, w; a quarter turn clockwise.
    upright, turned = (
        b"".join(value.to_bytes(4, "big", signed=True) for value in (*matrix, 0, 0, 0, 1 << 30))
        for matrix in ((1 << 16, 0, 0, 0, 1 << 16), (0, 1 << 16, 0, -1 << 16, 0))
    )
    content = path.read_bytes()
    track = content.rindex(b"tkhd")  # the first is that of an unfinished file
    path.write_bytes(content[:track] + content[track:].replace(upright, turned, 1))
    for read in (read_video(path, HEIGHT, WIDTH, 5), read_all(path)):
        assert psnr(np.rot90(frames, -1, (1, 2)), read) > 35


def test_outputs_that_cannot_be_written_are_found_first(tmp_path, monkeypatch):
    path = tmp_path / "out.mp4"
    check_output(path, overwrite=False)
    missing = tmp_path / "no" / "out.mp4"
    with pytest.raises(ValueError) as caught:
        check_output(missing, overwrite=True)
    assert str(caught.value) == (
        f"{missing}: expected an existing folder, got none. Run: mkdir -p {missing.parent}"
    )
    with pytest.raises(ValueError) as caught:
        check_output(tmp_path, overwrite=False)
    assert str(caught.value) == f"{tmp_path}: expected a file, got a folder. Name a file in it."
    path.touch()
    check_output(path, overwrite=True)
    with pytest.raises(ValueError) as caught:
        check_output(path, overwrite=False)
    assert str(caught.value) == (
        f"{path}: expected a new file, got one that exists. Pass --overwrite."
    )
    # Who runs the tests may be allowed to write everywhere.
    monkeypatch.setattr(Path, "touch", Mock(side_effect=OSError(30, "Read-only file system")))
    with pytest.raises(ValueError) as caught:
        check_output(path, overwrite=True)
    assert str(caught.value) == (
        f"{path}: expected a folder that takes new files, got: Read-only file system. "
        "Choose another."
    )


def test_replace_file_leaves_the_old_one_when_the_body_fails(tmp_path):
    path = tmp_path / "out"
    path.write_text("old")
    with pytest.raises(RuntimeError), replace_file(path) as hidden:
        hidden.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2 avx512f avx512bw", {"x264-params": "asm=avx2"}), ("fpu avx2", {}), (None, {})],
)
def test_x264_is_kept_from_avx512_and_from_nothing_else(tmp_path, monkeypatch, flags, expected):
    """Where it is used, equal frames do not give equal bytes, too rarely for a test to see."""
    processor = tmp_path / "cpuinfo"
    if flags is not None:
        processor.write_text(f"flags : {flags}\n")
    monkeypatch.setattr(video, "_PROCESSOR", processor)
    assert video._without_avx512() == expected
