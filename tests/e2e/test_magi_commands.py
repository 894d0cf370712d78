"""The commands on a bundle of MAGI-1: what they do, and how they refuse what is not there."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mc_runtime import generate_cli, inspect_cli
from motioncache import DecisionTrace, Mode

CASE = Path(__file__).parent.parent / "golden" / "magi-a"
RULE = {"threshold": 0.06, "chunk_threshold": 0.03, "warmup_steps": 1, "coarse_steps": 5}
POLICY = ["--policy", "motioncache"]
for setting in RULE.items():
    POLICY += ["--policy-option", "{}={}".format(*setting)]


@pytest.fixture(scope="module")
def bundle(export):
    return str(export(CASE, "magi"))


@pytest.fixture
def embeds(tmp_path):
    path = tmp_path / "embeds.npz"
    inputs = np.load(CASE / "inputs.npz")
    np.savez(path, prompt_embeds=inputs["caption_embs"][0][:, inputs["caption_mask"][0] > 0])
    return ["--prompt-embeds", str(path)]


def invoke(command, *arguments, code=0):
    result = CliRunner().invoke(command, [*map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def generate(bundle, *arguments, code=0):
    return invoke(generate_cli.main, bundle, *arguments, code=code)


def test_a_run_its_replay_and_its_repetition_are_the_same(bundle, embeds, tmp_path):
    first, second, third = (tmp_path / f"{name}.npz" for name in ("first", "second", "third"))
    trace = tmp_path / "run.trace"
    generate(bundle, *embeds, *POLICY, "--trace", trace, "--save-latents", first)
    generate(bundle, *embeds, "--replay", trace, "--save-latents", second)
    generate(bundle, "--repeat", first.with_suffix(".json"), "--save-latents", third)
    latents = [np.load(path)["latents"] for path in (first, second, third)]
    assert latents[0].shape == (8, 30, 8, 12)
    assert all(np.array_equal(latents[0], other) for other in latents)
    recorded = json.loads(first.with_suffix(".json").read_text())
    assert recorded["options"]["num_inference_steps"] == 16  # of the model
    mode = DecisionTrace.load(trace).mode
    assert {Mode.REUSE, Mode.PARTIAL, Mode.FULL, Mode.CLEAN} <= set(mode.ravel().tolist())


def test_latents_of_a_run_are_continued(bundle, embeds, tmp_path):
    """8 latent frames: a chunk, and the beginning of the next."""
    first, start, second, third = (tmp_path / f"{name}.npz" for name in "abcd")
    generate(bundle, *embeds, "--num-frames", 48, "--save-latents", first)
    given = np.load(first)["latents"][:, :8]
    np.savez(start, latents=given)
    generate(
        bundle, *embeds, "--prefix-latents", start, "--num-frames", 72, "--save-latents", second
    )
    generate(bundle, "--repeat", second.with_suffix(".json"), "--save-latents", third)
    latents = np.load(second)["latents"]
    assert latents.shape == (8, 18, 8, 12)
    np.testing.assert_array_equal(latents[:, :8], given)
    np.testing.assert_array_equal(np.load(third)["latents"], latents)
    arguments = "--prefix-latents", start, "--num-frames", 24, "--save-latents", tmp_path / "x.npz"
    result = generate(bundle, *embeds, *arguments, code=2)
    assert "video to continue: expected fewer frames than num_frames (24)" in result.stderr


def test_nearly_clean_guidance_can_be_switched_off(bundle, embeds, tmp_path):
    kept, dropped = tmp_path / "kept.npz", tmp_path / "dropped.npz"
    generate(bundle, *embeds, "--save-latents", kept)
    generate(bundle, *embeds, "--no-nearly-clean", "--save-latents", dropped)
    assert np.abs(np.load(kept)["latents"] - np.load(dropped)["latents"]).max() > 0.01


def test_without_special_tokens_a_run_says_so(bundle, embeds, tmp_path):
    result = generate(bundle, *embeds, "--save-latents", tmp_path / "x.npz")
    assert "special_tokens: expected a table in the bundle, got none." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--num-inference-steps", 10], "expected a multiple of 4, the chunks of a window, got 10"),
        (["--num-frames", 100], "num_frames: expected a multiple of 24, got 100. Use 96 or 120."),
        (["--height", 72], "height: expected a multiple of 16, got 72. Use 64 or 80."),
        (["--guidance-scale", 3], "guidance_scale: expected a setting of this model (num_frames,"),
        (["--negative-prompt", "x"], "negative_prompt: expected none, as MAGI-1 is guided away"),
        (["--policy", "teacache"], "policy: expected one of none, flowcache, motioncache, got"),
    ],
)
def test_what_cannot_be_generated_is_refused(bundle, embeds, tmp_path, arguments, problem):
    output = tmp_path / "x.npz"
    result = generate(bundle, *embeds, *arguments, "--save-latents", output, code=2)
    assert problem in result.stderr
    assert not output.exists()


def test_a_setting_of_this_family_is_none_of_the_other(tiny_bundle, tmp_path):
    command = ["--prompt", "x", "--no-nearly-clean", "--save-latents", tmp_path / "x.npz"]
    result = generate(str(tiny_bundle), *command, code=2)
    assert "nearly_clean: expected a setting of this model (num_frames, height," in result.stderr


def test_what_is_known_of_a_schedule_ends_with_the_warmup(bundle):
    result = invoke(inspect_cli.main, bundle, *POLICY, "--json")
    schedule = json.loads(result.stdout)
    decisions = [line["decision"] for line in schedule["lines"]]
    # steps 0 and 1, and the last, which is forced
    assert decisions == ["full"] * 2 + ["depends on content"] * 13 + ["full"]
    assert schedule["totals"]["not_known"] == 13


def test_without_a_policy_everything_is_known(bundle):
    result = invoke(inspect_cli.main, bundle, "--policy", "none", "--json")
    assert json.loads(result.stdout)["totals"] == {
        "steps": 16, "full": 16, "reuse": 0, "not_known": 0,
    }  # fmt: skip
