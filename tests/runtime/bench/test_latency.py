"""`mc-bench run --engines` and `--generation`, and `compare`: on a tiny bundle, by planting."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from mc_runtime.bench import generation, latency_cli, sweep
from mc_runtime.bench.cli import main
from mc_runtime.bench.compare import compare_reports
from mc_runtime.bench.machine import Monitor
from mc_runtime.bench.schemas import read_schema
from mc_runtime.bench.sweep import Case, Sweep, list_cases, take_rounds
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline

SIZES = ("--height=64", "--width=64", "--num-frames=37", "--num-inference-steps=4", "--threads=1")
MOTIONCACHE = tuple(
    f"--policy-option=motioncache.{option}"
    for option in ("coefficients=1,0", "threshold=100", "warmup_steps=1")
)


def bench(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture(scope="module")
def engines(tiny_bundle, tmp_path_factory) -> dict:
    """A report of the engines of the tiny bundle."""
    folder = tmp_path_factory.mktemp("latency")
    output = folder / "engines.json"
    text = bench("run", tiny_bundle, "--engines", "--quick", *SIZES, "-o", output,
                 "--html", folder / "engines.html")  # fmt: skip
    assert "full pass, chunk 1 (cpu)" in " ".join(text.split())
    page = (folder / "engines.html").read_text()
    assert page.count("<svg") == 1 and "reuse step (cpu)" in page
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def generated(tiny_bundle, tmp_path_factory) -> dict:
    """A report of whole generations with the tiny bundle."""
    folder = tmp_path_factory.mktemp("latency")
    output = folder / "generation.json"
    bench("run", tiny_bundle, "--generation", "--rounds=2", "--policies=motioncache", *MOTIONCACHE,
          "--prompt=a", *SIZES, "-o", output, "--html", folder / "page.html")  # fmt: skip
    assert (folder / "page.html").read_text().count("<svg") == 1
    return json.loads(output.read_text())


def validate(report: dict) -> None:
    schema = read_schema("latency")
    jsonschema.validate(report, schema, cls=jsonschema.Draft202012Validator)


def test_the_schema_is_one_and_refuses_what_it_does_not_name(engines) -> None:
    jsonschema.Draft202012Validator.check_schema(read_schema("latency"))
    validate(engines)
    with pytest.raises(jsonschema.ValidationError):
        validate(engines | {"extra": 1})


def test_every_kind_of_pass_is_timed_at_every_place(engines) -> None:
    by_name = {entry["name"]: entry for entry in engines["engines"]}
    assert {"full pass, chunk 1", "full pass, chunk 2", "reuse step"} <= {*by_name}
    assert {"keys of a prompt", "text encoder", "VAE decoder, a latent frame"} <= {*by_name}
    tokens = 5 * 4 * 4
    first, last = by_name["full pass, chunk 1"], by_name["full pass, chunk 2"]
    assert (first["tokens"], first["keys"], last["keys"]) == (tokens, tokens, 2 * tokens)
    half = by_name["50% of the tokens, chunk 2"]
    assert (half["tokens"], half["keys"]) == (tokens // 2, 2 * tokens)
    assert by_name["reuse step"]["tokens"] == 0
    for entry in engines["engines"]:
        assert len(entry["samples_ms"]) == len(entry["reference_ms"]) == 5
        assert len(entry["warmup_ms"]) == sweep.WARMUP_ROUNDS
        assert entry["latency_ms"]["p50"] == pytest.approx(np.median(entry["samples_ms"]))


def test_a_generation_says_when_chunks_come_and_what_they_take(generated) -> None:
    validate(generated)
    none, cached = generated["generation"]
    assert (none["policy"], cached["policy"]) == ("none", "motioncache")
    for entry in (none, cached):
        assert [len(chunks) for chunks in entry["chunks_ms"]] == [2, 2]
        for chunks, total in zip(entry["chunks_ms"], entry["samples_ms"], strict=True):
            assert sum(chunks) == pytest.approx(total)
        seconds = np.median(entry["samples_ms"]) / 1e3
        assert entry["frames_per_second"] == pytest.approx(37 / seconds)
        assert entry["realtime_factor"] == pytest.approx(seconds / (37 / 24))
        peaks = entry["peak_bytes"]
        assert peaks["anonymous"] > 2e7 and peaks["mapped"] > 1e6
        assert peaks["total"] <= peaks["anonymous"] + peaks["mapped"] + peaks["shared"]
    assert none["reuse_ratio"] == 0 < cached["reuse_ratio"]
    assert none["flops"] > cached["flops"]


def test_an_interrupt_leaves_what_was_measured(tiny_bundle, tmp_path: Path, monkeypatch) -> None:
    calls = 0

    def take(cases, rounds, taken, advance):
        def count():
            nonlocal calls
            calls += 1
            if calls == 3 * len(cases) + 2:  # two warm-ups, a round and two calls of the next
                raise KeyboardInterrupt
            advance()

        take_rounds(cases, rounds, taken, count)

    monkeypatch.setattr(latency_cli, "take_rounds", take)
    output = tmp_path / "partial.json"
    text = bench("run", tiny_bundle, "--engines", *SIZES, "-o", output, code=130)
    report = json.loads(output.read_text())
    validate(report)
    assert report["partial"] and "Interrupted." in text
    assert sorted({len(entry["samples_ms"]) for entry in report["engines"]}) == [1, 2]
    assert any(caveat.startswith("Partial") for caveat in report["caveats"])


def test_a_bundle_is_timed_without_the_parts_that_it_lacks(tiny_bundle, tmp_path: Path) -> None:
    pipeline = VideoPipeline.from_bundle(tiny_bundle, threads=1)
    manifest = pipeline.bundle.manifest
    left = manifest.config.keys() - {"vae", "text_encoder"}
    config = {part: manifest.config[part] for part in left}
    bare = VideoPipeline(replace(pipeline.bundle, manifest=replace(manifest, config=config)), 1)
    options = GenerationOptions(num_frames=37, height=64, width=64)
    components = {case.component for case in list_cases(bare, options)}
    assert components == {"block", "head", "context"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engines", "--lpips={file}"), "--lpips is for comparing policies"),
        (("--generation",), "Missing option '--prompt'"),
        (("--engines", "--dtype=fp16"), "--dtype is for engines"),
        (("--engines", "--height=100"), "height: expected"),
        (
            ("--engines", "--component=vae"),
            "component: expected some of block, head, context, text",
        ),
    ],
)
def test_what_cannot_be_timed_is_refused(tiny_bundle, tmp_path, arguments, message) -> None:
    file = tmp_path / "file"
    file.touch()
    flags = [argument.format(file=file) for argument in arguments]
    assert message in bench("run", tiny_bundle, *SIZES[1:], *flags, code=2)


def test_cases_take_turns_and_each_has_its_reference() -> None:
    log: list[str] = []
    cases = [Case(name, "block", lambda name=name: log.append(name), 1) for name in "abc"]
    taken = Sweep()
    take_rounds(cases, 3, taken)
    warm = sweep.WARMUP_ROUNDS
    assert len(log) == 3 * (3 + warm)
    assert log[3 * warm :] == [*"abc", *"bca", *"cab"]
    assert {*map(len, taken.samples.values())} == {*map(len, taken.reference.values())} == {3}
    assert {*map(len, taken.warmup.values())} == {warm}


def test_memory_is_that_of_the_block_and_its_peak_is_kept() -> None:
    with Monitor() as before:
        pass
    with Monitor() as during:
        block = np.ones(2**26, np.uint8)
        generation.time.sleep(0.2)
        del block
    grown = during.peaks["anonymous"] - before.peaks["anonymous"]
    assert 0.9 * 2**26 < grown < 1.3 * 2**26
    assert during.series["cpu_percent"]


def planted(report: dict, name: str, factor: float) -> dict:
    changed = copy.deepcopy(report)
    for entry in changed["engines"]:
        if entry["name"] == name:
            entry["samples_ms"] = [factor * sample for sample in entry["samples_ms"]]
            entry["latency_ms"] = {k: factor * v for k, v in entry["latency_ms"].items()}
    return changed


def steady(report: dict) -> dict:
    """The report as a quiet machine would have made it: samples that vary by a percent."""
    rng, quiet = np.random.default_rng(0), copy.deepcopy(report)
    for entry in quiet["engines"]:
        samples = entry["latency_ms"]["p50"] * rng.normal(1, 0.01, 30)
        entry["samples_ms"], entry["reference_ms"] = samples.tolist(), [2.0] * 30
    return quiet


def test_a_slower_engine_is_found_and_ends_with_1(engines, tmp_path: Path) -> None:
    quiet = steady(engines)
    slow = planted(quiet, "full pass, chunk 2", 1.2)
    comparison = compare_reports(quiet, slow, absolute=0.0)
    verdicts = {row.name: row.verdict for row in comparison.rows}
    assert verdicts.pop("full pass, chunk 2 (cpu)") == "slower" and comparison.regressed
    assert {*verdicts.values()} == {"no change"}
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, report in zip(paths, (quiet, slow), strict=True):
        path.write_text(json.dumps(report))
    assert "slower" in bench("compare", *paths, "--absolute=0", code=1)
    assert "faster" in bench("compare", *reversed(paths), "--absolute=0")
    assert "slower" not in bench("compare", *paths, "--absolute=1000")
    found = json.loads(bench("compare", *paths, "--absolute=0", "--json", code=1))
    assert found["regressed"] and len(found["rows"]) == len(comparison.rows)


def test_reports_that_cannot_be_compared_are_refused(engines, generated, tmp_path) -> None:
    paths = {name: tmp_path / f"{name}.json" for name in ("engines", "generated", "old", "text")}
    paths["engines"].write_text(json.dumps(engines))
    paths["generated"].write_text(json.dumps(generated))
    paths["old"].write_text(json.dumps(engines | {"schema": "motioncache.latency/v0"}))
    paths["text"].write_text("no JSON")
    for other, message in (
        ("generated", "reports: expected engines or generations that both have, got none"),
        ("old", "expected schema motioncache.latency/v1, got motioncache.latency/v0"),
        ("text", "expected a report of mc-bench run"),
    ):
        assert message in bench("compare", paths["engines"], paths[other], code=2)


def test_what_else_differs_is_said(engines) -> None:
    other = copy.deepcopy(engines)
    other["settings"]["height"] = 128
    other["environment"]["cpu"] = "another"
    other["engines"].pop()
    comparison = compare_reports(engines, other)
    assert any(note == "settings: height was 64, is 128." for note in comparison.notes)
    assert any(note.startswith("environment: cpu was") for note in comparison.notes)
    assert len(comparison.missing) == 1
