"""The schedule before a run: against the traces of real runs, and sums taken by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mc_engines import onnxruntime_runner
from mc_runtime import distances
from mc_runtime import pipeline as pipeline_module
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.schedule_table import forecast_schedule
from motioncache import Mode

# Two windows of three chunks, the second with a prefix of one.
OPTIONS = GenerationOptions(
    num_frames=97, base_num_frames=57, height=32, width=48, num_inference_steps=12, ar_step=4
)
KINDS = {Mode.FULL: "full", Mode.REUSE: "reuse"}
FLOWCACHE = ("threshold=1.5", "coefficients=1,-0.2", "warmup_steps=2")
MOTIONCACHE = ("threshold=1.1", "coefficients=1,0", "warmup_steps=2", "coarse_updates=2")


def forecast(pipeline, name, pairs, options=OPTIONS):
    return forecast_schedule(pipeline, pipeline.find_policy(name, pairs), options)


def run(pipeline, name, pairs):
    policy = pipeline.find_policy(name, pairs)
    return pipeline.run("a bird", options=OPTIONS, policy=policy, decode=False).trace


def same(found, expected):
    """Whether a number of the table is that of a trace, where None stands for NaN."""
    return np.isclose(np.nan if found is None else found, expected, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "name, pairs, known",
    [
        ("none", (), 12),
        ("flowcache", FLOWCACHE, 12),
        ("flowcache", ("threshold=0.9", "coefficients=1,-0.8", "warmup_steps=3"), 12),
        ("motioncache", MOTIONCACHE, 7),
        ("motioncache", (*MOTIONCACHE[:-1], "coarse_updates=99"), 12),
    ],
)
def test_every_chunk_of_a_run_takes_the_steps_of_the_table(tiny, name, pairs, known):
    lines = forecast(tiny, name, pairs).lines
    trace = run(tiny, name, pairs)
    assert [line.steps for line in lines] == [(step,) for step in range(1, 13)]
    unknown = [line for line in lines if line.decision == "depends on motion"]
    assert len(lines) - len(unknown) >= known
    compared = 0
    for row, branch, chunk in np.argwhere(trace.recompute[..., 0] >= 0).tolist():
        line, at = lines[trace.step[row, chunk] - 1], (row, branch, chunk)
        if line in unknown:
            continue
        compared += 1
        assert line.decision == KINDS[Mode(trace.mode[at])]
        assert same(line.accumulated, trace.accumulated[at][1])
        assert same(line.rescaled and max(line.rescaled, 0), trace.distance[at])
    assert compared == 2 * 5 * (len(lines) - len(unknown))


def test_the_tables_of_these_policies_have_both_decisions(tiny):
    for pairs in (FLOWCACHE, MOTIONCACHE):
        name = "flowcache" if pairs is FLOWCACHE else "motioncache"
        assert {"full", "reuse"} <= {line.decision for line in forecast(tiny, name, pairs).lines}


def test_every_row_of_a_run_is_that_of_the_table(tiny):
    pairs = ("threshold=1.2", "coefficients=1,-0.3", "warmup_steps=2")
    schedule = forecast(tiny, "teacache", pairs)
    trace = run(tiny, "teacache", pairs)
    assert [line.row for line in schedule.lines] == list(range(len(trace.mode)))
    for line, step, mode in zip(schedule.lines, trace.step, trace.mode, strict=True):
        assert line.steps == tuple(step[step > 0].tolist())
        for branch in range(2):
            decided = [KINDS[Mode(kind)] for kind in mode[branch][step > 0]]
            assert line.decisions() == decided
        for chunk in np.flatnonzero(step > 1):
            assert same(line.accumulated, trace.accumulated[line.row, 0, chunk, 0])
    modes = trace.mode[:, 0]
    full, reuse = int((modes == Mode.FULL).sum()), int((modes == Mode.REUSE).sum())
    assert full and reuse
    assert schedule.totals() == {
        "steps": full + reuse, "full": full, "reuse": reuse, "not_known": 0
    }  # fmt: skip


def test_distances_are_those_of_the_whole_transformer(tiny):
    lines = forecast(tiny, "none", ()).lines
    timesteps = np.array([line.timesteps[0] for line in lines])
    e0 = tiny.transformer.encode_timesteps(timesteps, OPTIONS.fps).modulation.astype(np.float64)
    for step, line in enumerate(lines):
        before = e0[max(step - 1, 0)]
        expected = np.abs(e0[step] - before).mean() / (np.abs(before).mean() + 1e-8)
        assert line.distance == pytest.approx(expected, rel=1e-6)
    assert timesteps[0] == 999


def test_only_the_timestep_graph_is_opened(tiny_bundle, monkeypatch):
    opened = []

    def spy(bundle, component, form="fp32", threads=None):
        opened.append(component)
        return onnxruntime_runner.open_runner(bundle, component, form, threads)

    for module in (distances, pipeline_module):
        monkeypatch.setattr(module, "open_runner", spy)
    monkeypatch.setattr(pipeline_module, "open_transformer", None)
    forecast(VideoPipeline.from_bundle(tiny_bundle, threads=1), "flowcache", FLOWCACHE)
    assert opened == ["timestep"]


def test_settings_move_the_timesteps(tiny):
    first = forecast(tiny, "none", (), GenerationOptions(num_inference_steps=4, flow_shift=1.0))
    assert [line.timesteps[0] for line in first.lines] == [999, 750, 500, 250]


def test_the_last_step_is_full_whatever_moves_unless_as_published(tiny):
    for compat, last in (("fixed", "full"), ("reference", "depends on motion")):
        schedule = forecast(tiny, "motioncache", (*MOTIONCACHE, f"compat={compat}"))
        decisions = [line.decision for line in schedule.lines]
        assert decisions[-1] == last
        assert (schedule.lines[-1].rescaled is None) == (last == "full")
        assert "depends on motion" in decisions[:-1]
        assert schedule.totals()["not_known"] == decisions.count("depends on motion")


def test_negative_distances_are_named_with_what_becomes_of_them(tiny):
    raw = [line.distance for line in forecast(tiny, "none", ()).lines]
    border = sorted(raw[3:-1])[2]  # two of the steps 4 to 11 are below
    numbers = [step + 1 for step in range(3, 11) if raw[step] < border]
    listed = ", ".join(map(str, numbers))
    if numbers[1] == numbers[0] + 1:
        listed = f"{numbers[0]} to {numbers[1]}"
    pairs = ("threshold=0.5", f"coefficients=1,-{border}", "warmup_steps=2")
    for compat, fate in (
        ("fixed", "count as 0"),
        ("reference", "are subtracted from what accumulates"),
    ):
        schedule = forecast(tiny, "flowcache", (*pairs, f"compat={compat}"))
        assert schedule.negative() == numbers
        assert schedule.warning() == (
            "coefficients: expected rescaled distances of 0 or more, got negative ones in steps "
            f"{listed}. They {fate}; run mc-calibrate to fit coefficients to this bundle."
        )
    assert forecast(tiny, "flowcache", FLOWCACHE).warning() is None


def test_json_has_every_line(tiny):
    schedule = forecast(tiny, "motioncache", MOTIONCACHE)
    value = json.loads(json.dumps(schedule.to_json()))
    assert value["policy"]["name"] == "motioncache"
    assert value["policy"]["config"]["coefficients"] == [1, 0]
    assert value["options"]["num_inference_steps"] == 12
    assert [line["decision"] for line in value["lines"]] == [
        line.decision for line in schedule.lines
    ]
    assert value["totals"] == schedule.totals()
    assert value["negative"] == []


def test_a_run_that_cannot_be_is_refused(tiny):
    short = GenerationOptions(num_inference_steps=3)
    with pytest.raises(ValueError, match="warmup_steps: expected at most 2 with 3 steps"):
        forecast(tiny, "flowcache", ("threshold=1", "coefficients=1,0"), short)
    with pytest.raises(ValueError, match="num_frames: expected a count that fills whole chunks"):
        forecast(tiny, "none", (), GenerationOptions(num_frames=96))


def test_a_preset_made_for_other_steps_is_noted(tiny):
    notes = []
    policy = replace(
        tiny.find_policy("flowcache", FLOWCACHE), preset="calibrated (changed)", made_for_steps=50
    )
    forecast_schedule(tiny, policy, OPTIONS, notes.append)
    assert notes == [
        "flowcache:calibrated (changed): expected 50 steps, for which the preset was made, got 12. "
        "Run mc-calibrate with these."
    ]
    forecast_schedule(tiny, replace(policy, made_for_steps=12), OPTIONS, notes.append)
    assert len(notes) == 1
