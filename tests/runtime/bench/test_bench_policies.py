"""What mc-bench runs: the policies asked for, in turns, on the same noise; and what it compares."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from mc_runtime.bench import policies
from mc_runtime.bench.policies import (
    Bench,
    Judgement,
    Turn,
    Turns,
    check_policies,
    choose_policies,
    judge_frames,
    policy_contender,
    take_turns,
)
from mc_runtime.options import GenerationOptions
from mc_runtime.prompts import encode_prompts

OPTIONS = GenerationOptions(num_frames=37, height=64, width=64, num_inference_steps=6, ar_step=2)
CACHED = ["flowcache.coefficients=1,0", "flowcache.threshold=1.5", "flowcache.warmup_steps=1"]


@pytest.fixture
def bench(tiny):
    policies = choose_policies(tiny, "flowcache,none", CACHED)
    return Bench(tiny, policies, OPTIONS, ["a bird", "a red circle"], 2)


def contenders_of(bench):
    embeddings = encode_prompts(bench.pipeline, bench.prompts, bench.options, pytest.fail)
    return {
        name: policy_contender(bench, policy, embeddings) for name, policy in bench.policies.items()
    }


def test_none_comes_first_and_options_reach_their_policies(tiny):
    pairs = ["motioncache.coefficients=1,0", "motioncache.threshold=0.1"]
    pairs += ["flowcache.coefficients=2,0", "flowcache.threshold=0.3"]
    policies = choose_policies(tiny, "motioncache,flowcache", pairs)
    assert list(policies) == ["none", "motioncache", "flowcache"]
    configs = [policies[name].config for name in ("motioncache", "flowcache")]
    assert [(config.threshold, config.coefficients) for config in configs] == [
        (0.1, (1, 0)),
        (0.3, (2, 0)),
    ]


def test_an_option_goes_to_one_preset_or_to_all_of_a_policy():
    asked = {}

    class Pipeline:
        def find_policy(self, spec, options):
            asked[spec] = options

    pairs = ["flowcache:fast.threshold=0.2", "flowcache.warmup_steps=3", "none.a=b.c"]
    choose_policies(Pipeline(), "flowcache:fast,flowcache:slow", pairs)
    assert asked == {
        "none": ["a=b.c"],
        "flowcache:fast": ["threshold=0.2", "warmup_steps=3"],
        "flowcache:slow": ["warmup_steps=3"],
    }


@pytest.mark.parametrize(
    ("text", "pairs", "message"),
    [
        (
            "flowcache,none,flowcache",
            [],
            "policies: expected each once, got flowcache more than once. Leave it out.",
        ),
        (
            "flocache",
            [],
            "policy: expected one of none, teacache, flowcache, motioncache, got flocache. "
            "Write NAME or NAME:PRESET.",
        ),
        (
            "teacache",
            ["flowcache.threshold=1"],
            "policy option: expected NAME.FIELD=VALUE with a NAME of none, teacache, got "
            "'flowcache.threshold=1'. Write it like motioncache.threshold=0.1.",
        ),
        (
            "teacache",
            ["teacache=0.1"],
            "policy option: expected NAME.FIELD=VALUE with a NAME of none, teacache, got "
            "'teacache=0.1'. Write it like motioncache.threshold=0.1.",
        ),
    ],
)
def test_policies_that_cannot_be_chosen_are_refused(tiny, text, pairs, message):
    with pytest.raises(ValueError) as caught:
        choose_policies(tiny, text, pairs)
    assert str(caught.value) == message


def test_a_warm_up_that_never_ends_is_refused_before_anything_runs(tiny, monkeypatch):
    monkeypatch.setattr(type(tiny.transformer), "encode_context", pytest.fail)
    pairs = ["flowcache.coefficients=1,0", "flowcache.threshold=0.1", "flowcache.warmup_steps=6"]
    bench = Bench(tiny, choose_policies(tiny, "flowcache", pairs), OPTIONS, ["a"], 1)
    with pytest.raises(ValueError) as caught:
        check_policies(bench, pytest.fail)
    assert str(caught.value).startswith("warmup_steps: expected at most 5 with 6 steps")


def test_a_preset_for_other_steps_is_said_once_and_not_by_its_turns(bench):
    made = replace(bench.policies["flowcache"], preset="slow", made_for_steps=50)
    bench, notes = replace(bench, policies=bench.policies | {"flowcache": made}), []
    check_policies(bench, notes.append)
    assert notes == [
        "flowcache:slow: expected 50 steps, for which the preset was made, got 6. "
        "Run mc-calibrate with these."
    ]
    with warnings.catch_warnings(action="error"):
        contenders_of(bench)["flowcache"](0, 1)


def fake(name, log):
    def run(prompt, rows):
        log.append((name, prompt, rows))
        return Turn(prompt, 0, 0.1, [f"{name}{prompt}"], "trace")

    return run


def test_each_repetition_begins_with_the_next_contender(monkeypatch):
    monkeypatch.setattr(policies, "REST_SECONDS", 0)
    log, seen, turns = [], [], Turns()
    contenders = {name: fake(name, log) for name in "abc"}
    take_turns(contenders, 2, 4, turns, lambda name, turn: seen.append(name))
    assert log[:3] == [(name, 0, policies.WARMUP_ROWS) for name in "abc"]
    order = ["".join(name for name, _, _ in log[3 + 6 * n :][:6]) for n in range(4)]
    assert order == ["abcabc", "bcabca", "cabcab", "abcabc"]
    assert [prompt for _, prompt, _ in log[3:9]] == [0, 0, 0, 1, 1, 1]
    assert seen == [name for name, _, _ in log[3:]]
    assert len(turns.reference_ms) == 4 * 6 + 1
    assert min(turns.reference_ms) > 0
    kept = [(turn.prompt, turn.round, turn.latents, turn.trace) for turn in turns.of["b"]]
    assert kept[:2] == [(0, 0, ["b0"], "trace"), (1, 0, ["b1"], "trace")]
    assert kept[2:] == [(prompt, number, (), None) for number in (1, 2, 3) for prompt in (0, 1)]


def test_turns_before_an_interrupt_are_kept(monkeypatch):
    monkeypatch.setattr(policies, "REST_SECONDS", 0)
    kernel = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(policies, "time_kernel", lambda: next(kernel))  # ends the fourth turn
    turns = Turns()
    with pytest.raises(StopIteration):
        take_turns({name: fake(name, []) for name in "ab"}, 2, 1, turns)
    assert {name: [turn.prompt for turn in own] for name, own in turns.of.items()} == {
        "a": [0, 1],
        "b": [0],
    }
    assert turns.reference_ms == [1, 2, 3] and turns.spread == 3


@pytest.mark.parametrize("guidance", [6.0, 1.0])
def test_a_turn_gives_what_the_pipeline_does(bench, tiny, guidance):
    options = replace(OPTIONS, guidance_scale=guidance)
    turn = contenders_of(replace(bench, options=options))["flowcache"](1, None)
    policy = bench.policies["flowcache"]
    expected = tiny.run("a red circle", policy=policy, options=options, decode=False)
    np.testing.assert_array_equal(np.concatenate(turn.latents, axis=1), expected.latents)
    np.testing.assert_array_equal(turn.trace.recompute, expected.trace.recompute)
    assert (turn.trace.recompute == 0).any()
    in_engines = turn.trace.engine_ms.sum(dtype=float) / 1e3
    assert turn.engine_seconds == pytest.approx(in_engines)
    assert 0 < turn.policy_seconds < turn.seconds - turn.engine_seconds


def test_a_warm_up_stops_after_its_rows(bench):
    turn = contenders_of(bench)["none"](0, 3)
    rows = np.flatnonzero((turn.trace.mode >= 0).any(axis=(1, 2)))
    assert rows.tolist() == [0, 1, 2]


def test_a_long_prompt_is_cut_and_that_is_said(bench):
    notes = []
    encode_prompts(bench.pipeline, ["a", "b" * 600], bench.options, notes.append)
    (note,) = notes
    assert note.startswith("prompt 2: expected at most 512 tokens, got 6")


def test_frames_are_held_against_those_of_none(bench, tiny):
    turns, judgement = Turns(), Judgement()
    take_turns(contenders_of(bench), 2, 1, turns)
    theirs = np.zeros((37, 64, 64, 3), np.uint8)
    judge_frames(bench, turns, judgement, None, [None, theirs].__getitem__)
    for prompt, text in enumerate(bench.prompts):
        none, cached = (
            tiny.run(text, policy=policy, options=OPTIONS).frames.astype(float)
            for policy in bench.policies.values()
        )
        same = judgement.of_policy("none")[prompt].video.whole
        assert (same.frames, same.identical, same.psnr, same.ssim) == (37, 37, None, 1)
        errors = ((none - cached) ** 2).mean(axis=(1, 2, 3))
        differ = errors > 0
        fidelity = judgement.of_policy("flowcache")[prompt]
        assert fidelity.video.whole.psnr == pytest.approx(
            (10 * np.log10(255**2 / errors[differ])).mean()
        )
        assert fidelity.video.whole.identical == (~differ).sum() < 37
        assert [chunk.whole.frames for chunk in fidelity.chunks] == [17, 20]
    (none_to_theirs,) = judgement.none_to_diffusers
    expected = (10 * np.log10(255**2 / (none**2).mean(axis=(1, 2, 3)))).mean()
    assert none_to_theirs.video.whole.psnr == pytest.approx(expected)
