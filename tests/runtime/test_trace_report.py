"""The page and the numbers of a trace, against plain loops over its lines and its arrays."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO

import matplotlib.image
import numpy as np
import pytest

from mc_runtime import trace_report
from mc_runtime.options import GenerationOptions
from mc_runtime.trace_report import describe, report_page, summarise
from mc_runtime.video import VideoWriter, read_frames
from motioncache import Mode

# Two windows of three chunks, the second with a prefix of one.
OPTIONS = GenerationOptions(
    num_frames=97, base_num_frames=57, height=32, width=48, num_inference_steps=10, ar_step=3
)
PAIRS = (
    *("threshold=1.2", "coefficients=1,0", "warmup_steps=1", "coarse_updates=1"),
    *("min_update_ratio=0", "vote_threshold=none"),
)


@pytest.fixture(scope="module")
def video(tiny):
    policy = tiny.find_policy("motioncache", PAIRS)
    video = tiny.run("a bird", options=OPTIONS, policy=policy)
    assert {*map(int, Mode)} <= {*np.unique(video.trace.mode).tolist()}
    return video


@pytest.fixture(scope="module")
def trace(video):
    return video.trace


@pytest.fixture(scope="module")
def file(video, tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "run.mp4"
    with VideoWriter(path, OPTIONS.fps, OPTIONS.width, OPTIONS.height) as writer:
        writer.write(video.frames)
    return path


@pytest.fixture(scope="module")
def text(trace, file):
    """The page with frames."""
    return report_page(trace, file)


@pytest.fixture(scope="module")
def bare_text(trace):
    """The page of a run without video and motion weights."""
    return report_page(replace(trace, weights=np.full_like(trace.weights, np.nan)), None)


class Page(HTMLParser):
    """Text of every cell by row, addresses, and tags."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.addresses, self.tags, self.in_cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        self.in_cell = tag in ("td", "th")
        if self.in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.in_cell = False

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data

    def images(self):
        prefix = "data:image/png;base64,"
        return [
            matplotlib.image.imread(BytesIO(base64.b64decode(address.removeprefix(prefix))))
            for address in self.addresses
        ]


def share_by_hand(trace, window, branch, chunk):
    bounds = (*trace.window_start, len(trace.mode))
    seen = []
    for row in range(*bounds[window : window + 2]):
        seen += [value for value in trace.recompute[row, branch, chunk].tolist() if value >= 0]
    return f"{100 * sum(seen) / len(seen):.1f}%" if seen else "-"


def test_the_numbers_are_the_sums_of_the_lines(trace):
    lines, summary = list(trace.lines()), summarise(trace)
    for mode in ("reuse", "partial", "full", "clean"):
        assert summary["passes"][mode] == sum(line["mode"] == mode for line in lines)
    steps = [line for line in lines if line["mode"] != "clean"]
    tokens = summary["tokens_per_chunk"]
    assert tokens == 5 * 2 * 3
    computed = sum(line["tokens"] for line in steps)
    assert summary["recomputed"] == pytest.approx(computed / (len(steps) * tokens))
    late = [line for line in steps if line["distance"] is not None]
    reused = 1 - sum(line["tokens"] for line in late) / (len(late) * tokens)
    assert summary["reused_after_warmup"] == pytest.approx(reused)
    for name, key in (("engines", "engine_ms"), ("host", "host_ms"), ("policy", "policy_ms")):
        total = sum(line[key] for line in lines)
        assert summary["milliseconds"][name] == pytest.approx(total, rel=1e-4)
    assert json.loads(json.dumps(summary))["passes"] == summary["passes"]


def test_padding_is_what_partial_passes_computed_in_vain(trace):
    assert summarise(trace)["padding"] == 0
    bucket = np.where(trace.mode == Mode.PARTIAL, 29, trace.bucket)
    padded = replace(trace, bucket=bucket.astype(np.int32))
    partial = [line for line in padded.lines() if line["mode"] == "partial"]
    useful = sum(line["tokens"] for line in partial)
    assert summarise(padded)["padding"] == pytest.approx(1 - useful / (29 * len(partial)))
    full = replace(trace, mode=np.where(trace.mode == Mode.PARTIAL, Mode.FULL, trace.mode))
    assert summarise(full)["padding"] is None


def test_the_page_has_a_line_per_chunk_with_its_shares(trace, text):
    page = Page(text)
    heads = ["window", "chunk", "recomputed, cond", "recomputed, uncond", "seconds in engines"]
    start = page.rows.index(heads) + 1
    for number, row in enumerate(page.rows[start : start + 6]):
        window, chunk = divmod(number, 3)
        shares = [share_by_hand(trace, window, branch, chunk) for branch in range(2)]
        assert row[:4] == [str(window), str(chunk), *shares]
    assert page.rows[start + 3][2] == "-"  # the prefix took no step


def test_the_page_has_the_totals_and_the_settings(trace, text):
    rows = dict(row for row in Page(text).rows if len(row) == 2)
    for name, value in describe(summarise(trace)).items():
        assert rows[name] == value
    assert rows["policy"] == "motioncache"
    assert rows["run"] == f"2 windows, {len(trace.mode)} rows, 10 steps, 2 branches, " + (
        "30 tokens per chunk"
    )
    assert rows["threshold"] == "1.2"
    assert rows["coefficients"] == "1.0, 0.0"


def test_the_page_needs_no_other_file(text):
    page = Page(text)
    assert not {"script", "link", "iframe", "a"} & set(page.tags)
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", text)
    assert len(rest) < 20_000  # no picture is left in which a search could find anything
    for outside in ("http:", "https:", "url(", "@import", "//"):
        assert outside not in rest
    assert len(text) < 2_000_000
    images = page.images()
    assert len(images) == 3  # the schedule, and the motion of two windows
    assert all(image.std() > 0.05 for image in images)


def test_the_chart_shows_every_share_and_clean_pass(trace):
    figure = trace_report._draw_schedule(trace)
    for branch, panel in enumerate(figure.axes[:2]):
        drawn = panel.images[0].get_array()
        for row in range(len(trace.mode)):
            for chunk in range(3):
                mask = trace.recompute[row, branch, chunk]
                if mask[0] < 0:
                    assert drawn.mask[chunk, row]
                else:
                    assert drawn[chunk, row] == pytest.approx((mask == 1).mean())
        marks = {tuple(mark) for mark in panel.collections[0].get_offsets().tolist()}
        lines = [line for line in trace.lines() if line["mode"] == "clean"]
        branches = [line for line in lines if line["branch"] == ("cond", "uncond")[branch]]
        assert marks == {(line["row"], line["chunk"]) for line in branches}


def test_the_moments_are_about_eight_and_after_the_warm_up(trace):
    moments = trace_report._moments(trace)
    bounds = (*trace.window_start, len(trace.mode))
    for window, chosen in moments.items():
        assert all(row in range(*bounds[window : window + 2]) for row in chosen)
    rows = [row for chosen in moments.values() for row in chosen]
    assert len(rows) == 8
    assert rows == sorted(set(rows))
    assert all((~np.isnan(trace.distance[row])).any() for row in rows)
    assert rows[0] < 10 and rows[-1] == len(trace.mode) - 2  # the last step is forced
    replayed = trace_report._moments(replace(trace, distance=np.full_like(trace.distance, np.nan)))
    assert (replayed[0][0], replayed[1][-1]) == (0, len(trace.mode) - 1)


def test_maps_show_the_middle_frame_of_each_chunk(trace, file):
    rows = trace_report._moments(trace)[1]
    frames = list(read_frames(file))
    thumbnails = trace_report._read_thumbnails(trace, trace_report.Layout.of(trace), file)
    figure = trace_report._draw_motion(trace, 1, rows, thumbnails)
    panels = np.array(figure.axes[: 3 * (1 + 2 * len(rows))]).reshape(-1, 3)
    for chunk in range(3):
        latent_frame = 10 + 5 * chunk + 2  # the window begins at latent frame 10
        shown = panels[0, chunk].images[0].get_array()
        assert (shown == frames[4 * latent_frame - 1]).all()
        for number, row in enumerate(rows):
            weight_panel, mask_panel = panels[1 + 2 * number : 3 + 2 * number, chunk]
            if trace.recompute[row, 0, chunk, 0] < 0:
                assert not weight_panel.images and not mask_panel.images
                continue
            mask = trace.recompute[row, :, chunk].reshape(2, 5, 2, 3)[:, 2].mean(axis=0)
            assert np.allclose(mask_panel.images[0].get_array(), mask)
            weights = trace.weights[row, :, chunk].astype(float).reshape(2, 5, 2, 3)[:, 2]
            if np.isnan(weights).all():
                assert not weight_panel.images
            else:
                found = weight_panel.images[0].get_array()
                assert np.allclose(found, weights.mean(axis=0), atol=1e-3)


def test_the_page_says_what_is_missing(text, bare_text):
    assert "Frames are missing: no video." in bare_text
    assert "no motion weights, as this policy had none" in bare_text
    assert "Frames are missing" not in text and "no motion weights" not in text
    assert len(Page(bare_text).images()) == 3


def test_an_interrupted_run_is_called_so(trace):
    for interrupted, told in ((True, True), (False, False), (None, False)):
        marked = replace(trace, run={**trace.run, "interrupted": interrupted})
        summary = summarise(marked)
        assert summary["interrupted"] is interrupted
        assert describe(summary)["run"].endswith("30 tokens per chunk, interrupted") == told


def test_names_are_escaped(trace):
    policy = {"name": "<script>", "preset": "a&b", "config": {"<b>": "<i>"}}
    text = report_page(replace(trace, run={**trace.run, "policy": policy}), None)
    assert "<script>" not in text and "<b>" not in text and "<i>" not in text
    assert ["policy", "<script>:a&b"] in Page(text).rows


def test_a_run_without_choice_or_guidance_is_drawn_too(tiny):
    options = replace(OPTIONS, num_frames=37, guidance_scale=1.0, num_inference_steps=3)
    trace = tiny.run("a bird", options=options, decode=False).trace
    text = report_page(trace, None)
    assert len(Page(text).images()) == 2
    assert "uncond" not in text
    summary = summarise(trace)
    assert (summary["recomputed"], summary["reused_after_warmup"]) == (1, None)
