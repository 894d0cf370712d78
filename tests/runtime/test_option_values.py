"""Kinds and bounds of settings, of both families: nothing wrong comes as far as the schedule."""

import re
from dataclasses import fields, replace

import numpy as np
import pytest
from magi_corrections import CONFIG

from mc_engines.published import PUBLISHED
from mc_runtime.families.magi_schedule import MagiOptions
from mc_runtime.families.registry import FAMILIES
from mc_runtime.option_values import check_values
from mc_runtime.options import GenerationOptions
from mc_runtime.schedule import validate_options

BOTH = [GenerationOptions(), MagiOptions()]
SETTINGS = [(options, entry.name) for options in BOTH for entry in fields(options)]


def test_a_published_model_may_want_other_settings_than_its_family():
    family, plain = FAMILIES["skyreels"], PUBLISHED["skyreels-df-1.3b-540p"]
    wanting = replace(plain, settings={"guidance_scale": 3.0})
    defaults = [family.defaults(family.published(model)) for model in (plain, wanting)]
    assert defaults[0] == GenerationOptions(height=544, width=960)
    assert defaults[1] == replace(defaults[0], guidance_scale=3.0)


def name_setting(value):
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize("options", BOTH, ids=name_setting)
def test_defaults_and_numbers_of_numpy_are_taken(options):
    check_values(options)
    check_values(replace(options, seed=np.int64(3), height=np.int32(64)))


@pytest.mark.parametrize(("options", "name"), SETTINGS, ids=name_setting)
@pytest.mark.parametrize("wrong", [None, "64 ", 2.5j, -1, [1]])
def test_every_setting_is_checked(options, name, wrong):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {re.escape(repr(wrong))}\. "):
        check_values(replace(options, **{name: wrong}))


@pytest.mark.parametrize(("options", "name"), SETTINGS, ids=name_setting)
def test_yes_is_no_number_and_one_is_not_yes(options, name):
    value = 1 if isinstance(getattr(options, name), bool) else True
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        check_values(replace(options, **{name: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": -24}, "num_frames: expected a whole number, got -24. Use 1 or more."),
        ({"seed": -1}, "seed: expected a whole number, got -1. Use 0 or more."),
        ({"height": 64.0}, "height: expected a whole number, got 64.0. Use 1 or more."),
        (
            {"num_inference_steps": 0},
            "num_inference_steps: expected a whole number, got 0. Use 1 to 1000.",
        ),
        ({"fps": 0}, "fps: expected a whole number, got 0. Use 1 or more."),
    ],
)
def test_both_families_refuse_with_the_same_words(changes, message):
    magi = FAMILIES["magi"]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        validate_options(replace(BOTH[0], **changes))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        magi.plan(replace(BOTH[1], **changes), 0, magi.grid(CONFIG), CONFIG)


def test_a_choice_names_the_others():
    message = "nearly_clean: expected True or False, got 'yes'. Use one of these."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_values(MagiOptions(nearly_clean="yes"))
