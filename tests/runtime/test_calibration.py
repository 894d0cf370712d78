"""Calibration: what is measured, against a loop over captured outputs; the fit, against numpy's;
the search, on functions whose answer is known.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc_runtime.calibration import (
    Samples,
    fit_rescaling,
    join_samples,
    measure_r_squared,
    record_changes,
    run_uncached,
)
from mc_runtime.flops import ModelFlops, count_work
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.sampler import sampler_table
from mc_runtime.threshold_search import (
    UNREACHED,
    Target,
    Trial,
    measure_trial,
    search_threshold,
)
from motioncache import make_policy

OPTIONS = GenerationOptions(
    num_frames=37, base_num_frames=37, height=32, width=32, num_inference_steps=6, ar_step=2
)
PUBLISHED = (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2)


def draw_inputs(options, seed=0, decode=False):
    draw = np.random.default_rng(seed)
    embeds = {"prompt_embeds": draw.standard_normal((1, 7, 48), np.float32)}
    if options.guidance_scale > 1:
        embeds["negative_prompt_embeds"] = draw.standard_normal((1, 5, 48), np.float32)
    return {"options": replace(options, seed=seed), "decode": decode, **embeds}


class Spy:
    """Shows the inputs of a runner before it runs."""

    def __init__(self, runner, show):
        self.runner, self.graph, self.show = runner, runner.graph, show

    def run(self, inputs, weights=None):
        self.show(inputs)
        return self.runner.run(inputs, weights)


def capture_outputs(pipeline, inputs):
    """Run once more and keep each output of the last block, with what else that block was given.

    Its angles tell the chunk of the window, the keys of the text the branch, and the modulation
    the step; so nothing is assumed of the order.
    """
    other, transformer = VideoPipeline(pipeline.bundle, threads=1), pipeline.transformer
    given, outs = {}, []

    def keep(inputs):
        place = given["cos"].tobytes(), given["cross_k"].tobytes()
        outs.append((place, given["modulation"], inputs["out"].copy()))

    spies = {
        "block": Spy(transformer.runners["block"], given.update),
        "head": Spy(transformer.runners["head"], keep),
    }
    other.transformer = replace(transformer, runners={**transformer.runners, **spies})
    other.run(**inputs)
    return outs


@pytest.mark.parametrize(
    ("frames", "guidance"), [(37, 6.0), (57, 1.0)], ids=["one window", "two windows, one branch"]
)
def test_changes_are_those_of_the_captured_outputs(tiny, frames, guidance):
    options = replace(OPTIONS, num_frames=frames, guidance_scale=guidance)
    inputs = draw_inputs(options)
    _, samples = record_changes(tiny, inputs)
    timesteps = sampler_table(6, 8.0, "diffusers", "aliased").timesteps
    e0 = tiny.transformer.encode_timesteps(timesteps, 24).modulation.astype(np.float64)
    before, expected = {}, []
    for place, modulation, out in capture_outputs(tiny, inputs):
        step = int(np.abs(e0 - modulation).sum(axis=(1, 2)).argmin())
        if step:
            now, last = e0[step], e0[step - 1]
            x = np.abs(now - last).mean() / np.abs(last).mean()
            last_step, last = before[place]
            assert last_step == step - 1
            expected.append((step, x, np.abs(out - last).mean() / np.abs(last).mean()))
        before[place] = step, out
    step, x, y = zip(*expected, strict=True)
    branches, chunks = 1 + (guidance > 1), (frames + 3) // 20
    assert len(step) == (6 - 1) * branches * chunks
    assert samples.step.tolist() == list(step)
    np.testing.assert_allclose(samples.distance, x, rtol=1e-6)
    np.testing.assert_allclose(samples.change, y, rtol=1e-5)
    assert len(np.unique(samples.change)) == len(y)


def test_measuring_changes_neither_the_run_nor_the_pipeline(tiny):
    inputs = draw_inputs(OPTIONS)
    transformer = tiny.transformer
    reference, _ = record_changes(tiny, inputs)
    assert tiny.transformer is transformer
    np.testing.assert_array_equal(reference.video.latents, tiny.run(**inputs).latents)


def draw_samples(coefficients, noise, steps=40, seed=0):
    draw = np.random.default_rng(seed)
    distances = draw.uniform(0.005, 0.1, steps)
    x = np.tile(distances, 12)
    y = np.polyval(coefficients, x) + noise * draw.standard_normal(x.shape)
    return Samples(np.tile(np.arange(1, steps + 1), 12), x, y)


@pytest.mark.parametrize(
    "coefficients",
    [(3.0, 0.1), (200.0, 3.0, 0.1), (9000.0, -700.0, 3.0, 0.1), PUBLISHED],
    ids=["1", "2", "3", "4"],
)
def test_the_fit_is_numpy_s_of_the_degree_that_made_the_data(coefficients):
    samples = draw_samples(coefficients, noise=0.002)
    fit = fit_rescaling(samples)
    assert fit.degree == len(coefficients) - 1
    expected = np.polyfit(samples.distance, samples.change, fit.degree)
    np.testing.assert_allclose(fit.coefficients, expected, rtol=1e-6)
    predicted = np.polyval(expected, samples.distance)
    correlation = np.corrcoef(predicted, samples.change)[0, 1]
    assert fit.r_squared == pytest.approx(correlation**2)  # so it is for least squares


@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])
def test_r_squared_is_the_share_of_the_variance_that_is_not_noise(noise):
    samples = draw_samples((3.0, 0.1), noise, steps=400)
    signal = np.var(3.0 * samples.distance)
    assert fit_rescaling(samples).r_squared == pytest.approx(signal / (signal + noise**2), abs=0.02)


def test_r_squared_on_other_samples_may_be_negative_and_is_0_without_any_change():
    steps = np.arange(1, 4)
    x, y = np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0, 3.0])
    assert measure_r_squared((10.0, 0.0), Samples(steps, x, y)) == pytest.approx(1)
    # 4 + 0 + 4 over 1 + 0 + 1
    assert measure_r_squared((-10.0, 4.0), Samples(steps, x, y)) == pytest.approx(-3)
    assert measure_r_squared((10.0, 0.0), Samples(steps, x, np.ones(3))) == 0


@given(st.lists(st.floats(0, 10), min_size=5, max_size=30))
def test_r_squared_of_a_fit_is_from_0_to_1(changes):
    y = np.array(changes)
    x = 0.01 + 0.01 * np.arange(len(y))
    assert -1e-9 <= fit_rescaling(Samples(np.arange(len(y)), x, y)).r_squared <= 1


def test_few_distances_carry_a_low_degree_or_none():
    samples = draw_samples(PUBLISHED, noise=0, steps=3)
    assert fit_rescaling(samples).degree == 1
    with pytest.raises(ValueError, match="got 2") as error:
        fit_rescaling(samples.after(1))
    assert str(error.value) == (
        "fit: expected at least 3 steps with different distances after the warm-up, got 2. "
        "Raise num_inference_steps, or lower warmup_steps."
    )


def test_samples_are_joined_and_cut_together():
    parts = [draw_samples((1.0, 0.0), noise=1, steps=5, seed=seed) for seed in (1, 2)]
    joined = join_samples(parts).after(3)
    assert joined.step.tolist() == [4, 5] * 24
    assert joined.distance[24:].tolist() == parts[1].distance[parts[1].step > 3].tolist()
    assert joined.change[24:].tolist() == parts[1].change[parts[1].step > 3].tolist()


class Curve:
    """Trials of a made-up model; speed-up and PSNR follow the threshold up to a bound."""

    def __init__(self, speedup=lambda t: 1 + t, psnr=lambda t: 50 - 10 * t, bound=3.0):
        self.speedup, self.psnr, self.tried, self.bound = speedup, psnr, [], bound

    def __call__(self, threshold):
        assert not self.tried or threshold < self.bound
        threshold = min(threshold, self.bound)
        self.tried.append(threshold)
        return Trial(threshold, self.speedup(threshold), 1.0, self.psnr(threshold))


@given(st.floats(1.01, 3.9))
def test_the_search_finds_the_least_threshold_of_a_speedup(speedup):
    curve = Curve()
    best, trials = search_threshold(curve, Target("speedup", speedup))
    assert speedup - 1 <= best.threshold <= speedup - 1 + 0.01
    assert [trial.threshold for trial in trials] == curve.tried
    assert len(curve.tried) <= 10


@given(st.floats(20.1, 49.9))
def test_the_search_finds_the_highest_speedup_of_a_psnr(decibels):
    best, trials = search_threshold(Curve(), Target("psnr", decibels))
    limit = (50 - decibels) / 10
    assert limit - 0.01 <= best.threshold <= limit
    assert len(trials) <= 10


def test_a_jump_is_not_looked_for_where_it_makes_no_difference():
    curve = Curve(speedup=lambda t: 1 + (t > 1.3))
    best, _ = search_threshold(curve, Target("speedup", 1.5))
    assert len(curve.tried) == 7  # 3 / 2^6 is less than 2 % of 3
    assert 1.3 < best.threshold < 1.36


def test_a_psnr_that_the_boldest_threshold_keeps_takes_one_trial():
    best, trials = search_threshold(Curve(), Target("psnr", 20))
    assert trials == [best]
    assert best.threshold == 3


def test_where_more_is_not_faster_the_best_trial_still_counts():
    curve = Curve(
        speedup=lambda t: {1.5: 3.0, 2.25: 2.5}.get(t, 2.0), psnr=lambda t: 30 - (t > 2.3)
    )
    best, _ = search_threshold(curve, Target("psnr", 30))
    assert best.speedup == pytest.approx(3)


def test_of_equally_fast_trials_the_nearest_to_the_uncached_run_is_taken():
    curve = Curve(speedup=lambda t: 2.0, psnr=lambda t: 31 + (t > 0.9) if t < 1 else 20)
    best, trials = search_threshold(curve, Target("psnr", 30))
    assert best.psnr == max(trial.psnr for trial in trials) == 32


def test_of_trials_that_are_fast_enough_the_nearest_to_the_uncached_run_is_taken():
    curve = Curve(psnr=lambda t: {1.5: 40}.get(t, 30))
    best, trials = search_threshold(curve, Target("speedup", 2.2))
    assert best.threshold == pytest.approx(1.5)
    assert min(trial.threshold for trial in trials if trial.speedup >= 2.2) < 1.3


def test_without_frames_the_least_threshold_of_a_speedup_is_taken():
    best, trials = search_threshold(Curve(psnr=lambda t: None), Target("speedup", 2.2))
    assert best.threshold == min(trial.threshold for trial in trials if trial.speedup >= 2.2)


def test_a_speedup_out_of_reach_says_what_was_reached():
    curve = Curve()
    with pytest.raises(ValueError, match="speed-up") as error:
        search_threshold(curve, Target("speedup", 5))
    assert curve.tried == [3.0]
    assert str(error.value) == (
        "target speed-up: expected 5, got at most 4.00 with threshold 3. "
        "Lower the target or warmup_steps, or raise num_inference_steps."
    )


def test_a_psnr_out_of_reach_says_what_was_reached():
    curve = Curve(
        speedup=lambda t: 1 + (t > 0.1), psnr=lambda t: 45 - t if t > 0.1 else 70, bound=4.0
    )
    with pytest.raises(ValueError, match="PSNR") as error:
        search_threshold(curve, Target("psnr", 60))
    assert min(curve.tried) < 0.1
    assert str(error.value) == (
        "target PSNR: expected 60 dB with some work saved, got at most 44.88 dB with threshold "
        "0.125, speed-up 2.00. Lower the target, or raise warmup_steps or num_inference_steps."
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [("teacache", {}), ("motioncache", {"compat": "reference"})],
    ids=["by row", "by chunk"],
)
def test_a_threshold_that_nothing_reaches_becomes_the_lowest_of_that_kind(tiny, name, options):
    """The last step is not forced in these policies, so that all distances are added up."""
    settings = {"warmup_steps": 1, "coefficients": (2.0, 0.1), **options}
    references = [run_uncached(tiny, draw_inputs(OPTIONS))]

    def measure(threshold):
        policy = make_policy(name, {**settings, "threshold": threshold})
        return measure_trial(tiny, policy, references)

    timesteps = sampler_table(6, 8.0, "diffusers", "aliased").timesteps
    e0 = tiny.transformer.encode_timesteps(timesteps, 24).modulation.astype(np.float64)
    change, scale = np.abs(np.diff(e0, axis=0)).mean((1, 2)), np.abs(e0[:-1]).mean((1, 2))
    matrix = tiny.plan(OPTIONS).matrices[0]
    taken = [step[update] - 2 for step, update in zip(matrix.step, matrix.update, strict=True)]
    if name == "motioncache":
        taken = [[step] for step in range(-1, 5)]
    moved = [[step for step in steps if step >= 0] for steps in taken[2:]]  # after the warm-up
    highest = sum(2 * change[steps].sum() / scale[steps].sum() + 0.1 for steps in moved)
    unreached, lower = measure(UNREACHED), measure(0.98 * 1.01 * highest)
    assert unreached.threshold == pytest.approx(1.01 * highest, rel=1e-3)
    assert measure(unreached.threshold).speedup == unreached.speedup
    assert lower.speedup < unreached.speedup
    assert lower.threshold == pytest.approx(0.98 * 1.01 * highest)


def test_a_trial_compares_work_time_and_frames(tiny):
    references = [run_uncached(tiny, draw_inputs(OPTIONS, seed, decode=True)) for seed in (1, 2)]
    settings = {"warmup_steps": 1, "coefficients": (1.0, 0.0)}
    policy = make_policy("flowcache", {**settings, "threshold": 100.0})
    trial = measure_trial(tiny, policy, references)
    flops = ModelFlops.from_manifest(tiny.bundle.manifest.config["transformer"])
    works, errors = np.zeros(2), []
    for reference in references:
        video = tiny.run(**reference.inputs, policy=policy)
        pair = reference.video, video
        works += [count_work(flops, run.trace, padded=True).total for run in pair]
        difference = reference.video.frames.astype(float) - video.frames
        per_frame = (difference**2).mean(axis=(1, 2, 3))
        errors.append((10 * np.log10(255**2 / per_frame[per_frame > 0])).mean())
    assert trial.threshold < 10  # nothing comes near 100
    assert trial.speedup == pytest.approx(works[0] / works[1])
    assert trial.speedup > 1.3
    assert trial.psnr == pytest.approx(np.mean(errors))
    assert trial.wall_ratio > 0


def test_threshold_0_changes_nothing_and_runs_without_frames_have_no_psnr(tiny):
    settings = {"threshold": 0.0, "coefficients": (1.0, 0.0), "warmup_steps": 1}
    policy = make_policy("motioncache", settings)
    for decode, psnr in ((True, np.inf), (False, None)):
        reference = run_uncached(tiny, draw_inputs(OPTIONS, decode=decode))
        trial = measure_trial(tiny, policy, [reference])
        assert (trial.speedup, trial.psnr) == (1, psnr)
