"""mc-bench run: a report that follows its schema, numbers that follow from samples, refusals."""

import json
import re
import shutil
import statistics
import sys
from dataclasses import asdict, fields, replace
from typing import ClassVar

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from mc_engines.bundle_additions import add_files
from mc_engines.errors import EngineError
from mc_runtime.bench import baseline, cli, policies, policy_report
from mc_runtime.bench.cli import main
from mc_runtime.bench.ending import Ending
from mc_runtime.bench.policies import Bench, Turn
from mc_runtime.bench.policy_page import render_page
from mc_runtime.bench.policy_report import BUSY_SPREAD
from mc_runtime.bench.schemas import read_schema
from mc_runtime.families.magi_schedule import MagiOptions
from mc_runtime.fidelity import compare_videos
from mc_runtime.flops import Job, ModelFlops, chunk_causal_work, count_work, vanilla_work
from mc_runtime.options import GenerationOptions
from motioncache import Preset

OPTIONS = GenerationOptions(num_frames=37, height=64, width=64, num_inference_steps=6, ar_step=2)
SIZES = ("--num-frames=37", "--height=64", "--width=64", "--num-inference-steps=6", "--ar-step=2")
PROMPTS = ("a bird", "a red circle")
FLOWCACHE = ("coefficients=1,0", "threshold=1.5", "warmup_steps=1")
# Token by token: the tiny model's motion is about the same everywhere.
MOTIONCACHE = (
    *("coefficients=1,0", "threshold=0.8", "warmup_steps=1", "coarse_updates=1"),
    *("vote_threshold=none", "min_update_ratio=0"),
)
POLICIES = (
    "--policies=motioncache,flowcache",
    *(f"--policy-option=flowcache.{pair}" for pair in FLOWCACHE),
    *(f"--policy-option=motioncache.{pair}" for pair in MOTIONCACHE),
)


class FakeLpips:
    """Stands for the graph: the distance is the mean difference."""

    def __init__(self, path, threads):
        assert path.read_text() == "graph"

    def distance(self, reference, test):
        return np.abs(reference.astype(np.float32) - test).mean(axis=(1, 2, 3))


def bench(bundle, *arguments, code=0):
    result = CliRunner().invoke(main, ["run", str(bundle), "--threads=1", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def measured(tiny_bundle, tmp_path_factory):
    """A folder with the report and the page of one benchmark, and what was printed."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "lpips.onnx").write_text("graph")
    outputs = ("-o", folder / "report.json", "--html", folder / "page.html")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "Lpips", FakeLpips)
        prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
        lpips = ("--lpips", folder / "lpips.onnx")
        result = bench(tiny_bundle, *POLICIES, *SIZES, *prompts, "--rounds=2", *lpips, *outputs)
    return folder, result


@pytest.fixture(scope="module")
def report(measured):
    return json.loads((measured[0] / "report.json").read_text())


def validate(report):
    jsonschema.validate(report, read_schema("policies"), cls=jsonschema.Draft202012Validator)


def test_the_report_follows_its_schema(report):
    jsonschema.Draft202012Validator.check_schema(read_schema("policies"))
    validate(report)
    assert not report["partial"]
    assert report["prompts"] == list(PROMPTS)
    assert report["settings"] == asdict(OPTIONS)
    assert report["environment"]["threads"] == 1
    assert report["environment"]["versions"]["numpy"] == np.__version__
    assert [entry["policy"] for entry in report["policies"]] == ["none", "motioncache", "flowcache"]


def objects(schema):
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield schema
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from objects(part)


def test_the_schema_is_strict(report):
    schema = read_schema("policies")
    for family, options in (("skyreels", GenerationOptions), ("magi", MagiOptions)):
        settings = schema["$defs"][f"settings_{family}"]["properties"]
        assert set(settings) == {entry.name for entry in fields(options)}
    free = [part for part in objects(schema) if part.get("additionalProperties") is not False]
    assert free == [schema["$defs"]["versions"]]
    closed = [part for part in objects(schema) if part not in free]
    assert [part for part in closed if set(part["required"]) != set(part["properties"])] == []
    policy = {**report["policies"][0], "extra": 1}
    with pytest.raises(jsonschema.ValidationError, match="extra"):
        validate(report | {"policies": [policy]})


def test_ratios_and_shares_follow_from_the_samples(report):
    median = statistics.median
    none = [sample["seconds"] for sample in report["policies"][0]["samples"]]
    for entry in report["policies"]:
        samples = entry["samples"]
        turns = [(sample["round"], sample["prompt"]) for sample in samples]
        assert turns == [(0, 0), (0, 1), (1, 0), (1, 1)]
        seconds = [sample["seconds"] for sample in samples]
        assert entry["median_seconds"] == median(seconds)
        assert entry["speedup"] == pytest.approx(median(none) / median(seconds))
        outside = [1 - sample["engine_seconds"] / sample["seconds"] for sample in samples]
        assert entry["outside_engines_share"] == pytest.approx(median(outside))
        decided = [sample["policy_seconds"] / sample["seconds"] for sample in samples]
        assert entry["policy_share"] == pytest.approx(median(decided))
    kernel = report["reference_kernel"]
    assert len(kernel["samples_ms"]) == 3 * 2 * 2 + 1
    assert kernel["spread"] == max(kernel["samples_ms"]) / min(kernel["samples_ms"])
    assert kernel["busy"] == (kernel["spread"] > kernel["limit"] == BUSY_SPREAD)


def test_flops_and_reuse_are_those_of_the_traces(report, tiny):
    flops = ModelFlops.from_manifest(tiny.bundle.manifest.config["transformer"])
    job = Job.from_plan(tiny.plan(OPTIONS), [512, 512])
    vanilla, causal = vanilla_work(flops, job), chunk_causal_work(flops, job)
    assert report["baseline_flops"] == {
        "every_chunk_every_row": vanilla.to_json(),
        "chunk_causal": causal.to_json(),
    }
    assert report["policies"][0]["flops"] == causal.to_json()
    for entry, options in zip(report["policies"], ((), MOTIONCACHE, FLOWCACHE), strict=True):
        policy = tiny.find_policy(entry["policy"], options)
        traces = [
            tiny.run(text, policy=policy, options=OPTIONS, decode=False).trace for text in PROMPTS
        ]
        totals = [count_work(flops, trace, padded=True).total for trace in traces]
        assert entry["flops"]["total"] == pytest.approx(sum(totals) / 2, rel=1e-9)
        ratio = entry["flops_ratio"]
        assert ratio["chunk_causal"] == causal.total / entry["flops"]["total"]
        assert ratio["every_chunk_every_row"] == vanilla.total / entry["flops"]["total"]
        masks = np.concatenate([trace.recompute.ravel() for trace in traces])
        assert entry["reuse_ratio"] == pytest.approx((masks == 0).sum() / (masks >= 0).sum())
        assert entry["padding_waste"] == 0  # the bundle has no buckets
    assert report["policies"][1]["reuse_ratio"] > 0


def test_padding_is_counted_as_waste(tiny, monkeypatch):
    """Every partial pass, as if the bundle had one bucket alone: the whole chunk."""
    monkeypatch.setattr(type(tiny.transformer), "bucket", lambda self, k, tokens: tokens * (k > 0))
    policy = tiny.find_policy("motioncache", MOTIONCACHE)
    wide = Bench(tiny, {"none": tiny.find_policy("none"), "wide": policy}, OPTIONS, ["a bird"], 1)
    report = cli._measure(wide, None, None, lambda _: None, Ending())
    trace = tiny.run("a bird", policy=policy, options=OPTIONS, decode=False).trace
    flops = ModelFlops.from_manifest(tiny.bundle.manifest.config["transformer"])
    asked, done = (count_work(flops, trace, padded=padded).total for padded in (False, True))
    assert report["policies"][1]["flops"]["total"] == done > asked
    assert report["policies"][1]["padding_waste"] == pytest.approx(1 - asked / done)


def test_scores_are_means_over_the_prompts(report):
    none, *others = (entry["fidelity"] for entry in report["policies"])
    assert none["mean"]["whole"] == {
        "identical": 74, "frames": 74, "psnr": None, "ssim": 1.0, "lpips": 0.0
    }  # fmt: skip
    for fidelity in others:
        for region in ("whole", "moving"):
            videos = [prompt["video"][region] for prompt in fidelity["prompts"]]
            for score in ("psnr", "ssim", "lpips"):
                mean = sum(video[score] for video in videos) / 2
                assert fidelity["mean"][region][score] == pytest.approx(mean)
        assert [len(prompt["chunks"]) for prompt in fidelity["prompts"]] == [2, 2]


def test_the_terminal_shows_every_policy_and_caveat(report, measured):
    shown = " ".join(measured[1].stdout.split())
    for title in ("time", "work, in FLOPs of a run", "fidelity to none"):
        assert title in shown
    for caveat in report["caveats"]:
        assert caveat in shown
    entry = report["policies"][1]
    assert f"motioncache {entry['median_seconds']:.3g} {entry['speedup']:.2f}" in shown
    assert max(map(len, measured[1].stdout.splitlines())) <= 100
    turns = [line for line in measured[1].stderr.splitlines() if line.startswith("turn ")]
    assert len(turns) == 12 and turns[-1].startswith("turn 2, prompt 2, none: ")


def test_the_page_needs_no_other_file(report, measured):
    page = (measured[0] / "page.html").read_text()
    assert page.startswith("<!doctype html>") and "<svg" in page
    assert re.findall(r"(?:src|href)=[\"'](?!#)|url\((?!#)|@import|<script", page) == []
    for text in (*PROMPTS, *report["caveats"], "motioncache", "threshold=0.8", "num_frames"):
        assert text in page
    assert render_page(report) == page


def run_quickly(bundle, tmp_path, *arguments):
    """One turn of `none`; return the report."""
    path = tmp_path / "report.json"
    bench(bundle, *SIZES, "--prompt=a", "--rounds=1", "--quiet", "-o", path, *arguments)
    report = json.loads(path.read_text())
    validate(report)
    return report


@pytest.mark.parametrize(("slow", "verdict"), [(1.2, "faster"), (1.4, None)])
def test_a_busy_machine_gets_no_verdict(tiny_bundle, tmp_path, monkeypatch, slow, verdict):
    samples = iter([10.0, 10.0 * slow, 10.0])
    monkeypatch.setattr(policies, "time_kernel", lambda: next(samples))
    ratios = {"none": 2.0, "flowcache": 1.0}
    monkeypatch.setattr(
        "mc_runtime.bench.policy_report._median",
        lambda turns: ratios[turns[0].trace.run["policy"]["name"]],
    )
    report = run_quickly(tiny_bundle, tmp_path, "--policies=flowcache", *POLICIES[1:4])
    assert report["policies"][1]["verdict"] == verdict
    said = [text for text in report["caveats"] if text.startswith("No verdict")]
    assert said == [
        "No verdict: the reference kernel varied by 1.40, more than 1.3; the machine is busy with "
        "something else."
    ] * (verdict is None)


@pytest.mark.parametrize(
    ("speedup", "spread", "verdict"),
    [
        *((1.2, 1.1, "faster"), (1.05, 1.1, "no difference"), (0.95, 1.1, "no difference")),
        *((0.8, 1.1, "slower"), (1.2, 1.3, "no difference"), (1.4, 1.3, "faster")),
        *((2.0, 1.31, None), (0.5, 1.31, None)),
    ],
)
def test_a_verdict_needs_more_than_the_machine_varies(speedup, spread, verdict):
    assert policy_report._judge_speed(speedup, spread) == verdict


def test_a_preset_for_other_steps_is_said_before_the_runs_and_in_the_report(tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    options = {"coefficients": (1.0, 0.0), "threshold": 1.5, "warmup_steps": 1}
    preset = Preset("flowcache", "long", options, "calibrated", "a test", steps=50)
    presets = {preset.key: preset.to_json()}
    add_files(bundle, {}, lambda manifest: replace(manifest, presets=presets))
    path = tmp_path / "report.json"
    arguments = ("--policies=flowcache:long", "--prompt=a", "--rounds=1", "-o", path)
    result = bench(bundle, *SIZES, *arguments)
    said = (
        "flowcache:long: expected 50 steps, for which the preset was made, got 6. "
        "Run mc-calibrate with these."
    )
    assert result.stderr.startswith(f"{said}\nturn 1")
    assert json.loads(path.read_text())["caveats"].count(said) == 1


def test_without_a_vae_there_are_no_frames_and_that_is_said_once(
    tiny_bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr(Bench, "decoder", None)
    report = run_quickly(tiny_bundle, tmp_path, "--html", tmp_path / "page.html")
    assert report["policies"][0]["fidelity"] is None
    said = [text for text in report["caveats"] if "VAE, so" in text or "LPIPS" in text]
    assert said == ["The bundle has no VAE, so there are no frames to compare."]
    assert "<svg" not in (tmp_path / "page.html").read_text()


def test_diffusers_runs_beside_the_policies(tiny_bundle, tiny_checkpoint, tmp_path):
    report = run_quickly(
        tiny_bundle, tmp_path, "--baseline=diffusers", "--checkpoint", tiny_checkpoint
    )
    theirs = report["diffusers"]
    difference = theirs["latents_max_difference"]
    assert difference <= 1e-3
    assert said_of_diffusers(report) == [ran_apart(difference)]
    assert theirs["none_fidelity"]["mean"]["whole"]["psnr"] > 60
    assert theirs["versions"]["diffusers"] == "0.42.1"
    none = report["policies"][0]["median_seconds"]
    assert theirs["none_speedup"] == theirs["median_seconds"] / none
    assert len(report["reference_kernel"]["samples_ms"]) == 3


def said_of_diffusers(report):
    return [text for text in report["caveats"] if "its by" in text or "checkpoint" in text]


def ran_apart(difference):
    return (
        "diffusers ran in a process of its own, in torch on the CPU; the latents of none differ "
        f"from its by at most {difference:.1e}."
    )


class AnotherModel:
    """Stands for diffusers on another checkpoint: its latents are the noise."""

    versions: ClassVar = {"diffusers": "0.42.1"}

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def contender(self, noise, embeddings):
        return lambda prompt, rows: Turn(prompt, 0, 1.0, [noise])

    def frames(self, prompt):
        return None


def test_diffusers_on_another_checkpoint_is_noticed(tiny, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "DiffusersProcess", AnotherModel)
    report = run_quickly(tiny_bundle, tmp_path, "--baseline=diffusers", "--checkpoint", tmp_path)
    ours = tiny.run("a", options=OPTIONS, decode=False).latents
    difference = float(np.abs(ours - tiny.draw_noise(OPTIONS)).max())
    assert report["diffusers"]["latents_max_difference"] == difference > 1e-3
    assert said_of_diffusers(report) == [
        ran_apart(difference),
        "A difference of more than 0.001 is no rounding: is it the checkpoint of this bundle?",
    ]


def test_without_torch_the_baseline_says_what_to_install(tiny_bundle, tiny_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    baseline = ("--baseline=diffusers", "--checkpoint", tiny_checkpoint)
    result = bench(tiny_bundle, *SIZES, "--prompt=a", *baseline, code=1)
    assert result.stderr == "torch: not installed. Run: pip install 'motioncache[export]'\n"


def test_a_process_that_ends_is_an_error_with_what_it_said(
    tiny_bundle, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(baseline, "MODULE", "mc_export.no_such_module")
    flags = ("--baseline=diffusers", "--checkpoint", tiny_checkpoint)
    result = bench(tiny_bundle, *SIZES, "--prompt=a", *flags, code=1)
    assert re.fullmatch(
        r"diffusers: expected an answer from its process, got: .+ No module named "
        r"mc_export.no_such_module. Check the checkpoint.\n",
        result.stderr,
    )


def test_an_error_of_the_process_is_passed_on(tiny_bundle, tmp_path):
    baseline = ("--baseline=diffusers", "--checkpoint", tmp_path / "x")
    result = bench(tiny_bundle, *SIZES, "--prompt=a", *baseline, code=1)
    assert result.stderr.startswith(f"{tmp_path / 'x'}: expected a diffusers folder")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--prompt=a", "--baseline=diffusers"),
            "--baseline and --checkpoint need each other. Give both or neither.",
        ),
        (
            ("--prompt=a", "--checkpoint=x"),
            "--baseline and --checkpoint need each other. Give both or neither.",
        ),
        ((), "Missing option '--prompt' or '--prompts'. Give one of them."),
        (
            ("--prompt=a", "--prompts={file}"),
            "Missing option '--prompt' or '--prompts'. Give one of them.",
        ),
        (
            ("--prompts={file}",),
            "{file}: expected different prompts, one per line, at least 1, got 0. Write more.",
        ),
        (
            ("--prompt=a", "--policies=flowcache,flowcache"),
            "policies: expected each once, got flowcache more than once. Leave it out.",
        ),
        (
            ("--prompt=a", *POLICIES, "--policy-option=motioncache.warmup_steps=6"),
            "warmup_steps: expected at most 5 with 6 steps, as steps 0 to warmup_steps are "
            "computed in full, got 6. Lower it or raise num_inference_steps.",
        ),
        (
            ("--prompt=a", "-o", "{new}", "--html", "{new}"),
            "{new}: expected a file of its own, got another output or an input. "
            "Choose another name.",
        ),
        (
            ("--prompts={file}", "-o", "{file}", "--overwrite"),
            "{file}: expected a file of its own, got another output or an input. "
            "Choose another name.",
        ),
        (
            ("--prompt=a", "--lpips={file}", "--html", "{file}", "--overwrite"),
            "{file}: expected a file of its own, got another output or an input. "
            "Choose another name.",
        ),
        (
            ("--prompt=a", "-o", "{file}"),
            "{file}: expected a new file, got one that exists. Pass --overwrite.",
        ),
        (
            ("--prompt=a", "--baseline=diffusers", "--checkpoint=x", "--sigma-table=skyreels"),
            "sigma_table: expected diffusers beside the baseline diffusers, got skyreels. "
            "Leave one of them out.",
        ),
    ],
)
def test_wrong_use_is_refused_before_anything_runs(
    arguments, message, tiny_bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr(cli, "encode_prompts", pytest.fail)
    (tmp_path / "file.txt").write_text("\n \n")
    words = {"file": tmp_path / "file.txt", "new": tmp_path / "new"}
    result = bench(tiny_bundle, *SIZES, *(text.format(**words) for text in arguments), code=2)
    assert result.stderr.endswith(message.format(**words) + "\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_frames_that_cannot_be_judged_are_refused_before_anything_runs(
    tiny_bundle, tmp_path, monkeypatch
):
    class Refusing(FakeLpips):
        def distance(self, reference, test):
            raise ValueError(f"frames: expected larger ones, got {reference.shape}.")

    monkeypatch.setattr(cli, "encode_prompts", pytest.fail)
    monkeypatch.setattr(cli, "Lpips", Refusing)
    (tmp_path / "lpips.onnx").write_text("graph")
    result = bench(tiny_bundle, *SIZES, "--prompt=a", "--lpips", tmp_path / "lpips.onnx", code=2)
    assert result.stderr == "frames: expected larger ones, got (1, 64, 64, 3).\n"


def test_prompts_come_from_the_lines_of_a_file(tiny_bundle, tmp_path):
    (tmp_path / "prompts.txt").write_text("grüner Vogel\n\n  a circle \n", encoding="utf-8")
    path = tmp_path / "report.json"
    file = ("--prompts", tmp_path / "prompts.txt")
    result = bench(tiny_bundle, *SIZES, *file, "--rounds=1", "--quiet", "-o", path)
    assert json.loads(path.read_text())["prompts"] == ["grüner Vogel", "a circle"]
    assert result.stderr == ""


def test_ctrl_c_before_a_policy_was_measured_writes_nothing(tiny_bundle, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "take_turns", interrupt)
    result = bench(tiny_bundle, *SIZES, "--prompt=a", "-o", tmp_path / "report.json", code=130)
    assert result.stderr == "Interrupted.\n"
    assert list(tmp_path.iterdir()) == []


def end_with(error, call, result=None):
    """Return a function that fails at its n-th call."""
    calls = 0

    def function(*_):
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return result

    return function


FLOWCACHED = ("--policies=flowcache", *POLICIES[1:4], "--prompt=a")


def end_early(bundle, tmp_path, code, *arguments):
    """Run until it is ended; return the report, its caveat, and what stderr said last."""
    path, page = tmp_path / "report.json", tmp_path / "page.html"
    result = bench(bundle, *SIZES, *arguments, "-o", path, "--html", page, code=code)
    report = json.loads(path.read_text())
    validate(report)
    (caveat,) = (text for text in report["caveats"] if text.startswith("Partial"))
    assert report["partial"] and caveat in page.read_text()
    assert caveat in " ".join(result.stdout.split())
    return report, caveat, result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "code", "said", "reason"),
    [
        (KeyboardInterrupt(), 130, "Interrupted.", "an interrupt"),
        (EngineError("block: expected x, got y."), 1, *2 * ["block: expected x, got y."]),
    ],
)
def test_what_was_measured_is_written_when_the_comparison_ends_early(
    tiny_bundle, tmp_path, monkeypatch, error, code, said, reason
):
    monkeypatch.setattr(policies, "time_kernel", end_with(error, 4, 10.0))
    report, caveat, last = end_early(tiny_bundle, tmp_path, code, *FLOWCACHED, "--rounds=3")
    assert last == said
    samples = {entry["policy"]: len(entry["samples"]) for entry in report["policies"]}
    assert samples == {"none": 1, "flowcache": 2}  # the second round begins with the second
    assert [entry["fidelity"] for entry in report["policies"]] == [None, None]
    assert caveat == (
        f"Partial: ended by {reason}. Turns of 3: none 1, flowcache 2; frames were compared of 0 "
        "of 1 prompts."
    )


def test_a_policy_without_a_turn_is_missing_in_what_ended_early(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "time_kernel", end_with(KeyboardInterrupt(), 2, 10.0))
    report, caveat, _ = end_early(tiny_bundle, tmp_path, 130, *FLOWCACHED, "--rounds=1")
    assert [entry["policy"] for entry in report["policies"]] == ["none"]
    assert report["reference_kernel"]["samples_ms"] == [10]
    assert "none 1, flowcache 0;" in caveat


def test_scores_of_a_prompt_are_kept_when_the_next_is_interrupted(
    tiny_bundle, tmp_path, monkeypatch
):
    calls = end_with(KeyboardInterrupt(), 4)  # a prompt has two videos
    monkeypatch.setattr(
        policies, "compare_videos", lambda *videos: calls() or compare_videos(*videos)
    )
    arguments = (*FLOWCACHED, "--prompt=b", "--rounds=1")
    report, caveat, _ = end_early(tiny_bundle, tmp_path, 130, *arguments)
    assert [len(entry["fidelity"]["prompts"]) for entry in report["policies"]] == [1, 1]
    assert caveat.endswith("frames were compared of 1 of 2 prompts.")


def test_diffusers_that_had_no_turn_is_missing_in_what_ended_early(
    tiny_bundle, tmp_path, monkeypatch
):
    monkeypatch.setattr(cli, "DiffusersProcess", AnotherModel)
    monkeypatch.setattr(policies, "time_kernel", end_with(KeyboardInterrupt(), 2, 10.0))
    baseline = ("--baseline=diffusers", "--checkpoint", tmp_path, "--prompt=a")
    report, caveat, _ = end_early(tiny_bundle, tmp_path, 130, *baseline)
    assert report["diffusers"] is None and "none 1, diffusers 0;" in caveat
    assert not any("pass --baseline" in text for text in report["caveats"])


def test_an_ended_comparison_is_of_the_turns_that_both_have():
    """The first prompt takes ten times the second."""
    none, other = (
        [Turn(prompt, number, seconds, ()) for prompt, number, seconds in turns]
        for turns in ([(0, 0, 10.0), (1, 0, 1.0), (1, 1, 1.0)], [(0, 0, 5.0), (0, 1, 99.0)])
    )
    assert policy_report._ratio(none, other) == 2
    assert policy_report._ratio(other, none) == pytest.approx(0.5)


def test_the_machine_is_described_before_it_is_measured(tiny_bundle, tmp_path, monkeypatch):
    def refuse(_):
        raise EngineError("machine: expected one, got none.")

    monkeypatch.setattr(cli, "describe_machine", refuse)
    monkeypatch.setattr(cli, "take_turns", pytest.fail)
    bench(tiny_bundle, *SIZES, "--prompt=a", code=1)
