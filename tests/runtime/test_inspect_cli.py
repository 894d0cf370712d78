"""What mc-inspect prints and draws, and that it finds damage."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mc_engines.bundle import Bundle
from mc_engines.bundle_writer import BundleWriter
from mc_engines.manifest import Manifest
from mc_engines.specs import ComponentSpec, GraphSpec, TensorSpec
from mc_runtime.inspect_cli import main
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.schedule_table import forecast_schedule
from mc_runtime.trace_report import list_chunks, summarise
from mc_runtime.video import VideoWriter, read_frames
from motioncache import DecisionTrace

PARITY = [
    {"component": "block", "form": "fp32", "layer": layer, "output": output, "max_abs": error,
     "mean_abs": error / 10, "cosine": 1 - error, "scale": scale, "tolerance": 1e-4}
    for layer, output, error, scale in [
        (0, "y", 1e-5, 1.0), (1, "y", 2e-5, 1.0), (0, "k_new", 3e-5, 10.0)]
]  # fmt: skip


def tensors(form: str) -> GraphSpec:
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[form]
    return GraphSpec(
        f"onnx/block.{form}.onnx",
        inputs=(TensorSpec("x", dtype, (1, "K", 64)), TensorSpec("kv_map", "int32", ("M",))),
        outputs=(TensorSpec("y", dtype, (1, "K", 64)),),
        weights=(TensorSpec("w", dtype, (64, 64)),),
    )


@pytest.fixture
def path(tmp_path):
    files = {
        "onnx/block.fp32.onnx": 1500, "onnx/block.bf16.onnx": 2500, "onnx/head.fp32.onnx": 10,
        "onnx/head.onnx.data": 7000, "weights/block.00.safetensors": 40_000,
        "weights/block.01.safetensors": 40_000,
    }  # fmt: skip
    block = ComponentSpec(
        "block",
        {form: tensors(form) for form in ("fp32", "bf16")},
        ("weights/block.00.safetensors", "weights/block.01.safetensors"),
    )
    head = ComponentSpec("head", {"fp32": GraphSpec("onnx/head.fp32.onnx", (), ())})
    config = {"transformer": {"layers": 2, "patch_size": [1, 2, 2]}}
    with BundleWriter(tmp_path / "bundle") as writer:
        for file, size in files.items():
            (writer.folder / file).parent.mkdir(exist_ok=True)
            (writer.folder / file).write_bytes(bytes(size))
        (writer.folder / "reports").mkdir()
        (writer.folder / "reports/parity.json").write_text(json.dumps(PARITY))
        writer.finish(
            Manifest(
                "skyreels", "skyreels-df-1.3b-540p", "bfloat16", ("vae", "tokenizer"), config,
                {"block": block, "head": head}, {"fast": {}, "slow": {}}, tool_version="0.0.7",
            )
        )  # fmt: skip
    return tmp_path / "bundle"


def inspect(*arguments: object):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def rows(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines() if line.strip()]


def test_shows_what_the_bundle_is(path):
    result = inspect(path)
    assert (result.exit_code, result.stderr) == (0, "")
    shown = {row[0]: " ".join(row[1:]) for row in rows(result.stdout)}
    assert shown["family"] == "skyreels"
    assert shown["model"] == "skyreels-df-1.3b-540p"
    assert shown["weights"] == "bfloat16"
    assert shown["missing"] == "vae, tokenizer"
    assert shown["presets"] == "fast, slow"
    assert shown["files"].startswith("7, 9")  # 91 kB and the report
    assert shown["hash"] == Bundle.open(path).hash
    assert shown["transformer"] == "layers 2, patch_size [1, 2, 2]"
    assert "written by motioncache 0.0.7" in " ".join(result.stdout.split())


def test_shows_every_tensor_in_every_form(path):
    shown = rows(inspect(path).stdout)
    assert "block, 2 layers, 80.0 kB of weights".split() in shown
    assert "tensor shape fp32 (1.5 kB) bf16 (2.5 kB)".split() in shown
    assert "in x 1, K, 64 float32 bfloat16".split() in shown
    assert "in kv_map M int32 int32".split() in shown
    assert "out y 1, K, 64 float32 bfloat16".split() in shown
    assert "head, 7.0 kB of weights".split() in shown


def test_shows_the_worst_error_of_each_component(path):
    assert "block fp32 3 2e-05 0.0001 0.999970".split() in rows(inspect(path).stdout)


def test_quiet_shows_nothing(path):
    result = inspect(path, "--quiet", "--verify")
    assert (result.exit_code, result.output) == (0, "")


def test_json_is_the_manifest_with_its_sums(path):
    value = json.loads(inspect(path, "--json").stdout)
    bundle = Bundle.open(path)
    assert value["manifest"] == bundle.manifest.to_json()
    assert value["hash"] == bundle.hash
    assert value["total_files"] == 7
    report = (path / "reports/parity.json").stat().st_size
    assert value["total_bytes"] == 1500 + 2500 + 10 + 7000 + 80_000 + report
    assert value["weight_bytes"] == {"block": 80_000, "head": 7000}
    assert value["parity"] == PARITY


def test_a_bundle_without_a_report_has_none(tmp_path):
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.finish(Manifest("skyreels", None, "float32", (), {}, {}))
    result = inspect(tmp_path / "bundle")
    assert result.exit_code == 0
    assert "not a published configuration" in result.stdout
    assert "parity" not in result.stdout
    assert json.loads(inspect(tmp_path / "bundle", "--json").stdout)["parity"] == []


def test_verify_says_that_a_sound_bundle_is_sound(path):
    result = inspect(path, "--verify")
    assert result.exit_code == 0
    assert result.stdout.endswith("Verified: all 7 files are as the manifest says.\n")


def test_verify_lists_all_faults_and_exits_1(path):
    (path / "onnx/head.onnx.data").write_bytes(b"\1" + bytes(6999))
    (path / "weights/block.01.safetensors").unlink()
    (path / "foreign").touch()
    result = inspect(path, "--verify")
    assert (result.exit_code, result.stdout) == (1, "")
    faults = result.stderr.splitlines()
    assert len(faults) == 4
    assert "weights/block.01.safetensors: expected 40000 bytes, got no file." in faults[0]
    assert "onnx/head.onnx.data: expected sha256" in faults[1]
    assert "foreign: expected only files of the manifest, got another." in faults[2]
    assert faults[3] == f"{path}: faults found: 3."


def test_verify_as_json_lists_the_faults_for_programs(path):
    (path / "foreign").touch()
    result = inspect(path, "--verify", "--json")
    assert result.exit_code == 1
    faults = json.loads(result.stdout)["faults"]
    assert [fault.split(": ")[1] for fault in faults] == ["foreign"]


def test_a_damaged_bundle_is_not_shown(path):
    (path / "manifest.json").write_bytes(b"{}")
    for arguments in ([], ["--verify"], ["--json"]):
        result = inspect(path, *arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "manifest.sha256: expected '" in result.stderr


def test_no_bundle_is_a_failure_and_no_argument_wrong_usage(tmp_path):
    assert inspect(tmp_path / "none").exit_code == 1
    assert inspect().exit_code == 2


def test_names_with_the_signs_of_markup_are_shown_as_they_are(path):
    path.rename(path.parent / "[red]x")
    assert "[red]x" in inspect(path.parent / "[red]x").stdout


FLOWCACHE = (
    *("--policy", "flowcache", "--policy-option", "threshold=1.3"),
    *("--policy-option", "coefficients=1,-0.76", "--policy-option", "warmup_steps=2"),
)


def test_a_policy_shows_the_schedule(tiny, tiny_bundle):
    result = inspect(tiny_bundle, *FLOWCACHE, "--steps", 9, "--flow-shift", 5)
    assert result.exit_code == 0
    pairs = "threshold=1.3", "coefficients=1,-0.76", "warmup_steps=2"
    options = GenerationOptions(num_inference_steps=9, flow_shift=5.0)
    schedule = forecast_schedule(tiny, tiny.find_policy("flowcache", pairs), options)
    shown = rows(result.stdout)
    assert "step timestep distance rescaled accumulated decision".split() in shown
    for line in schedule.lines:
        assert " ".join(line.cells()).split() in shown
    totals = schedule.totals()
    assert result.stdout.endswith(
        f"Of 9 steps: {totals['full']} full, {totals['reuse']} reused, 0 not known before the run."
        "\n"
    )
    assert schedule.warning()
    assert result.stderr == f"{schedule.warning()}\n"


def test_the_schedule_as_json_is_the_same(tiny, tiny_bundle):
    result = inspect(tiny_bundle, "--policy", "none", "--json")
    schedule = forecast_schedule(tiny, tiny.find_policy("none"), GenerationOptions())
    assert json.loads(result.stdout) == json.loads(json.dumps(schedule.to_json()))


def test_rows_are_shown_where_a_policy_decides_by_rows(tiny_bundle):
    flags = [flag.replace("flowcache", "teacache") for flag in FLOWCACHE]
    shown = rows(inspect(tiny_bundle, *flags, "--steps", 6, "--num-frames", 57).stdout)
    assert "row step timestep distance rescaled accumulated decision".split() in shown
    assert [row[0] for row in shown[3:-1]] == [str(row) for row in range(16)]
    assert shown[3 + 5][1:3] == ["6", "1"]


def test_quiet_leaves_the_warning_of_a_schedule(tiny_bundle):
    result = inspect(tiny_bundle, *FLOWCACHE, "--quiet")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith("coefficients: expected rescaled distances of 0 or more")


def test_a_preset_made_for_other_steps_is_noted(tiny, tiny_bundle, monkeypatch):
    policy = replace(tiny.find_policy("none"), preset="slow", made_for_steps=50)
    monkeypatch.setattr(VideoPipeline, "find_policy", lambda *_: policy)
    for flag in ("--quiet", "--json"):
        result = inspect(tiny_bundle, "--policy", "none:slow", "--steps", 9, flag)
        assert result.stderr == (
            "none:slow: expected 50 steps, for which the preset was made, got 9. "
            "Run mc-calibrate with these.\n"
        )
    assert inspect(tiny_bundle, "--policy", "none:slow").stderr == ""


def save_run(pipeline, folder, policy) -> Path:
    """Write the trace of a run, its video where it says."""
    options = GenerationOptions(num_frames=37, height=32, width=48, num_inference_steps=6)
    video = pipeline.run("a bird", options=options, policy=policy)
    with VideoWriter(folder / "run.mp4", options.fps, options.width, options.height) as writer:
        writer.write(video.frames)
    video.trace.run["video"] = str(folder / "run.mp4")
    video.trace.save(folder / "run.trace")
    return folder / "run.trace"


@pytest.fixture(scope="module")
def traced(tiny, tmp_path_factory) -> Path:
    """The trace of a run that reused some steps."""
    pairs = "threshold=0.9", "coefficients=1,0", "warmup_steps=1"
    policy = tiny.find_policy("flowcache", pairs)
    return save_run(tiny, tmp_path_factory.mktemp("traced"), policy)


def test_a_trace_is_summed_up(traced, tiny_bundle):
    result = inspect("--trace", traced)
    assert (result.exit_code, result.stderr) == (0, "")
    summary = summarise(DecisionTrace.load(traced))
    shown = rows(result.stdout)
    counts = ", ".join(f"{count} {mode}" for mode, count in summary["passes"].items())
    assert ["passes", *counts.split()] in shown
    assert ["policy", "flowcache"] in shown
    for line in list_chunks(summary):
        assert " ".join(line).split() in shown
    assert inspect(tiny_bundle, "--trace", traced).stdout == result.stdout
    assert json.loads(inspect("--trace", traced, "--json").stdout) == summary


def test_a_trace_is_drawn(traced, tmp_path):
    page, painted = tmp_path / "report.html", tmp_path / "out.mp4"
    result = inspect("--trace", traced, "--html", page, "--overlay", painted, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and "Frames are missing" not in text
    assert len(list(read_frames(painted))) == 37
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "report.html"]


def test_the_trace_of_a_replay_is_shown_too(tiny, traced, tmp_path):
    trace = DecisionTrace.load(traced)
    masks = DecisionTrace.from_masks(trace.recompute, trace.run["frames"], clean_pass=True)
    for number, tape in enumerate((trace, masks)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = save_run(tiny, folder, tape)
        result = inspect(
            "--trace", path, "--html", folder / "a.html", "--overlay", folder / "a.mp4"
        )
        assert (result.exit_code, result.stderr) == (0, "")
        shown = rows(result.stdout)
        assert ["policy", "replay"] in shown
        assert "reused after the warm-up -".split() in shown
        passes = next(row for row in shown if row[0] == "passes")
        assert passes in rows(inspect("--trace", traced).stdout)
        assert "Frames are missing" not in (folder / "a.html").read_text()
        assert len(list(read_frames(folder / "a.mp4"))) == 37


def refused(message, *arguments, code=2):
    result = inspect(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.endswith(f"{message}\n")


def test_flags_want_the_one_they_belong_to(path, traced):
    for flag, value in (("--html", "a.html"), ("--overlay", "a.mp4"), ("--overwrite", None)):
        given = [flag] if value is None else [flag, value]
        refused(f"{flag}: expected with --trace, got it alone. Add it.", path, *given)
    for flag, value in (("--policy-option", "a=1"), ("--steps", "5"), ("--flow-shift", "5")):
        refused(f"{flag}: expected with --policy, got it alone. Add it.", path, flag, value)
    message = "--policy looks ahead, --trace back. Leave one of them out."
    refused(message, path, "--trace", traced, "--policy", "none")
    message = "Missing argument 'BUNDLE'. Name a bundle, or pass --trace or --doctor alone."
    refused(message, "--policy", "none")
    refused(message, "--trace", traced, "--verify")


def test_a_trace_of_another_bundle_is_refused(traced, tiny_bundle, path):
    expected, found = Bundle.open(path).model_hash[:12], Bundle.open(tiny_bundle).model_hash[:12]
    refused(
        f"{traced}: expected a trace of the bundle {expected}, got one of {found}. "
        "Name the bundle it was recorded with, or none.",
        path, "--trace", traced,
    )  # fmt: skip


def test_what_is_no_trace_of_a_run_is_refused(path, tmp_path):
    text = tmp_path / "text"
    text.write_text("no trace")
    refused("Pass a file that mc-generate --trace wrote.", "--trace", text)
    masks = DecisionTrace.from_masks(np.ones((2, 1, 1, 6), np.int8), 2, clean_pass=True)
    masks.save(tmp_path / "masks")
    refused(
        f"{tmp_path / 'masks'}: expected the trace of a run, got one without policy, grid, "
        "windows, options. Pass a file that mc-generate --trace wrote.",
        "--trace", tmp_path / "masks",
    )  # fmt: skip


def test_an_overlay_wants_the_video(traced, tmp_path):
    moved = tmp_path / "moved.trace"
    trace = DecisionTrace.load(traced)
    for recorded, got in (
        ("/nowhere/run.mp4", "/nowhere/run.mp4, which is not there"),
        (None, "none"),
    ):
        replace(trace, run={**trace.run, "video": recorded}).save(moved)
        refused(
            f"{moved}: expected the video of the run, got {got}. Pass --video FILE.",
            "--trace", moved, "--overlay", tmp_path / "out.mp4",
        )  # fmt: skip
    page = tmp_path / "report.html"
    assert inspect("--trace", moved, "--html", page).exit_code == 0
    assert "Frames are missing" in page.read_text()
    video = shutil.copy(traced.parent / "run.mp4", tmp_path / "elsewhere.mp4")
    drawn = ("--html", page, "--overlay", tmp_path / "out.mp4", "--overwrite")
    assert inspect("--trace", moved, "--video", video, *drawn).exit_code == 0
    assert "Frames are missing" not in page.read_text()
    assert (tmp_path / "out.mp4").exists()


def test_outputs_that_exist_are_kept(traced, tmp_path):
    for flag, name in (("--html", "a.html"), ("--overlay", "a.mp4")):
        output = tmp_path / name
        output.write_text("old")
        refused(
            f"{output}: expected a new file, got one that exists. Pass --overwrite.",
            "--trace", traced, flag, output,
        )  # fmt: skip
        assert output.read_text() == "old"
        assert inspect("--trace", traced, flag, output, "--overwrite").exit_code == 0
        assert output.read_bytes() != b"old"


def test_outputs_never_replace_an_input_or_each_other(traced, tmp_path):
    video, new = traced.parent / "run.mp4", tmp_path / "new"
    for taken, flags in (
        (traced, ("--html", traced)),
        (video, ("--overlay", video)),
        (new, ("--html", new, "--overlay", new)),
    ):
        refused(
            f"{taken}: expected a file of its own, got another output or an input. "
            "Choose another name.",
            "--trace", traced, "--overwrite", *flags,
        )  # fmt: skip
    assert not new.exists()
