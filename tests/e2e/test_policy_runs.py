"""Policies in whole runs: what `fixed` mends, replays, buckets, two generations at once."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from mc_runtime.families import skyreels
from mc_runtime.flops import ModelFlops, count_work
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.sampler import sampler_step, sampler_table
from motioncache import DecisionTrace, Mode, Preset, make_policy
from motioncache.config import FIXED

OPTIONS = GenerationOptions(
    num_frames=57, height=32, width=48, num_inference_steps=10, base_num_frames=37, ar_step=3
)  # two windows; the second begins with a chunk of the first
RULE = {"threshold": 1.0, "coefficients": (1.0, 0.0)}
SETTINGS = {
    "teacache": RULE | {"warmup_steps": 1},
    "flowcache": RULE | {"warmup_steps": 1},
    "motioncache": RULE
    | {"warmup_steps": 1, "coarse_updates": 1, "vote_threshold": None, "min_update_ratio": 0.0}
    | {"weight_floor": 0.5},
}
SETTINGS["motioncache extrapolating"] = SETTINGS["motioncache"] | {"extrapolation": 0.5}
POLICIES = list(SETTINGS)


def make(name, **changes):
    return make_policy(name.partition(" ")[0], SETTINGS[name] | changes)


def generate(pipeline, policy, options=OPTIONS, prompt="a red circle"):
    return pipeline.run(prompt, policy=policy, options=options, decode=False)


@pytest.fixture(scope="module")
def uncached(tiny):
    return generate(tiny, "none")


@pytest.mark.parametrize("name", POLICIES)
def test_a_threshold_of_zero_is_the_uncached_run(tiny, uncached, name):
    video = generate(tiny, make(name, threshold=0.0))
    np.testing.assert_array_equal(video.latents, uncached.latents)
    assert video.trace.reused() == 0


@pytest.mark.parametrize("name", POLICIES)
def test_reuse_changes_what_comes_out_and_what_is_computed(tiny, uncached, name):
    video = generate(tiny, make(name))
    assert 0.1 < video.trace.reused() < 0.9
    assert 1e-4 < np.abs(video.latents - uncached.latents).max() < 3
    modes = set(np.unique(video.trace.mode))
    assert {Mode.REUSE, Mode.FULL, Mode.CLEAN} <= modes
    assert (Mode.PARTIAL in modes) == name.startswith("motioncache")


@pytest.mark.parametrize("name", POLICIES)
def test_a_replay_equals_the_recorded_run(tiny, tmp_path, name):
    recorded = generate(tiny, make(name))
    recorded.trace.save(tmp_path / "trace")
    again = generate(tiny, DecisionTrace.load(tmp_path / "trace"))
    np.testing.assert_array_equal(again.latents, recorded.latents)
    np.testing.assert_array_equal(again.trace.recompute, recorded.trace.recompute)
    np.testing.assert_array_equal(again.trace.mode, recorded.trace.mode)


@pytest.mark.parametrize("name", POLICIES)
def test_two_generations_at_once_equal_each_alone(tiny, name):
    policy = make(name)
    prompts = "a red circle", "a blue square races"
    alone = [generate(tiny, policy, prompt=prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda prompt: generate(tiny, policy, prompt=prompt), prompts))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)
        np.testing.assert_array_equal(one.trace.recompute, other.trace.recompute)


def test_a_chunk_without_a_residual_is_computed_even_if_its_row_is_reused(tiny):
    video = generate(tiny, make_policy("teacache", SETTINGS["teacache"] | {"threshold": 1e6}))
    first = video.trace.step == 1
    assert (video.trace.mode.swapaxes(1, 2)[first] == Mode.FULL).all()
    # Everything else after the two rows of each window's warm-up is reused.
    late = np.arange(len(first))[:, None] - np.repeat(video.trace.window_start, np.diff(
        [*video.trace.window_start, len(first)]))[:, None] > 1  # fmt: skip
    rest = (video.trace.step > 1) & late
    assert (video.trace.mode.swapaxes(1, 2)[rest] == Mode.REUSE).all()


def padded(pipeline):
    """The same engines, whose partial passes are padded up to the bundle's buckets."""
    other = VideoPipeline(pipeline.bundle, threads=1)
    transformer = pipeline.transformer
    other.transformer = replace(transformer, buckets=transformer.config.token_buckets)
    return other


def test_padding_up_to_buckets_changes_nothing_but_the_number_of_rows(tiny):
    recorded = generate(tiny, make_policy("motioncache", SETTINGS["motioncache"]))
    again = generate(padded(tiny), recorded.trace)
    np.testing.assert_allclose(again.latents, recorded.latents, atol=1e-5)
    asked = recorded.trace.bucket
    tokens = recorded.trace.recompute.shape[3]
    sizes = [0, *(int(np.ceil(share * tokens)) for share in (0.25, 0.4, 0.5, 0.75, 1))]
    expected = [min(size for size in sizes if size >= count) for count in asked.ravel()]
    np.testing.assert_array_equal(again.trace.bucket.ravel(), expected)
    partial = recorded.trace.mode == Mode.PARTIAL
    assert (again.trace.bucket[partial] > asked[partial]).any()


@pytest.mark.parametrize("name", ["motioncache", "motioncache extrapolating"])
def test_an_all_reuse_step_runs_no_block_and_a_partial_one_only_its_rows(tiny, name):
    """Nor does the head run for others where velocities are kept; and so it is counted."""
    calls = {"block": [], "head": []}

    class Counting:
        def __init__(self, component, rows):
            self.runner = tiny.transformer.runners[component]
            self.graph, self.calls, self.rows = self.runner.graph, calls[component], rows

        def run(self, inputs, weights=None):
            self.calls.append(inputs[self.rows].shape[1])
            return self.runner.run(inputs, weights)

    other = VideoPipeline(tiny.bundle, threads=1)
    counting = {"block": Counting("block", "x"), "head": Counting("head", "out")}
    runners = {**tiny.transformer.runners, **counting}
    other.transformer = replace(tiny.transformer, runners=runners)
    trace = generate(other, make(name)).trace
    layers = tiny.transformer.config.layers
    assert sorted(calls["block"]) == sorted(
        layers * [n for n in trace.bucket.ravel().tolist() if n]
    )
    assert (trace.mode == Mode.REUSE).any()
    flops = ModelFlops.from_manifest(tiny.bundle.manifest.config["transformer"])
    assert count_work(flops, trace, padded=True).head == flops.head(sum(calls["head"]))
    steps = ((trace.mode != Mode.IDLE) & (trace.mode != Mode.CLEAN)).sum()
    assert (len(calls["head"]) == steps) == (name == "motioncache")


# The switches that the loop follows.


def switched(**values):
    return make_policy(
        "motioncache", SETTINGS["motioncache"] | {"compat": replace(FIXED, **values)}
    )


def test_clean_pass(tiny):
    """Without it a finished chunk is not evaluated again; a prefix is in either case."""
    found = {value: generate(tiny, switched(clean_pass=value)) for value in (True, False)}
    clean = {value: video.trace.mode == Mode.CLEAN for value, video in found.items()}
    # Window 1: chunk 0 is clean once chunk 1 goes on without it. Window 2: chunk 0 is its prefix.
    assert [(row > 0, branch, chunk) for row, branch, chunk in np.argwhere(clean[True])] == [
        (True, 0, 0), (True, 1, 0), (True, 0, 0), (True, 1, 0),
    ]  # fmt: skip
    second = found[True].trace.window_start[1]
    assert np.argwhere(clean[False])[:, 0].tolist() == [second, second]
    assert np.abs(found[True].latents[:, :5] - found[False].latents[:, :5]).max() == 0
    assert np.abs(found[True].latents[:, 5:] - found[False].latents[:, 5:]).max() > 0


def expected_first_weights(pipeline):
    """Weights of the first frame behind the prefix as published, from captured block outputs.

    Its reference is the last frame of window 1's first chunk after that chunk's last step.
    """
    outs = []

    class Capturing:
        def __init__(self, runner):
            self.runner, self.graph = runner, runner.graph

        def run(self, inputs, weights=None):
            outs.append(inputs["out"][0].reshape(OPTIONS.causal_block_size, -1, 64))
            return self.runner.run(inputs, weights)

    other = VideoPipeline(pipeline.bundle, threads=1)
    head = Capturing(pipeline.transformer.runners["head"])
    other.transformer = replace(
        pipeline.transformer, runners={**pipeline.transformer.runners, "head": head}
    )
    trace = generate(other, switched(reset_history=False, latent_motion=False)).trace
    where = [
        (row, chunk, branch)
        for row, chunk in np.argwhere(trace.step > 0).tolist()
        for branch in range(2)
    ]  # the head runs in this order
    of = dict(zip(where, outs, strict=True))
    second = trace.window_start[1]
    last = max(row for row in range(second) if trace.step[row, 0])
    known = ~np.isnan(trace.weights[:, 0, 1, 0])
    first = next(row for row in range(second, len(known)) if known[row])
    before, now = of[last, 0, 0][-1], of[first, 1, 0][0]
    motion = np.abs(now - before).mean(-1) / np.abs(before).mean(-1)
    floor = SETTINGS["motioncache"]["weight_floor"]
    return floor + (1 - floor) * (motion - motion.min()) / (motion.max() - motion.min())


def test_reset_history(tiny):
    """With it the first frame behind a prefix is not compared with a frame of another window."""
    found = {
        value: generate(tiny, switched(reset_history=value, latent_motion=False)).trace
        for value in (True, False)
    }
    second = found[True].window_start[1]
    np.testing.assert_array_equal(found[True].weights[:second], found[False].weights[:second])
    tokens, frames = found[True].recompute.shape[3], OPTIONS.causal_block_size
    weights = {
        value: trace.weights[second:, 0, 1].reshape(-1, frames, tokens // frames)
        for value, trace in found.items()
    }
    known = ~np.isnan(weights[True][:, 0, 0]) & ~np.isnan(weights[False][:, 0, 0])
    first = int(np.flatnonzero(known)[0])
    # The motion of the first frame is that of the second, or of another window's last frame.
    np.testing.assert_array_equal(weights[True][first, 0], weights[True][first, 1])
    expected = expected_first_weights(tiny)
    assert np.abs(expected - weights[False][first, 1]).max() > 0.01
    np.testing.assert_allclose(weights[False][first, 0], expected, atol=2e-3)  # kept in float16
    np.testing.assert_array_equal(weights[True][first, 1:], weights[False][first, 1:])


def test_motion_against_its_formula(tiny):
    draw = np.random.default_rng(0)
    out = draw.normal(size=(1, 5 * 6, 64)).astype(np.float32)
    previous = draw.normal(size=(1, 6, 64)).astype(np.float32)
    frames = np.concatenate([previous, out[0].reshape(5, 6, 64)])
    expected = np.abs(np.diff(frames, axis=0)).mean(-1) / np.abs(frames[:-1]).mean(-1)
    found = tiny.transformer.motion(out, 5, previous)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    alone = tiny.transformer.motion(out, 5, None)
    np.testing.assert_allclose(alone[1:], expected[1:], rtol=1e-5)
    np.testing.assert_allclose(alone[0], expected[1], rtol=1e-5)


def test_motion_after_a_frame_of_zeros_is_finite(tiny):
    """The graph keeps the small number that the formula has beside the mean."""
    out, zeros = np.ones((1, 5 * 6, 64), np.float32), np.zeros((1, 6, 64), np.float32)
    found = tiny.transformer.motion(out, 5, zeros)
    np.testing.assert_allclose(found[0], 1e8, rtol=1e-5)
    assert not found[1:].any()


def test_a_trace_of_another_bundle_is_refused(tiny, golden_case):
    trace = generate(tiny, "none").trace
    with pytest.raises(ValueError) as error:
        golden_case("skyreels-a").pipeline.find_policy(trace)
    other = golden_case("skyreels-a").pipeline.bundle.model_hash
    assert str(error.value) == (
        f"trace: expected one of the bundle {other[:12]}, got one of "
        f"{tiny.bundle.model_hash[:12]}. Replay it on the bundle it was recorded with."
    )


def test_a_preset_in_the_manifest_does_not_change_the_model(tiny):
    preset = Preset("flowcache", "calibrated", RULE, "calibrated", "here")
    manifest = replace(tiny.bundle.manifest, presets={preset.key: preset.to_json()})
    bundle = replace(tiny.bundle, manifest=manifest)
    assert bundle.model_hash == tiny.bundle.model_hash
    assert VideoPipeline(bundle).find_policy("flowcache").preset == "calibrated"


def test_a_preset_for_other_steps_is_noted(tiny):
    rule = SETTINGS["flowcache"]
    preset = Preset("flowcache", "calibrated", rule, "calibrated", "here", steps=12)
    manifest = replace(tiny.bundle.manifest, presets={preset.key: preset.to_json()})
    pipeline, notes = VideoPipeline(replace(tiny.bundle, manifest=manifest), threads=1), []
    pipeline.generate("a", policy="flowcache", options=OPTIONS, decode=False, note=notes.append)
    assert notes == [
        "flowcache:calibrated: expected 12 steps, for which the preset was made, got 10. "
        "Run mc-calibrate with these."
    ]
    fitting = replace(OPTIONS, num_inference_steps=12)
    pipeline.generate("a", policy="flowcache", options=fitting, decode=False, note=notes.append)
    assert len(notes) == 1


def test_motion_of_the_very_first_step_counts_where_nothing_is_warmed_up(tiny):
    """W = 0 and K = 0: the first step is computed in full, and its motion weighs the second."""
    settings = SETTINGS["motioncache"] | {"warmup_steps": 0, "coarse_updates": 0}
    trace = generate(tiny, make_policy("motioncache", settings)).trace
    assert trace.step[0, 0] == 1
    assert not np.isnan(trace.weights[0, :, 0]).any()
    low, high = trace.accumulated[1, 0, 0, [0, 2]]
    assert low < high, "the second step is weighted"


def test_a_forced_last_step_is_no_choice(tiny):
    policy = make_policy("motioncache", SETTINGS["motioncache"] | {"threshold": 1e9})
    assert generate(tiny, policy).trace.reused() == 1


def test_weights_are_those_of_the_clean_latents_that_each_step_predicts(tiny, monkeypatch):
    """By hand from the samples and guided velocities that the sampler gets."""
    steps = []

    def record(table, state, velocity, latents):
        steps.append((velocity.copy(), latents.copy()))
        return sampler_step(table, state, velocity, latents)

    monkeypatch.setattr(skyreels, "sampler_step", record)
    trace = generate(tiny, make_policy("motioncache", SETTINGS["motioncache"])).trace
    sigmas = sampler_table(10, 8.0, "diffusers", "aliased").sigmas
    last, checked = {}, 0
    for row, chunk in np.argwhere(trace.step > 0):
        velocity, sample = steps.pop(0)
        if row in trace.window_start and chunk == (trace.step[row] > 0).argmax():
            last = {}  # a window forgets the one before
        clean = sample - sigmas[trace.step[row, chunk] - 1] * velocity
        weights = trace.weights[row, :, chunk]
        if np.isnan(weights[0]).all():
            continue
        before = last.get(chunk - 1)
        last[chunk] = clean[:, -1]
        for frame in range(5):
            pair = (clean[:, frame - 1] if frame else before), clean[:, frame]
            if pair[0] is None:
                pair = clean[:, 0], clean[:, 1]
            change = np.abs(pair[1] - pair[0]).reshape(16, 2, 2, 3, 2).mean(axis=(0, 2, 4)).ravel()
            share = (change - change.min()) / (change.max() - change.min() + 1e-8)
            for branch in weights:
                got = branch.reshape(5, -1)[frame]
                np.testing.assert_allclose(got, 0.5 + 0.5 * share, atol=2e-3)
                checked += 1
    assert not steps and checked > 50


def test_the_published_motion_is_a_switch(tiny):
    latents, output = (
        generate(tiny, switched(latent_motion=value)).trace.weights for value in (True, False)
    )
    assert np.array_equal(np.isnan(latents), np.isnan(output))
    known = ~np.isnan(latents)
    assert np.abs(latents[known] - output[known]).max() > 0.1
    np.testing.assert_array_equal(latents[:, 0], latents[:, 1])
    assert np.abs(output[:, 0] - output[:, 1])[known[:, 0]].max() > 0
