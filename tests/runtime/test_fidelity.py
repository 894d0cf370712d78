"""Fidelity against scikit-image's own measures per frame, and against loops over pixels."""

import json
import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from mc_engines.errors import EngineError
from mc_runtime import fidelity
from mc_runtime.fidelity import (
    MOVING_LEVELS,
    MOVING_MARGIN,
    Lpips,
    Scores,
    compare_videos,
    find_moving_pixels,
)

NOTHING = Scores(frames=0, identical=0, psnr=None, ssim=None, lpips=None)


def clip(count=6, size=64):
    """A square that moves two pixels a frame over a still, rough background."""
    rng = np.random.default_rng(0)
    video = np.repeat(rng.integers(80, 120, (1, size, size, 3), np.uint8), count, axis=0)
    side = size // 4
    for index, frame in enumerate(video):
        frame[side : 2 * side, 2 * index : 2 * index + side] = 200
    return video


def disturb(video, levels=12, seed=1):
    noise = np.random.default_rng(seed).normal(0, levels, video.shape)
    return np.clip(np.rint(video + noise), 0, 255).astype(np.uint8)


def save_graph(path, names=("reference", "test"), kind=TensorProto.FLOAT):
    """A stand-in for LPIPS: the mean absolute difference of two pictures."""
    inputs = [helper.make_tensor_value_info(name, kind, ["N", 3, "H", "W"]) for name in names]
    nodes = [
        helper.make_node("Sub", names, ["difference"]),
        helper.make_node("Abs", ["difference"], ["size"]),
        helper.make_node("ReduceMean", ["size", "axes"], ["distance"], keepdims=0),
    ]
    output = helper.make_tensor_value_info("distance", kind, ["N"])
    axes = helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])
    graph = helper.make_graph(nodes, "stand-in", inputs, [output], [axes])
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.fixture
def lpips(tmp_path):
    return Lpips(save_graph(tmp_path / "stand-in.onnx"), threads=1)


def loop_moving(video):
    """Which pixels move, by looking at every neighbour of every pixel."""
    count, height, width, _ = video.shape
    moving = np.zeros((count, height, width), bool)
    for n in range(count):
        now, before = (video[1], video[0]) if n == 0 else (video[n], video[n - 1])
        for y in range(height):
            for x in range(width):
                for v in range(max(y - MOVING_MARGIN, 0), min(y + MOVING_MARGIN + 1, height)):
                    for u in range(max(x - MOVING_MARGIN, 0), min(x + MOVING_MARGIN + 1, width)):
                        changes = [abs(int(now[v, u, c]) - int(before[v, u, c])) for c in range(3)]
                        moving[n, y, x] |= max(changes) > MOVING_LEVELS
    return moving


def loop_ssim(a, b, y, x, channel):
    """SSIM of the 7 x 7 pixels around one, with sample covariances (Wang et al. 2004, eq. 13)."""
    p, q = (f[y - 3 : y + 4, x - 3 : x + 4, channel].astype(float).ravel() for f in (a, b))
    (vp, cov), (_, vq) = np.cov(p, q)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mp, mq = p.mean(), q.mean()
    return (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))


def loop_scores(reference, test, region):
    """PSNR of frames that differ, and SSIM of all, by loops over the pixels of a region."""
    psnr, ssim = [], []
    _, height, width, _ = reference.shape
    for a, b, pixels in zip(reference, test, region, strict=True):
        places = [(y, x) for y in range(height) for x in range(width) if pixels[y, x]]
        errors = [(int(a[y, x, c]) - int(b[y, x, c])) ** 2 for y, x in places for c in range(3)]
        if any(errors):
            psnr.append(10 * math.log10(255**2 * len(errors) / sum(errors)))
        inner = [(y, x) for y, x in places if 3 <= y < height - 3 and 3 <= x < width - 3]
        if inner:
            ssim.append(np.mean([loop_ssim(a, b, y, x, c) for y, x in inner for c in range(3)]))
    return np.mean(psnr), np.mean(ssim)


def test_the_whole_frame_is_scikit_images_mean_over_frames(lpips):
    reference = clip()
    test = disturb(reference)
    test[2] = reference[2]
    scores = compare_videos(reference, test, lpips=lpips).video.whole
    pairs = list(zip(reference, test, strict=True))
    psnr = [peak_signal_noise_ratio(a, b) for a, b in pairs if not np.array_equal(a, b)]
    ssim = [structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in pairs]
    assert (scores.frames, scores.identical) == (6, 1)
    assert scores.psnr == pytest.approx(np.mean(psnr), rel=1e-12)
    assert scores.ssim == pytest.approx(np.mean(ssim), rel=1e-12)
    difference = np.abs(reference / 127.5 - test / 127.5).mean()
    assert scores.lpips == pytest.approx(difference, rel=1e-5)


def test_the_moving_region_is_that_of_the_loops(lpips):
    reference = clip(count=4, size=32)
    test = disturb(reference, 20)
    moving = loop_moving(reference)
    assert 0.1 < moving.mean() < 0.8
    assert np.array_equal(find_moving_pixels(reference), moving)
    part = compare_videos(reference, test, lpips=lpips).video.moving
    psnr, ssim = loop_scores(reference, test, moving)
    assert (part.frames, part.identical) == (4, 0)
    assert part.psnr == pytest.approx(psnr, rel=1e-12)
    assert part.ssim == pytest.approx(ssim, rel=1e-9)
    shown = reference.copy()
    shown[moving] = test[moving]
    assert part.lpips == pytest.approx(np.abs(reference / 127.5 - shown / 127.5).mean(), rel=1e-5)


def test_the_whole_frame_is_that_of_the_loops():
    reference = clip(count=2, size=12)
    test = disturb(reference)
    psnr, ssim = loop_scores(reference, test, np.ones(reference.shape[:3], bool))
    whole = compare_videos(reference, test).video.whole
    assert whole.psnr == pytest.approx(psnr, rel=1e-12)
    assert whole.ssim == pytest.approx(ssim, rel=1e-9)


@pytest.mark.parametrize(("levels", "moves"), [(MOVING_LEVELS, False), (MOVING_LEVELS + 1, True)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_pixel_moves_if_one_channel_changes_by_more_than_the_threshold(levels, moves, sign):
    video = np.full((2, 16, 16, 3), 100, np.uint8)
    video[1, 8, 5, 2] = 100 + sign * levels
    expected = np.zeros((2, 16, 16), bool)
    expected[:, 8 - MOVING_MARGIN : 9 + MOVING_MARGIN, 5 - MOVING_MARGIN : 6 + MOVING_MARGIN] = (
        moves
    )
    assert np.array_equal(find_moving_pixels(video), expected)


def test_where_everything_moves_both_regions_agree(lpips):
    reference = np.random.default_rng(2).integers(0, 256, (3, 32, 32, 3), np.uint8)
    scores = compare_videos(reference, disturb(reference), lpips=lpips).video
    assert scores.moving == scores.whole


def test_errors_of_the_still_background_are_none_of_the_moving_region(lpips):
    reference = clip()
    test = np.where(find_moving_pixels(reference)[..., None], reference, disturb(reference))
    scores = compare_videos(reference, test, lpips=lpips).video
    assert scores.whole.identical == 0 and scores.whole.lpips > 0
    moving = scores.moving
    assert (moving.frames, moving.identical, moving.psnr, moving.lpips) == (6, 6, None, 0)


def test_a_chunk_is_judged_by_its_own_frames(lpips):
    reference = clip()
    reference[4:] = reference[3]  # the square stands still
    test = disturb(reference)
    test[1:3] = reference[1:3]
    chunks = [slice(0, 1), slice(1, 3), slice(3, 6)]
    result = compare_videos(reference, test, chunks, lpips)
    first, second, third = result.chunks
    assert [chunk.whole.identical for chunk in result.chunks] == [0, 2, 0]
    assert [chunk.moving.frames for chunk in result.chunks] == [1, 2, 1]
    assert second.whole == second.moving == Scores(2, 2, None, 1.0, 0.0)
    alone = compare_videos(reference[3:], test[3:], lpips=lpips).video
    assert third.whole == alone.whole
    assert alone.moving == NOTHING
    both = compare_videos(reference[2:4], test[2:4], [slice(1, 2)], lpips).chunks[0]
    assert third.moving == both.moving
    for region in ("whole", "moving"):
        one, three, all_ = (getattr(s, region) for s in (first, third, result.video))
        counts = one.frames, three.frames
        assert all_.psnr == pytest.approx(np.average([one.psnr, three.psnr], weights=counts))


@pytest.mark.parametrize("count", [1, 3])
def test_a_still_video_has_no_moving_region(count, lpips):
    reference = np.repeat(clip(1), count, axis=0)
    scores = compare_videos(reference, disturb(reference), lpips=lpips).video
    assert scores.whole.frames == count
    assert scores.moving == NOTHING


def test_what_moves_at_the_border_alone_has_no_ssim():
    reference = np.full((2, 16, 16, 3), 100, np.uint8)
    reference[1, :, 0] = 200
    moving = compare_videos(reference, disturb(reference)).video.moving
    assert moving.frames == 2 and moving.psnr is not None and moving.ssim is None


def test_without_a_graph_there_is_no_lpips():
    result = compare_videos(clip(), disturb(clip()), [slice(0, 3)]).to_json()
    assert [result["video"][region]["lpips"] for region in ("whole", "moving")] == [None, None]
    assert json.loads(json.dumps(result)) == result
    assert list(result) == ["video", "chunks"] and len(result["chunks"]) == 1
    assert list(result["video"]["moving"]) == ["frames", "identical", "psnr", "ssim", "lpips"]


def test_batches_change_no_distance(lpips, monkeypatch):
    reference = clip(5, 32)
    test = disturb(reference)
    expected = np.abs(reference / 127.5 - test / 127.5).mean((1, 2, 3))
    for frames in (0.5, 2, 5):
        monkeypatch.setattr(fidelity, "_LPIPS_PIXELS", int(frames * 32 * 32))
        np.testing.assert_allclose(lpips.distance(reference, test), expected, rtol=1e-5)


def message(kind, function, *arguments):
    with pytest.raises(kind) as error:
        function(*arguments)
    return str(error.value)


@pytest.mark.parametrize(
    "reference",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 6, 3), np.uint8),
    ],
)
def test_a_reference_that_is_no_video_is_refused(reference):
    assert message(ValueError, compare_videos, reference, reference) == (
        "reference frames: expected uint8 (n, height, width, 3) of at least 7 pixels to a side, "
        f"got {reference.dtype} {reference.shape}. Give pixels as the decoder does."
    )


@pytest.mark.parametrize(
    "test",
    [
        np.zeros((2, 8, 8, 3), np.float64),
        np.zeros((3, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 9, 3), np.uint8),
    ],
)
def test_a_video_of_another_shape_is_refused(test):
    reference = np.zeros((2, 8, 8, 3), np.uint8)
    assert message(ValueError, compare_videos, reference, test) == (
        "test frames: expected uint8 (2, 8, 8, 3) as the reference has, "
        f"got {test.dtype} {test.shape}. Compare runs with the same options."
    )


def test_frames_too_small_for_lpips_are_refused(lpips):
    frames = np.zeros((2, 31, 30, 3), np.uint8)
    assert message(ValueError, lpips.distance, frames, frames).startswith(
        "reference frames: expected uint8 (n, height, width, 3) of at least 31 pixels to a side, "
        "got uint8 (2, 31, 30, 3)."
    )


def test_a_chunk_without_frames_is_refused():
    chunks = [slice(0, 6), slice(6, 9)]
    assert message(ValueError, compare_videos, clip(), clip(), chunks) == (
        "chunk 1: expected some of the 6 frames, got none from 6:9. "
        "Give the frames that the chunk decoded to."
    )


def test_another_file_than_an_lpips_graph_is_refused(tmp_path):
    text = tmp_path / "text.onnx"
    text.write_text("hello")
    others = {
        text: "another file",
        save_graph(tmp_path / "names.onnx", ("a", "b")): "another file",
        save_graph(tmp_path / "double.onnx", kind=TensorProto.DOUBLE): "another file",
        tmp_path / "missing.onnx": "no file",
    }
    for path, got in others.items():
        assert message(EngineError, Lpips, path) == (
            f"{path}: expected an LPIPS graph, got {got}. Run: python scripts/make_lpips.py {path}"
        )
