"""mc-calibrate: what it stores in a bundle, what it refuses before it runs, and what it says."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from mc_engines.bundle import Bundle
from mc_engines.bundle_additions import add_files
from mc_engines.verify import find_faults
from mc_runtime import calibrate_cli, calibration_job
from mc_runtime.calibrate_cli import PROMPTS, main
from mc_runtime.pipeline import VideoPipeline
from motioncache.presets import POLICIES, list_required

SIZES = (
    *("--height", 32, "--width", 32, "--num-frames", 37, "--base-num-frames", 37),
    *("--num-inference-steps", 8, "--ar-step", 2, "--threads", 1),
)
WARMUP = ("--policy-option", "warmup_steps=1")
QUICK = (*SIZES, *WARMUP, "--policy", "flowcache")


def calibrate(bundle, *arguments, code=0):
    result = CliRunner().invoke(main, [str(bundle), *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(tiny_bundle, tmp_path / "tiny.bundle")


@pytest.fixture
def two_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# what to show\na bird\n\na fish\n")
    return path


@pytest.fixture
def idle(monkeypatch):
    """Nothing may be run, neither the transformer nor the text encoder."""

    def fail(*arguments):
        raise AssertionError("an engine was asked for")

    for engine in ("text_encoder", "transformer", "decoder"):
        monkeypatch.setattr(VideoPipeline, engine, property(fail))


def refused(message, bundle, *arguments, code=2):
    before = (bundle / "manifest.json").read_bytes()
    assert calibrate(bundle, *arguments, code=code).stderr.endswith(message + "\n")
    assert (bundle / "manifest.json").read_bytes() == before


def add_preset(bundle, key):
    add_files(bundle, {}, lambda manifest: replace(manifest, presets={key: {"policy": "x"}}))


def remove_vae(bundle):
    def change(manifest):
        config = {name: part for name, part in manifest.config.items() if name != "vae"}
        return replace(manifest, config=config, missing=("vae",))

    add_files(bundle, {}, change)


def test_the_preset_is_found_and_reaches_its_target_again(bundle, two_prompts):
    before = Bundle.open(bundle)
    arguments = ("--prompts", two_prompts, "--target-speedup", 1.4, "--seed", 7)
    result = calibrate(bundle, *SIZES, *WARMUP, *arguments)
    assert find_faults(bundle) == []
    after = VideoPipeline.from_bundle(bundle, threads=1)
    assert after.bundle.model_hash == before.model_hash
    preset = after.bundle.manifest.presets["motioncache:calibrated"]
    policy = after.find_policy("motioncache")
    assert policy.preset == "calibrated"
    assert policy.config.warmup_steps == 1
    assert policy.config.threshold == preset["options"]["threshold"] > 0
    assert preset["origin"] == "calibrated"
    assert preset["reached"]["flops_speedup"] >= 1.4
    assert preset["reached"]["psnr"] > 0
    assert preset["reached"]["wall_ratio"] > 0
    for fact in (
        *("2 prompts, sha256 ", "seeds 7 to 8", "height 32, width 32", "num_inference_steps 8"),
        *("guidance_scale 6.0", "R-squared ", before.model_hash, "numpy ", "mc-calibrate"),
        *("policy motioncache, warmup_steps 1; ", "target speedup 1.4; "),
    ):
        assert fact in preset["source"]
    assert str(bundle.parent) not in preset["source"]
    assert "pytest" not in preset["source"]
    assert result.stdout.count("kept") == 1
    assert f"mc-generate {bundle} --policy motioncache:calibrated" in result.stdout
    assert "Uncached run 2 of 2, for the search" in result.stderr


def test_a_psnr_is_reached_by_the_fastest_trial_that_keeps_it(bundle, two_prompts):
    free = calibrate(bundle, *QUICK, "--prompts", two_prompts, "--target-psnr", 1, "--name", "free")
    assert len(free.stdout.splitlines()) == 5  # fit, head, one trial, kept, use
    presets = Bundle.open(bundle).manifest.presets
    fast = presets["flowcache:free"]["reached"]
    target = fast["psnr"] + 1
    result = calibrate(bundle, *QUICK, "--prompts", two_prompts, "--target-psnr", target)
    reached = Bundle.open(bundle).manifest.presets["flowcache:calibrated"]["reached"]
    assert reached["psnr"] >= target
    assert 1 < reached["flops_speedup"] < fast["flops_speedup"]
    trials = [line.split() for line in result.stdout.splitlines()[2:-2]]
    assert len(trials) <= 10
    kept = [float(speedup) for _, speedup, _, psnr, _ in trials if float(psnr) >= target]
    assert max(kept) == pytest.approx(reached["flops_speedup"], abs=0.006)
    assert set(Bundle.open(bundle).manifest.presets) == {"flowcache:free", "flowcache:calibrated"}


def test_the_search_uses_other_prompts_and_seeds_than_the_fit(bundle, monkeypatch):
    recorded, searched, measured = [], [], []
    record, measure = calibration_job.record_changes, calibration_job.measure_trial
    fit = calibration_job.fit_rescaling

    def note_record(pipeline, inputs, callback):
        recorded.append(record(pipeline, inputs, callback))
        return recorded[-1]

    def note_measure(pipeline, policy, references, callback):
        searched.append(references)
        return measure(pipeline, policy, references, callback)

    def note_fit(samples):
        measured.append(samples)
        return fit(samples)

    monkeypatch.setattr(calibration_job, "record_changes", note_record)
    monkeypatch.setattr(calibration_job, "measure_trial", note_measure)
    monkeypatch.setattr(calibration_job, "fit_rescaling", note_fit)
    calibrate(bundle, *QUICK, "--target-psnr", 1, "--guidance-scale", 1)
    runs, samples = zip(*recorded, strict=True)
    assert len(runs) == len(PROMPTS)
    assert searched == [[runs[1], runs[3], runs[5]]]
    assert len({run.inputs["options"].seed for run in runs}) == len(PROMPTS)
    assert len({run.inputs["prompt_embeds"].tobytes() for run in runs}) == len(PROMPTS)
    changes = [of_run.change[of_run.step > 1] for of_run in samples[::2]]
    np.testing.assert_array_equal(measured[0].change, np.concatenate(changes))


def test_given_coefficients_are_kept_and_every_prompt_serves_the_search(
    bundle, two_prompts, monkeypatch
):
    """With 0,1 every step counts 1: a chunk is computed in each threshold-th step."""
    monkeypatch.setattr(calibration_job, "record_changes", None)
    measure, searched = calibration_job.measure_trial, []

    def note_measure(pipeline, policy, references, callback):
        searched.append(len(references))
        return measure(pipeline, policy, references, callback)

    monkeypatch.setattr(calibration_job, "measure_trial", note_measure)
    chosen = "--policy-option", "coefficients=0,1", "--policy-option", "extrapolation=1"
    result = calibrate(bundle, *QUICK, *chosen, "--prompts", two_prompts, "--target-speedup", 1.3)
    assert "Fit" not in result.stdout and set(searched) == {2}
    preset = Bundle.open(bundle).manifest.presets["flowcache:calibrated"]
    assert preset["options"]["coefficients"] == [0.0, 1.0]
    assert preset["source"].endswith("coefficients given") and "for the fit" not in preset["source"]
    policy = VideoPipeline.from_bundle(bundle, threads=1).find_policy("flowcache")
    assert policy.config.threshold == preset["options"]["threshold"]
    assert policy.extrapolation == preset["options"]["extrapolation"] == pytest.approx(1)


def test_without_a_vae_a_speedup_is_reached_and_a_psnr_refused(bundle, two_prompts):
    remove_vae(bundle)
    refused(
        f"target PSNR: expected a bundle with a VAE, got {bundle} without one. "
        "Use --target-speedup, or export from a checkpoint that has a VAE.",
        *(bundle, *QUICK, "--target-psnr", 30),
    )
    calibrate(bundle, *QUICK, "--prompts", two_prompts, "--target-speedup", 1.3)
    reached = Bundle.open(bundle).manifest.presets["flowcache:calibrated"]["reached"]
    assert reached["psnr"] is None
    assert reached["flops_speedup"] >= 1.3


def test_a_target_out_of_reach_leaves_the_bundle_as_it_was(bundle, two_prompts):
    before = (bundle / "manifest.json").read_bytes()
    arguments = ("--prompts", two_prompts, "--target-speedup", 50)
    result = calibrate(bundle, *QUICK, *arguments, code=2)
    assert "target speed-up: expected 50, got at most " in result.stderr
    assert (bundle / "manifest.json").read_bytes() == before


def test_ctrl_c_leaves_the_bundle_as_it_was(bundle, two_prompts, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration_job, "measure_trial", interrupt)
    refused("Interrupted.", bundle, *QUICK, "--prompts", two_prompts, code=130)
    assert find_faults(bundle) == []


def test_a_poor_fit_is_told_and_quiet_tells_nothing(bundle, two_prompts, monkeypatch):
    monkeypatch.setattr(calibration_job, "measure_r_squared", lambda *_: 0.49)
    arguments = (*QUICK, "--prompts", two_prompts, "--target-psnr", 1)
    result = calibrate(bundle, *arguments)
    assert (
        "hardly do better than reuse at fixed intervals, which --policy-option coefficients=0,1"
        in result.stderr
    )
    assert "0.490 on 1 others." in result.stdout
    assert calibrate(bundle, *arguments, "--quiet", "--overwrite").stderr == ""


def test_a_preset_is_replaced_only_on_demand_damaged_or_not(bundle, two_prompts, monkeypatch):
    add_preset(bundle, "flowcache:calibrated")
    arguments = (*QUICK, "--prompts", two_prompts, "--target-psnr", 1)
    with monkeypatch.context() as context:
        context.setattr(calibration_job, "record_changes", None)
        refused(
            f"{bundle}: expected no preset flowcache:calibrated, got one. "
            "Replace it with --overwrite, or choose another --name.",
            *(bundle, *arguments),
        )
    calibrate(bundle, *arguments, "--overwrite")
    preset = json.loads((bundle / "manifest.json").read_text())["presets"]["flowcache:calibrated"]
    assert preset["policy"] == "flowcache"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--target-psnr", 30, "--target-speedup", 2),
            "Error: --target-psnr and --target-speedup: give one of them.",
        ),
        (("--target-psnr", 0), "target PSNR: expected more than 0 dB, got 0. Try 30."),
        (("--target-psnr", "nan"), "target PSNR: expected more than 0 dB, got nan. Try 30."),
        (("--target-speedup", 1), "target speed-up: expected more than 1, got 1. Try 2."),
        (("--target-speedup", "inf"), "target speed-up: expected more than 1, got inf. Try 2."),
        (
            ("--name", "a:b"),
            "name: expected letters, digits, '_', '-' and '.', got 'a:b'. Choose another name.",
        ),
        (
            ("--policy", "flowcache", "--name", "slow", "--overwrite"),
            "name: expected one that no published preset of flowcache has, got slow. "
            "Choose another name.",
        ),
        (("--height", 33), "height: expected a multiple of 16, got 33. Use 32 or 48."),
        (
            ("--prompts", "{file}"),
            "{file}: expected different prompts, one per line, at least 2, got 1. Write more.",
        ),
        (
            ("--policy", "none"),
            "policy: expected one of teacache, flowcache, motioncache for the family skyreels, "
            "got none. Choose one of these.",
        ),
        (
            ("--policy-option", "threshold=0.1"),
            "policy option threshold: expected none, as mc-calibrate finds it, got one. "
            "Leave it out.",
        ),
        (
            ("--num-inference-steps", 7),
            "num_inference_steps: expected at least 8, 3 more than the warm-up computes in full, "
            "got 7. Raise it or lower warmup_steps.",
        ),
        (
            ("--num-inference-steps", 3),
            "warmup_steps: expected at most 2 with 3 steps, as steps 0 to warmup_steps are "
            "computed in full, got 4. Lower it or raise num_inference_steps.",
        ),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_run(bundle, idle, tmp_path, arguments, message):
    file = tmp_path / "one.txt"
    file.write_text("a bird\n")
    refused(
        message.format(file=file),
        *(bundle, *SIZES, *(str(argument).format(file=file) for argument in arguments)),
    )


def test_a_read_only_bundle_is_refused_before_anything_is_run(bundle, idle, monkeypatch):
    monkeypatch.setattr(calibrate_cli.os, "access", lambda path, mode, **_: mode != os.W_OK)
    refused(
        f"{bundle}: expected a folder that can be written, got a read-only one. "
        "Calibrate a copy of the bundle.",
        *(bundle, *SIZES),
        code=1,
    )


def test_the_help_states_the_default_target_and_asks_for_a_small_size():
    text = " ".join(calibrate("--help").stdout.split())
    assert "computed from the traces. Default: 2." in text
    assert "Choose a small --height, --width and --num-frames" in text
    assert "[default: (50)]" in text


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family, known in POLICIES.items() for name in known if name != "none"],
)
def test_what_is_found_is_what_a_policy_has_no_default_for(family, name):
    """The coefficients are fitted; all else, which takes one searched number, are thresholds."""
    required = set(list_required(name, family))
    assert "threshold" in required
    assert required <= {"threshold", "coefficients", "chunk_threshold"}
