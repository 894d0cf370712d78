"""The painted video: where its tokens come from, how often they were recomputed, what is seen."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_runtime.options import GenerationOptions
from mc_runtime.overlay import Layout, free_steps, token_shares, write_overlay
from mc_runtime.schedule import WAN_GRID, plan_windows, step_matrix, validate_options
from mc_runtime.video import VideoWriter, read_frames
from motioncache import DecisionTrace, RunShape

GREY = 120


def make_trace(options, steps=4):
    """A run of these windows that drew its decisions, with a warm-up of two steps."""
    plans, size = plan_windows(options), options.causal_block_size
    matrices = [step_matrix(p.frames // size, steps, 1, p.prefix // size).update for p in plans]
    chunks = max(matrix.shape[1] for matrix in matrices)
    active = np.concatenate([np.pad(m, ((0, 0), (0, chunks - m.shape[1]))) for m in matrices])
    starts = tuple(np.cumsum([0, *map(len, matrices[:-1])]).tolist())
    grid = options.height // 16, options.width // 16
    shape = RunShape(active, starts, 2, size, grid[0] * grid[1], steps)
    run = {
        "grid": list(grid),
        "windows": [vars(plan) for plan in plans],
        "options": vars(options),
    }
    trace = DecisionTrace.empty(shape, run)
    draw = np.random.default_rng(0)
    for row, chunk in np.argwhere(active).tolist():
        start = max(start for start in starts if start <= row)
        step = int(active[start : row + 1, chunk].sum())
        warm = step <= 2
        drawn = draw.integers(0, 2, (2, shape.tokens)) | warm
        trace.recompute[row, :, chunk] = drawn
        trace.distance[row, :, chunk] = np.nan if warm else 0.5
    return trace


def place_by_hand(options):
    """By latent frame of the video: window, chunk and frame of the first that gives it."""
    places = {}
    for number, plan in enumerate(plan_windows(options)):
        for frame in range(plan.frames):
            place = number, *divmod(frame, options.causal_block_size)
            places.setdefault(plan.first + frame, place)
    return [places[frame] for frame in range(len(places))]


@settings(deadline=None)
@given(data=st.data())
def test_a_latent_frame_is_found_in_the_window_that_gave_it(data):
    chunk, chunks = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 4))
    base = chunk * chunks
    overlap = data.draw(st.integers(chunk, base - 1))
    more = data.draw(st.integers(0, 4))  # windows after the first
    last = chunk * data.draw(st.integers(overlap // chunk + 1 if more else 1, chunks))
    options = GenerationOptions(
        num_frames=WAN_GRID.pixel_frames(more * (base - overlap) + last),
        height=32, width=48, causal_block_size=chunk,
        base_num_frames=WAN_GRID.pixel_frames(base),
        overlap_history=WAN_GRID.pixel_frames(overlap),
    )  # fmt: skip
    validate_options(options)
    assert len(plan_windows(options)) == more + 1
    layout = Layout.of(make_trace(options))
    found = zip(layout.window.tolist(), layout.chunk.tolist(), layout.frame.tolist(), strict=True)
    assert list(found) == place_by_hand(options)


# The second window takes over 7 latent frames: a chunk as its prefix, and 2 that it skips.
TWO_WINDOWS = GenerationOptions(
    num_frames=89, base_num_frames=57, overlap_history=25, height=32, width=48, fps=8
)


def test_the_cut_overlap_belongs_to_the_window_before():
    first, second = plan_windows(TWO_WINDOWS)
    assert (second.prefix, second.skip) == (5, 7)
    layout = Layout.of(make_trace(TWO_WINDOWS))
    assert layout.window.tolist() == [0] * first.frames + [1] * (second.frames - second.skip)
    assert (layout.chunk[first.frames], layout.frame[first.frames]) == (1, 2)


def test_a_latent_frame_is_one_frame_and_then_four():
    layout = Layout.of(make_trace(TWO_WINDOWS))
    frames = [list(layout.pixel_frames(place)) for place in range(len(layout.window))]
    assert frames[:3] == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert list(chain(*frames)) == list(range(TWO_WINDOWS.num_frames))


def test_a_token_counts_how_often_it_was_recomputed_after_the_warm_up():
    trace = make_trace(TWO_WINDOWS)
    shares = token_shares(trace, Layout.of(trace))
    bounds = (*trace.window_start, len(trace.mode))
    for place, (window, chunk, frame) in enumerate(place_by_hand(TWO_WINDOWS)):
        for y in range(2):
            for x in range(3):
                token = frame * 6 + y * 3 + x
                seen = [
                    trace.recompute[row, branch, chunk, token]
                    for row in range(*bounds[window : window + 2])
                    for branch in range(2)
                    if not np.isnan(trace.distance[row, branch, chunk])
                ]
                assert shares[place, y, x] == pytest.approx(np.mean(seen))
                assert len(seen) == 4  # two steps, two branches


def test_without_distances_every_step_counts():
    trace = make_trace(TWO_WINDOWS)
    trace.distance[:] = np.nan
    assert (free_steps(trace) == (trace.recompute[..., 0] >= 0)).all()


def write_video(path, frames):
    with VideoWriter(path, 8, frames.shape[2], frames.shape[1]) as writer:
        writer.write(frames)
    return path


def grey_video(path, options, frames=None):
    count = frames or options.num_frames
    size = (count, options.height, options.width, 3)
    return write_video(path, np.full(size, GREY, np.uint8))


def test_still_tokens_are_untouched_and_moving_ones_tinted(tmp_path):
    trace = make_trace(TWO_WINDOWS)
    video = grey_video(tmp_path / "video.mp4", TWO_WINDOWS)
    write_overlay(trace, video, tmp_path / "overlay.mp4")
    layout = Layout.of(trace)
    shares = token_shares(trace, layout)
    assert set(np.unique(shares)) == {0, 0.25, 0.5, 0.75, 1}
    painted = list(read_frames(tmp_path / "overlay.mp4"))
    assert len(painted) == TWO_WINDOWS.num_frames
    zoom = painted[0].shape[1] // 48
    side = 16 * zoom
    assert painted[0].shape == (2 * side + 32, 3 * side, 3)
    assert 640 <= painted[0].shape[1] < 640 + 48
    for place in range(len(layout.window)):
        for number in layout.pixel_frames(place):
            for (y, x), share in np.ndenumerate(shares[place]):
                token = painted[number][y * side : (y + 1) * side, x * side : (x + 1) * side]
                red, _, blue = token[side // 4 : -side // 4, side // 4 : -side // 4].mean((0, 1))
                # orange (230, 85, 0) covers 65 % where the share is largest
                assert red == pytest.approx(GREY + 0.65 * share * (230 - GREY), abs=6)
                assert blue == pytest.approx(GREY - 0.65 * share * GREY, abs=6)


def test_the_legend_says_the_least_and_the_most(tmp_path):
    trace = make_trace(TWO_WINDOWS)
    video = grey_video(tmp_path / "video.mp4", TWO_WINDOWS)
    write_overlay(trace, video, tmp_path / "a.mp4")
    half = trace.recompute[..., :1].repeat(30, axis=3)
    trace.recompute[:] = half  # other shares, so other numbers
    trace.recompute[free_steps(trace)] = 1
    trace.recompute[np.argwhere(free_steps(trace))[0][0]] = 0
    write_overlay(trace, video, tmp_path / "b.mp4")
    legends = [next(iter(read_frames(tmp_path / f"{name}.mp4")))[-32:] for name in "ab"]
    assert min(legend.min() for legend in legends) < 80  # text
    bar = legends[0][16].astype(int)
    left, right = bar[int(0.32 * len(bar))], bar[int(0.76 * len(bar))]
    assert left[0] - left[2] < 20 and right[0] - right[2] > 90
    assert np.abs(legends[0].astype(int) - legends[1]).max() > 60


def test_a_run_without_choice_is_painted_by_the_share_itself(tmp_path):
    trace = make_trace(TWO_WINDOWS)
    trace.recompute[trace.recompute >= 0] = 0
    video = grey_video(tmp_path / "video.mp4", TWO_WINDOWS)
    write_overlay(trace, video, tmp_path / "overlay.mp4")
    first = next(read_frames(tmp_path / "overlay.mp4"))
    assert np.abs(first[:-32].astype(int) - GREY).max() <= 4


def test_a_run_that_ended_before_its_first_step_is_not_tinted(tmp_path):
    trace = make_trace(TWO_WINDOWS)
    trace.recompute[:] = -1
    trace.distance[:] = np.nan
    video = grey_video(tmp_path / "video.mp4", TWO_WINDOWS, frames=17)
    write_overlay(trace, video, tmp_path / "overlay.mp4")
    first = next(read_frames(tmp_path / "overlay.mp4"))
    assert np.abs(first[:-32].astype(int) - GREY).max() <= 4


def test_the_video_of_an_interrupted_run_is_painted_as_far_as_it_goes(tmp_path):
    trace = make_trace(TWO_WINDOWS)
    video = grey_video(tmp_path / "video.mp4", TWO_WINDOWS, frames=17)
    write_overlay(trace, video, tmp_path / "overlay.mp4")
    assert len(list(read_frames(tmp_path / "overlay.mp4"))) == 17


def test_the_video_of_another_run_is_refused(tmp_path):
    trace = make_trace(TWO_WINDOWS)
    longer = grey_video(tmp_path / "longer.mp4", TWO_WINDOWS, frames=90)
    wider = write_video(tmp_path / "wider.mp4", np.zeros((3, 32, 64, 3), np.uint8))
    for video, got in ((longer, "90 of 32x48"), (wider, "3 of 32x64")):
        with pytest.raises(ValueError) as error:
            write_overlay(trace, video, tmp_path / "overlay.mp4")
        assert str(error.value) == (
            f"{video}: expected at most 89 frames of 32x48, got {got}. Pass the video of this run."
        )
    assert not (tmp_path / "overlay.mp4").exists()
