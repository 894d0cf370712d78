"""`mc-calibrate` on a bundle of MAGI-1 with all of its parts, of random weights.

Operations are counted from what the engines are given, and distances from what they give.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mc_engines.bundle import Bundle
from mc_engines.verify import find_faults
from mc_runtime.calibrate_cli import main
from mc_runtime.calibration import run_uncached
from mc_runtime.flops import ModelFlops, count_work
from mc_runtime.generate_cli import main as generate
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.threshold_search import UNREACHED, measure_trial
from motioncache import Mode, make_policy
from motioncache.config import MAGI_FIXED

GOLDEN = Path(__file__).parent.parent / "golden"
TEXTS = ["a bird", "a fish"]
SIZES = ["--num-frames", 48, "--threads", 1]
WARMUP = ["--policy-option", "warmup_steps=1"]
COARSE = ["--policy-option", "coarse_steps=5"]
SEED = 7


def invoke(command, bundle, *arguments, code=0):
    result = CliRunner().invoke(command, [str(bundle), *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def bundle(whole_magi_bundle):
    return whole_magi_bundle


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(TEXTS))
    return file


def ignore(note):
    """Let a run say what it likes."""


class Spy:
    """Counts the operations of a component's matrix products by the arrays that it is given."""

    def __init__(self, name, runner, counts, outputs):
        self.name, self.runner, self.graph = name, runner, runner.graph
        self.counts, self.outputs = counts, outputs

    def run(self, inputs, weights=None):
        outputs = self.runner.run(inputs, weights)
        self.counts[self.name] += self.count(inputs, weights or {}, outputs)
        self.outputs.setdefault(self.name, []).append(outputs)
        return outputs

    def count(self, inputs, weights, outputs):
        if self.name in ("embed", "text_projection", "head"):
            (given,) = (array for array in inputs.values() if array.ndim == 3)
            (made,) = outputs.values()
            return 2 * given.shape[1] * given.shape[2] * made.shape[2]
        x = next(array for array in inputs.values() if array.ndim == 3)
        matrices = {name: w for name, w in weights.items() if w.ndim == 2 and "gates" not in name}
        count = sum(2 * x.shape[1] * matrix.size for matrix in matrices.values())
        if self.name == "block":
            seen = len(inputs["kv_map"]) + inputs["cross_k"].shape[2]
            width = matrices["out.weight"].shape[0] // 2  # of the queries; the other half is text
            count += 4 * width * x.shape[1] * seen
        return count


def spy(pipeline):
    """A pipeline on the same engines, the operations by component, and what was given."""
    parts = "embed", "text_projection", "context", "block", "head"
    counts, outputs = dict.fromkeys(parts, 0), {}
    other, transformer = VideoPipeline(pipeline.bundle, threads=1), pipeline.transformer
    spies = {name: Spy(name, transformer.runners[name], counts, outputs) for name in parts}
    other.transformer = replace(transformer, runners={**transformer.runners, **spies})
    return other, counts, outputs


def run(bundle, policy, **settings):
    """Every prompt with a policy: the videos, and the operations."""
    pipeline, counts, _ = spy(VideoPipeline.from_bundle(bundle, threads=1))
    settings = {"policy": policy, "num_frames": 48, "note": ignore, **settings}
    videos = [
        pipeline.run(text, seed=SEED + number, **settings) for number, text in enumerate(TEXTS)
    ]
    return videos, sum(counts.values())


@pytest.fixture(scope="module")
def calibrated(bundle, prompts, tmp_path_factory):
    """A copy of the bundle with a preset, and what the command said."""
    copy = shutil.copytree(bundle, tmp_path_factory.mktemp("calibrated") / "magi.bundle")
    arguments = ["--prompts", prompts, "--target-speedup", 1.6, "--seed", SEED]
    return copy, invoke(main, copy, *SIZES, *WARMUP, *COARSE, *arguments)


def test_the_preset_saves_the_operations_that_it_says(calibrated):
    bundle, result = calibrated
    assert find_faults(bundle) == []
    preset = Bundle.open(bundle).manifest.presets["motioncache:calibrated"]
    policies = "none", "motioncache:calibrated"
    (_, uncached), (_, cached) = (run(bundle, policy, decode=False) for policy in policies)
    assert uncached / cached == pytest.approx(preset["reached"]["flops_speedup"], rel=1e-9)
    assert 1.6 <= uncached / cached < 1.7
    trials = [line.split() for line in result.stdout.splitlines()[1:-2]]
    assert len(trials) <= 10
    below = [float(speedup) for threshold, speedup, *_ in trials if float(speedup) < 1.6]
    assert below  # so the threshold is not simply a high one


def test_thresholds_are_the_same_number_and_nothing_is_fitted(calibrated):
    bundle, result = calibrated
    pipeline = VideoPipeline.from_bundle(bundle, threads=1)
    preset = pipeline.bundle.manifest.presets["motioncache:calibrated"]
    config = pipeline.find_policy("motioncache").config
    assert config.threshold == config.chunk_threshold == preset["options"]["threshold"] > 0
    assert (config.warmup_steps, config.coarse_steps) == (1, 5)
    assert "coefficients" not in preset["options"]
    assert (preset["family"], preset["steps"]) == ("magi", 16)
    assert "distances not rescaled" in preset["source"]
    assert "seeds 7 to 8; num_frames 48" in preset["source"]
    assert "Fit" not in result.stdout
    assert result.stderr.count("for the search") == len(TEXTS)
    assert result.stderr.count("special_tokens: expected a table") == 1


def test_mc_generate_runs_the_preset(calibrated, tmp_path):
    bundle, _ = calibrated
    file = tmp_path / "out.npz"
    choice = ["--policy", "motioncache:calibrated", "--prompt", TEXTS[0], "--seed", SEED]
    invoke(generate, bundle, *SIZES, *choice, "--save-latents", file)
    assert json.loads(file.with_suffix(".json").read_text())["preset"] == "calibrated"
    (video, _), _ = run(bundle, "motioncache:calibrated", decode=False)
    np.testing.assert_array_equal(np.load(file)["latents"], video.latents)
    assert {Mode.REUSE, Mode.PARTIAL, Mode.FULL} <= set(video.trace.mode.ravel().tolist())


def test_a_psnr_is_kept_in_the_frames(bundle, prompts, tmp_path):
    copy = shutil.copytree(bundle, tmp_path / "magi.bundle")
    arguments = ["--policy", "flowcache", "--prompts", prompts, "--seed", SEED]
    invoke(main, copy, *SIZES, *WARMUP, *arguments, "--target-psnr", 30)
    reached = Bundle.open(copy).manifest.presets["flowcache:calibrated"]["reached"]
    (before, uncached), (after, cached) = (run(copy, policy) for policy in ("none", "flowcache"))
    assert uncached / cached == pytest.approx(reached["flops_speedup"], rel=1e-9)
    assert reached["flops_speedup"] > 1
    scores = []
    for one, other in zip(before, after, strict=True):
        difference = one.frames.astype(float) - other.frames
        error = (difference**2).mean(axis=(1, 2, 3))
        scores.append((10 * np.log10(255**2 / error[error > 0])).mean())
    assert np.mean(scores) == pytest.approx(reached["psnr"], rel=1e-6)
    assert np.mean(scores) >= 30


def test_the_highest_threshold_is_what_the_embedded_latents_add_up_to(bundle):
    """FlowCache with its last step forced: steps 2 to 14 of a chunk count."""
    opened = VideoPipeline.from_bundle(bundle, threads=1)
    options = replace(opened.default_options, num_frames=48)
    reference = run_uncached(
        opened, {"prompt": TEXTS[0], "options": options, "decode": False, "note": ignore}
    )
    pipeline, _, outputs = spy(opened)
    policy = make_policy("flowcache", {"threshold": UNREACHED, "warmup_steps": 1}, "magi")
    trial = measure_trial(pipeline, policy, [reference])
    mode, plan = reference.video.trace.mode, opened.plan(options)
    embedded = iter(outputs["embed"])
    totals, before = np.zeros(2), {}
    for row, active in enumerate(plan.shape.active):
        for _ in np.flatnonzero((mode[row] == Mode.CLEAN).any(axis=0)):
            next(embedded)
        for chunk in np.flatnonzero(active).tolist():
            now = next(embedded)["x"].astype(np.float64)
            step = plan.matrices[0].step[row, chunk] - 1
            if 1 < step < 15:
                last = before[chunk]
                totals[chunk] += np.abs(now - last).mean() / np.abs(last).mean()
            before[chunk] = now
    assert next(embedded, None) is None
    assert trial.threshold == pytest.approx(1.01 * totals.max(), rel=1e-3)


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        ("whole", None),
        ("whole", {"threshold": 0.1, "chunk_threshold": 0.1}),
        ("whole", {"threshold": 0.2, "chunk_threshold": 0.2, "compat": "reference"}),
        (
            "whole",
            {
                "threshold": 0.2,
                "chunk_threshold": 0.2,
                "compat": replace(MAGI_FIXED, mix_own_chunk=False),
            },
        ),
        ("magi-b", None),
        ("magi-b", {"threshold": 0.1, "chunk_threshold": 0.1}),
    ],
)
def test_what_a_trace_counts_is_what_the_engines_were_given(bundle, export, case, rule):
    """Some passes over a few tokens begin a branch that has no keys of the chunk, so take all."""
    path = bundle if case == "whole" else export(GOLDEN / case, "magi")
    pipeline, counts, _ = spy(VideoPipeline.from_bundle(path, threads=1))
    steps = {"warmup_steps": 1, "coarse_steps": 5}
    policy = "none" if rule is None else make_policy("motioncache", steps | rule, "magi")
    text = pipeline.bundle.manifest.config["transformer"]["text_dim"]
    embeds = np.random.default_rng(0).standard_normal((1, 7, text), np.float32)
    trace = pipeline.run(
        prompt_embeds=embeds, policy=policy, decode=False, num_frames=72, note=ignore
    ).trace
    flops = ModelFlops.from_manifest(pipeline.bundle.manifest.config["transformer"])
    for padded in (True, False):
        work = count_work(flops, trace, padded=padded)
        assert work.to_json() == {
            "embed": counts["embed"],
            "text_projection": counts["text_projection"],
            "text_keys": counts["context"],
            "blocks": counts["block"],
            "head": counts["head"],
            "total": sum(counts.values()),
        }
    for modes in trace.mode[:, -1].T.tolist():  # of the branch that sees a chunk alone
        computed = [mode for mode in modes if mode in (Mode.PARTIAL, Mode.FULL)]
        assert computed[:1] in ([], [Mode.FULL])


def test_a_target_out_of_reach_leaves_the_bundle_as_it_was(bundle, prompts):
    before = (bundle / "manifest.json").read_bytes()
    arguments = [*SIZES, *WARMUP, *COARSE, "--prompts", prompts, "--target-speedup", 50]
    result = invoke(main, bundle, *arguments, code=2)
    assert "target speed-up: expected 50, got at most " in result.stderr
    assert (bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--policy", "teacache"],
            "policy: expected one of flowcache, motioncache for the family magi, got teacache. "
            "Choose one of these.",
        ),
        (
            ["--policy-option", "chunk_threshold=0.1"],
            "policy option chunk_threshold: expected none, as mc-calibrate finds it, got one. "
            "Leave it out.",
        ),
        (
            ["--policy-option", "coarse_updates=6"],
            "policy option: expected FIELD=VALUE with a field of threshold, chunk_threshold, "
            "warmup_steps, coarse_steps, weight_floor, weight_power, token_distance, "
            "first_reuse_cap, last_reuse_cap, vote_frames, compat, got 'coarse_updates=6'. Write "
            "it like threshold=0.1.",
        ),
        (
            ["--num-inference-steps", 4],
            "warmup_steps: expected at most 3 with 4 steps, as steps 0 to warmup_steps are "
            "computed in full, got 4. Lower it or raise num_inference_steps.",
        ),
        (
            ["--num-inference-steps", 4, *WARMUP],
            "num_inference_steps: expected at least 5, 3 more than the warm-up computes in full, "
            "got 4. Raise it or lower warmup_steps.",
        ),
        (
            WARMUP,
            "coarse_steps: expected at most 12 with 16 steps, so that tokens are chosen in one, "
            "got 20. Lower it by --policy-option, or take flowcache.",
        ),
        (
            ["--num-inference-steps", 10],
            "num_inference_steps: expected a multiple of 4, the chunks of a window, got 10. "
            "Use 8 or 12.",
        ),
        (
            ["--guidance-scale", 3],
            "guidance_scale: expected a setting of this model (num_frames, height, width, "
            "num_inference_steps, fps, seed, overlap_history, nearly_clean), got 3.0. Leave it "
            "out.",
        ),
        (
            ["--negative-prompt", "x"],
            "No such option '--negative-prompt'. Did you mean '--prompts'?",
        ),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_run(bundle, monkeypatch, arguments, message):
    for engine in ("text_encoder", "transformer", "decoder"):
        monkeypatch.setattr(VideoPipeline, engine, property(lambda *_: pytest.fail("was run")))
    before = (bundle / "manifest.json").read_bytes()
    assert invoke(main, bundle, *SIZES, *arguments, code=2).stderr.endswith(message + "\n")
    assert (bundle / "manifest.json").read_bytes() == before
