"""Finding a policy: names, presets, options, and what is refused."""

import json

import pytest

from motioncache import Preset, choose_policy, make_policy
from motioncache.flowcache import FlowCacheConfig
from motioncache.magi_motion import MagiMotionCacheConfig
from motioncache.motion import MotionCacheConfig
from motioncache.options import format_options, parse_options
from motioncache.presets import PUBLISHED, list_presets

SMALL = "skyreels-df-1.3b-540p"
LARGE = "skyreels-df-14b-540p", "skyreels-df-14b-720p"
# Of TeaCache 7c10efc, TeaCache4Wan2.1, teacache_generate.py, for e0 ("use_ret_steps").
WAN_1_3B = -5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2
WAN_14B = -3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1
HERE = {"threshold": 0.2, "coefficients": [2.0, 0.0]}
CALIBRATED = Preset("motioncache", "calibrated", HERE, "calibrated", "mc-calibrate")
STORED = {CALIBRATED.key: CALIBRATED.to_json()}


def choose(spec, *pairs, model=None, stored=(), family="skyreels"):
    return choose_policy(spec, pairs, family, model, dict(stored))


@pytest.mark.parametrize(("name", "threshold"), [("slow", 0.1), ("fast", 0.15)])
@pytest.mark.parametrize("model", [SMALL, *LARGE])
def test_flowcache_as_published(name, threshold, model):
    policy = choose(f"flowcache:{name}", model=model)
    assert policy.config.threshold == threshold
    assert policy.config.coefficients == (WAN_1_3B if model == SMALL else WAN_14B)
    # Five steps are computed first; nobody published a result for the large models.
    assert (policy.preset, policy.config.warmup_steps) == (name, 4)
    assert policy.made_for_steps == (50 if model == SMALL else None)


@pytest.mark.parametrize(("name", "threshold"), [("slow", 0.01), ("fast", 0.015)])
def test_flowcache_on_magi_as_published(name, threshold):
    policy = choose(f"flowcache:{name}", model="magi-4.5b-distill", family="magi")
    assert (policy.config.threshold, policy.config.warmup_steps) == (threshold, 4)
    assert policy.made_for_steps == 64


def test_motioncache_on_magi_as_published():
    config = choose("motioncache:published", model="magi-4.5b-distill", family="magi").config
    assert (config.chunk_threshold, config.threshold) == (0.0065, 0.0065)
    # warmup_steps 5 and chunk_wise_only_steps 20 of the published file
    assert (config.warmup_steps, config.coarse_end) == (4, 25)
    assert (config.weight_floor, config.weight_power, config.vote_frames) == (0.6, 1.0, None)
    assert (config.first_reuse_cap, config.last_reuse_cap) == (1, 1)


def test_motioncache_as_published():
    config = choose("motioncache:published", model=SMALL).config
    assert (config.threshold, config.warmup_steps, config.coarse_updates) == (0.1, 4, 6)
    assert (config.weight_floor, config.vote_threshold, config.min_update_ratio) == (0.6, 0.5, 0.4)
    assert config.coefficients == WAN_1_3B


def test_every_published_preset_makes_its_policy_and_says_its_source():
    assert len(PUBLISHED) == 8
    for preset in PUBLISHED:
        assert (preset.origin, preset.reached) == ("published", {})
        assert preset.source
        for model in preset.models:
            assert choose(preset.key, model=model, family=preset.family).name == preset.policy


def test_a_preset_survives_the_manifest():
    stored = json.loads(json.dumps(CALIBRATED.to_json()))
    assert json.loads(json.dumps(Preset.from_json(CALIBRATED.key, stored).to_json())) == stored
    config = choose("motioncache:calibrated", stored=STORED).config
    assert config == MotionCacheConfig(threshold=0.2, coefficients=(2.0, 0.0))


def test_without_a_name_the_calibrated_preset_is_taken_else_the_only_one():
    assert choose("motioncache", model=SMALL, stored=STORED.items()).preset == "calibrated"
    assert choose("motioncache", model=SMALL).preset == "published"
    assert choose("none").preset is None


def test_options_win_over_the_preset():
    pairs = "threshold=0.3", "vote_threshold=none", "coefficients=1,-2e-1", "compat=reference"
    policy = choose("motioncache:published", *pairs, model=SMALL)
    config = policy.config
    assert policy.preset == "published (changed)"
    assert (config.threshold, config.vote_threshold) == (0.3, None)
    assert (config.coefficients, config.compat) == ((1.0, -0.2), "reference")


def test_options_alone_are_enough():
    config = choose("flowcache", "threshold=0.1", "coefficients=1,0").config
    assert config == FlowCacheConfig(threshold=0.1, coefficients=(1.0, 0.0))


@pytest.mark.parametrize(
    "config",
    [
        FlowCacheConfig(threshold=1 / 3, coefficients=(-5.21862437e4, 1e-17)),
        MotionCacheConfig(threshold=0.1, coefficients=(1.0,), vote_threshold=None),
        MagiMotionCacheConfig(threshold=0.1, chunk_threshold=0.2),
        MagiMotionCacheConfig(
            threshold=0.1, chunk_threshold=0.2, token_distance=True, vote_frames=4
        ),
    ],
)
def test_options_round_trip(config):
    assert type(config)(**parse_options(type(config), format_options(config))) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"spec": "motion"},
            "policy: expected one of none, teacache, flowcache, motioncache, got motion. "
            "Write NAME or NAME:PRESET.",
        ),
        (
            {"spec": "teacache", "family": "magi"},
            "policy: expected one of none, flowcache, motioncache, got teacache. "
            "Write NAME or NAME:PRESET.",
        ),
        (
            {"spec": "flowcache:medium", "model": SMALL},
            "policy flowcache: expected a preset of this bundle (slow, fast), got medium. "
            "Run mc-calibrate BUNDLE to make one.",
        ),
        (
            {"spec": "motioncache:published"},
            "policy motioncache: expected a preset of this bundle (none), got published. It holds "
            f"for {SMALL} alone. Run mc-calibrate BUNDLE to make one.",
        ),
        (
            {"spec": "motioncache"},
            "policy motioncache: expected threshold and coefficients for this model, got none. Run "
            "mc-calibrate BUNDLE to measure them, or name a preset or --policy-option.",
        ),
        (
            {"spec": "flowcache", "model": SMALL},
            "policy flowcache: expected threshold and coefficients for this model, got none. Run "
            "mc-calibrate BUNDLE to measure them, or name a preset or --policy-option.",
        ),
        (
            {"spec": "motioncache:calibrated", "stored": STORED.items(), "family": "magi"},
            "preset motioncache:calibrated: expected one for the family magi, got one for "
            "skyreels. Run mc-calibrate on this bundle.",
        ),
    ],
)
def test_a_policy_that_cannot_be_made_is_refused(given, message):
    with pytest.raises(ValueError) as error:
        choose(given.pop("spec"), **given)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (
            "treshold=1",
            "policy option: expected FIELD=VALUE with a field of threshold, coefficients, "
            "warmup_steps, extrapolation, compat, got 'treshold=1'. Write it like threshold=0.1.",
        ),
        (
            "threshold",
            "policy option: expected FIELD=VALUE with a field of threshold, coefficients, "
            "warmup_steps, extrapolation, compat, got 'threshold'. Write it like threshold=0.1.",
        ),
        (
            "warmup_steps=2.5",
            "warmup_steps: expected a whole number, got '2.5'. Write warmup_steps= with one.",
        ),
        (
            "coefficients=1;2",
            "coefficients: expected numbers with commas between, got '1;2'. "
            "Write coefficients= with one.",
        ),
        (
            "compat=exact",
            "compat: expected fixed or reference, got 'exact'. Write compat= with one.",
        ),
    ],
)
def test_an_option_that_cannot_be_read_is_refused(pair, message):
    with pytest.raises(ValueError) as error:
        parse_options(FlowCacheConfig, [pair])
    assert str(error.value) == message


def test_an_option_without_a_policy_is_refused():
    with pytest.raises(ValueError) as error:
        choose("none", "threshold=0.1")
    assert str(error.value) == (
        "policy option: expected none, as this policy has no settings, got 'threshold=0.1'. "
        "Name another policy."
    )


def test_a_preset_that_cannot_be_read_spoils_no_other_policy():
    stored = {"motioncache:later": {"unknown": 1}}
    assert choose("none", stored=stored.items()).name == "none"
    assert choose("flowcache:slow", model=SMALL, stored=stored.items()).preset == "slow"
    with pytest.raises(ValueError, match="preset motioncache:later: expected the fields"):
        choose("motioncache:later", stored=stored.items())


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError) as error:
        make_policy("none", {"threshold": 1})
    assert str(error.value) == (
        "policy none: expected settings of none, got threshold. Leave them out."
    )


def test_a_damaged_preset_is_refused():
    with pytest.raises(ValueError) as error:
        list_presets(None, {"motioncache:calibrated": {"options": {}}})
    assert str(error.value).startswith("preset motioncache:calibrated: expected the fields of a")
