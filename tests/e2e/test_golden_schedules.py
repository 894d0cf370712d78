"""The published schedule, decision by decision: what the published reference code computed.

tests/golden/README.md says which code that is. Its masks and latents cover MotionCache in one
window; tests/motioncache/test_reference_loops.py holds the other rules against plain loops.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from motioncache import DecisionTrace, make_policy, motion

CASES = {"skyreels-a": ("slow", "fast", "plain"), "skyreels-b": ("slow", "fast", "every")}
SETTINGS = [(case, name) for case, names in CASES.items() for name in names]
SHARE = 0.999  # of the active tokens, where a distance may lie within rounding of the threshold
TOLERANCE = 1e-3  # rounding alone leaves 5e-6

every_setting = pytest.mark.parametrize(("case", "name"), SETTINGS)


def settings_of(golden, name):
    """The configuration of a golden setting; tests/golden/README.md has the defaults."""
    given = json.loads((golden.checkpoint / "case.json").read_text())["caches"][name]
    return {
        "threshold": given["threshold"],
        "coefficients": tuple(given["coeff"]),
        "warmup_steps": given["warmup"],
        "coarse_updates": given["phase1"],
        "weight_floor": given.get("floor", 0.6),
        "vote_threshold": 0.5 if given.get("vote", True) else None,
        "min_update_ratio": given.get("min_ratio", 0.4),
        "compat": "reference",
    }


def generate(golden, policy):
    return golden.pipeline.run(options=golden.options, decode=False, policy=policy, **golden.inputs)


def equal_share(golden, name, policy):
    """Share of the active tokens whose decisions equal those of the reference."""
    expected = golden.expected[f"recompute_{name}"]
    found = generate(golden, policy).trace.recompute
    assert ((found >= 0) == (expected >= 0)).all()
    return (found == expected)[expected >= 0].mean()


@every_setting
def test_decisions_equal_the_published_ones(golden_case, case, name):
    golden = golden_case(case)
    policy = make_policy("motioncache", settings_of(golden, name))
    assert equal_share(golden, name, policy) >= SHARE


@every_setting
def test_with_the_published_masks_forced_the_latents_are_the_published_ones(
    golden_case, case, name
):
    golden = golden_case(case)
    masks = golden.expected[f"recompute_{name}"]
    trace = DecisionTrace.from_masks(masks, golden.options.causal_block_size, clean_pass=False)
    video = generate(golden, trace)
    assert np.abs(video.latents - golden.expected[f"latents_{name}"]).max() <= TOLERANCE
    np.testing.assert_array_equal(video.trace.recompute, masks)


def test_with_clean_passes_the_latents_are_others(golden_case):
    """The comparison above can fail: what the published code leaves out shows."""
    golden = golden_case("skyreels-a")
    masks = golden.expected["recompute_slow"]
    trace = DecisionTrace.from_masks(masks, golden.options.causal_block_size, clean_pass=True)
    error = np.abs(generate(golden, trace).latents - golden.expected["latents_slow"]).max()
    assert error > 2 * TOLERANCE


# Three ways to be wrong. Each must fail the share on some setting.


def fails_somewhere(golden_case, change):
    shares = []
    for case, name in SETTINGS:
        golden = golden_case(case)
        shares.append(equal_share(golden, name, change(settings_of(golden, name))))
    return min(shares) < SHARE


def test_to_recompute_always_would_be_noticed(golden_case):
    def change(settings):
        return make_policy("motioncache", settings | {"threshold": 0.0})

    assert fails_somewhere(golden_case, change)


def test_never_to_vote_would_be_noticed(golden_case):
    def change(settings):
        return make_policy("motioncache", settings | {"vote_threshold": None})

    assert fails_somewhere(golden_case, change)


def test_to_reset_on_hold_would_be_noticed(golden_case, monkeypatch):
    choose = motion._choose_tokens

    def forget(config, frames, accumulated):
        without_hold = choose(replace(config, min_update_ratio=0.0), frames, accumulated)
        chosen = choose(config, frames, accumulated)
        if without_hold.any() and not chosen.any():
            accumulated[without_hold] = 0  # not the state's own: only what follows is changed
        return chosen

    monkeypatch.setattr(motion, "_choose_tokens", forget)

    assert fails_somewhere(golden_case, lambda settings: make_policy("motioncache", settings))
