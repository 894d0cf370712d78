"""Plot and numbers of a comparison's page; test_bench_cli.py has the page of a whole run."""

import numpy as np
import pytest

from mc_runtime.bench import policy_page
from mc_runtime.bench.policy_page import draw_plot
from mc_runtime.fidelity import compare_videos


def plot(busy, **policies):
    """Axes and points of policies with speed-up, ratio of FLOPs, scores of a frame, and moving."""
    entries = [
        {
            "policy": name,
            "speedup": speedup,
            "flops_ratio": {"chunk_causal": ratio},
            "fidelity": {"mean": {"whole": whole, "moving": moving}},
        }
        for name, (speedup, ratio, whole, moving) in policies.items()
    ]
    axes = draw_plot({"policies": entries, "reference_kernel": {"busy": busy}}).axes[0]
    points = [(*line.get_xydata()[0].tolist(), line.get_marker()) for line in axes.lines]
    return axes, points


@pytest.mark.parametrize(
    ("busy", "x", "label"),
    [
        (False, 1.5, "seconds of none / seconds"),
        (True, 1.7, "FLOPs of none / FLOPs (the machine was too busy to time)"),
    ],
)
def test_the_plot_has_a_point_per_policy_and_region(busy, x, label):
    same, near, far = ({"frames": 37, "psnr": psnr} for psnr in (None, 41.5, 30.25))
    policies = {"none": (1.0, 1.0, same, same), "flowcache": (1.5, 1.7, near, far)}
    axes, points = plot(busy, **policies)
    assert points == [(1, 1, "^"), (1, 1, "^"), (x, 41.5, "o"), (x, 30.25, "o")]
    assert axes.get_xlabel() == label
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["none", "flowcache"]


def test_where_nothing_moves_no_moving_region_is_plotted():
    still = np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), np.uint8).repeat(5, axis=0)
    scores = compare_videos(still, still + np.uint8(1)).to_json()["video"]
    _, points = plot(False, flowcache=(1.5, 1.7, scores["whole"], scores["moving"]))
    assert points == [(1.5, pytest.approx(48.13, abs=0.01), "o")]  # 20 log10(255)


@pytest.mark.parametrize(
    ("flops", "text"),
    [(0, "0"), (999, "999"), (999_600, "1M"), (1234, "1.23k"), (113.6e15, "114P")],
)
def test_operations_have_three_digits_and_a_prefix(flops, text):
    assert policy_page._count(flops) == text
