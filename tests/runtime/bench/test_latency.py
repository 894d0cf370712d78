"""`mc-bench run --engines` and `--generation`, and `compare`: on a tiny bundle, by planting."""

import copy
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from mc_engines.bundle import Bundle
from mc_engines.bundle_additions import add_files
from mc_engines.errors import BundleError, EngineError
from mc_runtime.bench import generation, latency_cli, latency_page, latency_report, sweep
from mc_runtime.bench.backends import Backend, open_backend
from mc_runtime.bench.cli import main
from mc_runtime.bench.compare import compare_reports
from mc_runtime.bench.generation import Generated, policy_runner
from mc_runtime.bench.latency_page import render_latency
from mc_runtime.bench.latency_report import Measured, Setup, build_latency_report
from mc_runtime.bench.machine import Monitor, describe_machine
from mc_runtime.bench.reference import find_quiet_rounds, is_busy, kernel_by_round
from mc_runtime.bench.roofline import EngineCosts
from mc_runtime.bench.schemas import read_schema
from mc_runtime.bench.sweep import Case, Sweep, Timed, list_cases, take_rounds
from mc_runtime.flops import ModelFlops
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline
from motioncache import Preset, none
from motioncache.motion import MotionCacheConfig

SIZES = ("--height=64", "--width=64", "--num-frames=37", "--num-inference-steps=4", "--threads=1")
CACHED = (
    "--policies=flowcache",
    *(
        f"--policy-option=flowcache.{option}"
        for option in ("coefficients=1,0", "threshold=1.5", "warmup_steps=1")
    ),
)
# Of a transformer, as a manifest has it; its sizes matter to no test here.
TRANSFORMER = {
    **{"layers": 1, "dim": 8, "heads": 1, "ffn_dim": 8, "text_dim": 8, "in_channels": 1},
    **{"head_dim": 8, "out_channels": 1, "patch_size": [1, 2, 2]},
}
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


class Ended:
    """Stands for `take_rounds`: ends with an error in the second call of the fourth round."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def __call__(self, cases, rounds, taken, advance) -> None:
        def count() -> None:
            self.calls += 1
            if self.calls == 3 * len(cases) + 2:  # two warm-ups, a round and two calls of the next
                raise self.error
            advance()

        take_rounds(cases, rounds, taken, count)


@pytest.mark.parametrize(
    ("error", "code", "said", "reason"),
    [
        (KeyboardInterrupt(), 130, "Interrupted.", "an interrupt"),
        (EngineError("block: expected x, got y."), 1, *2 * ["block: expected x, got y."]),
    ],
)
def test_what_was_measured_is_written_when_it_ends_early(
    tiny_bundle, tmp_path: Path, monkeypatch, error, code, said, reason
) -> None:
    monkeypatch.setattr(latency_cli, "take_rounds", Ended(error))
    output, page = tmp_path / "partial.json", tmp_path / "page.html"
    text = bench("run", tiny_bundle, "--engines", *SIZES, "-o", output, "--html", page, code=code)
    report = json.loads(output.read_text())
    validate(report)
    assert report["partial"] and text.splitlines()[-1] == said
    assert sorted({len(entry["samples_ms"]) for entry in report["engines"]}) == [1, 2]
    (caveat,) = (caveat for caveat in report["caveats"] if caveat.startswith("Partial"))
    assert f"ended by {reason};" in caveat and caveat in page.read_text()


def test_an_end_before_anything_was_measured_writes_nothing(
    tiny_bundle, tmp_path: Path, monkeypatch
) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(latency_cli, "list_cases", interrupt)
    output = tmp_path / "report.json"
    assert bench("run", tiny_bundle, "--engines", "-o", output, code=130) == "Interrupted.\n"
    assert not output.exists()


class Interrupting(list):
    """Ctrl-C comes as soon as a third sample is in it."""

    def append(self, value: object) -> None:
        super().append(value)
        if len(self) == 3:
            raise KeyboardInterrupt


class Samples(dict):
    """Of a sweep."""

    def setdefault(self, key: int, default: list) -> list:
        return super().setdefault(key, Interrupting(default))


def test_a_sample_that_an_interrupt_leaves_has_its_reference() -> None:
    measured = Measured(sweep=Sweep(samples=Samples()))
    measured.cases = [("cpu", Case("x", "block", lambda: None, 1))]
    with pytest.raises(KeyboardInterrupt):
        take_rounds([measured.cases[0][1]], 5, measured.sweep)
    (entry,) = report_of(measured)["engines"]
    assert len(entry["samples_ms"]) == len(entry["reference_ms"]) == 3


def report_of(measured: Measured) -> dict:
    """The report of what was measured of no bundle in particular."""
    manifest = SimpleNamespace(model="x", config={"transformer": TRANSFORMER})
    bundle = SimpleNamespace(path=Path("x.bundle"), model_hash=64 * "0", manifest=manifest)
    run = {
        **dict.fromkeys(("prompt", "engine_folder", "max_vram", "device"), None),
        **{"policies": {}, "dtype": "fp32", "iterations": 1, "rounds": 1},
    }
    setup = Setup(bundle, GenerationOptions(), run, describe_machine(None), [])
    with Monitor() as monitor:
        pass
    report = build_latency_report(setup, measured, monitor)
    validate(report)
    return report


def generated_in(milliseconds: float, reference: float | None, **peaks: int) -> Generated:
    """A video that took so long."""
    trace = SimpleNamespace(recompute=np.ones((1, 1, 1)))
    return Generated(milliseconds, [], 0.0, milliseconds, peaks, trace, reference)


@pytest.fixture
def no_work(monkeypatch) -> None:
    """Counts no operations, for which `generated_in` has no trace."""
    work = SimpleNamespace(total=1)
    monkeypatch.setattr(latency_report, "count_work", lambda *_, **__: work)


def swept(*references: float | None) -> Sweep:
    """Samples of 1 ms of one case."""
    return Sweep({0: [Timed(1.0, reference) for reference in references]})


CPU_CASE = ("cpu", Case("x", "block", lambda: None, 1))


@pytest.mark.parametrize(
    ("small", "large", "size", "quiet", "busy"),
    [
        ((2.0, 2.2, 2.0), (100.0, 119.0, 121.0), 1024, 2 / 3, False),
        ((2.0, 2.8, 2.5), (100.0, 120.0, 100.0), 256, 1 / 3, True),
        ((2.0, 2.0, 2.0), (100.0, 140.0, 140.0), 1024, 1 / 3, True),
        ((None, None), (None, None), None, None, False),
    ],
)
def test_the_machine_is_busy_where_products_of_one_size_vary(
    no_work, small, large, size, quiet, busy
) -> None:
    runs = [generated_in(1.0, reference) for reference in large]
    measured = Measured([CPU_CASE], swept(*small), [("cpu", "none")], {}, {0: runs})
    kernel = report_of(measured)["reference_kernel"]
    assert (kernel["size"], kernel["busy"]) == (size, busy)
    assert kernel["quiet_rounds"] == (None if quiet is None else pytest.approx(quiet))


def test_what_runs_on_a_gpu_is_held_against_no_product_of_the_cpu(
    tiny_bundle, no_work, monkeypatch
) -> None:
    monkeypatch.setattr(sweep, "time_kernel", pytest.fail)
    monkeypatch.setattr(generation, "time_kernel", pytest.fail)
    backend = Backend("onnxruntime-cuda", VideoPipeline.from_bundle(tiny_bundle, threads=1))
    sizes = {"num_frames": 37, "height": 64, "width": 64, "num_inference_steps": 2}
    options = GenerationOptions(**sizes)
    cases = list_cases(backend, options)
    assert all(case.on_gpu for case in cases)
    measured = Measured([(backend.name, cases[-1])], policies=[(backend.name, "none")])
    take_rounds(cases[-1:], 1, measured.sweep)
    runner = policy_runner(backend, none(), options, {"prompt": "a"})
    measured.generated[0] = [runner()]
    report = report_of(measured)
    entries = report["engines"] + report["generation"]
    assert [entry["reference_ms"] for entry in entries] == [[None], [None]]
    assert (
        "Times on a GPU have no reference: the kernel is a product of the CPU."
        in (report["caveats"])
    )
    assert "VAE encoder, a video of two latent frames (onnxruntime-cuda)" in render_latency(report)


def test_peaks_are_of_every_kind_that_a_run_had(no_work) -> None:
    runs = [generated_in(1.0, 1.0, total=5), generated_in(1.0, 1.0, total=4, device=7)]
    measured = Measured(policies=[("cpu", "none")], generated={0: runs})
    report = report_of(measured)
    assert report["generation"][0]["peak_bytes"] == {"total": 5, "device": 7}
    assert not any("share the process" in caveat for caveat in report["caveats"])
    measured.policies.append(("cpu", "flowcache"))
    assert any("share the process" in caveat for caveat in report_of(measured)["caveats"])


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2), ("fp16", 2)])
def test_bytes_are_those_of_the_engines_dtype(tiny_bundle, dtype, size) -> None:
    pipeline = VideoPipeline.from_bundle(tiny_bundle, threads=1)
    options = GenerationOptions(num_frames=37, height=64, width=64)
    (case,) = list_cases(Backend("tensorrt", pipeline, dtype), options, ["context"])
    config = pipeline.bundle.manifest.config["transformer"]
    costs = EngineCosts(ModelFlops.from_manifest(config), 0, size, size)
    assert case.cost == costs.context(case.tokens)


def test_a_backend_of_engines_has_their_dtype(tiny_bundle) -> None:
    flags = dict.fromkeys(("engine_folder", "max_vram", "device", "threads", "dtype"))
    bundle = Bundle.open(tiny_bundle)
    opened = {
        dtype: open_backend(
            bundle, "tensorrt", flags | {"dtype": dtype}, lambda pipeline: GenerationOptions()
        )
        for dtype in (None, "fp16")
    }
    assert {dtype: backend.dtype for dtype, backend in opened.items()} == {
        None: "bf16",
        "fp16": "fp16",
    }
    assert opened["fp16"].on_gpu
    cpu = open_backend(bundle, "cpu", flags, lambda pipeline: GenerationOptions())
    assert (cpu.dtype, cpu.on_gpu) == ("fp32", False)


def test_the_gpu_that_is_watched_is_the_one_of_the_flag(tiny_bundle, tmp_path, monkeypatch) -> None:
    """Engines run on the CPU here, as what is asked for is the number alone."""
    pipeline, asked = VideoPipeline.from_bundle(tiny_bundle, threads=1), []
    monkeypatch.setattr(
        latency_cli, "open_backend", lambda *_: Backend("tensorrt", pipeline, "bf16")
    )

    def watch(device: int) -> Monitor:
        asked.append(device)
        return Monitor(device)

    monkeypatch.setattr(latency_cli, "Monitor", watch)
    monkeypatch.setattr(generation, "Monitor", watch)
    monkeypatch.setattr(
        latency_cli,
        "describe_machine",
        lambda threads, device: asked.append(device) or describe_machine(threads),
    )
    flags = ("--backend=tensorrt", "--device=3", "--component=head", "--quick", "--prompt=a")
    output = tmp_path / "report.json"
    bench("run", tiny_bundle, "--engines", "--generation", *flags, *SIZES, "-o", output)
    assert asked == 4 * [3]  # what it is, the whole, a warm-up and a video
    run = json.loads(output.read_text())["run"]
    assert (run["device"], run["dtype"]) == (3, "bf16")


def test_a_bundle_is_timed_without_the_parts_that_it_lacks(tiny_bundle, tmp_path: Path) -> None:
    pipeline = VideoPipeline.from_bundle(tiny_bundle, threads=1)
    manifest = pipeline.bundle.manifest
    left = manifest.config.keys() - {"vae", "text_encoder"}
    config = {part: manifest.config[part] for part in left}
    bare = VideoPipeline(replace(pipeline.bundle, manifest=replace(manifest, config=config)), 1)
    options = GenerationOptions(num_frames=37, height=64, width=64)
    components = {case.component for case in list_cases(Backend("cpu", bare), options)}
    assert components == {"block", "head", "context"}


def test_a_component_is_timed_without_what_it_does_not_need(tiny_bundle, monkeypatch) -> None:
    pipeline = VideoPipeline.from_bundle(tiny_bundle, threads=1)
    options = GenerationOptions(num_frames=37, height=64, width=64)
    for name in ("block", "head", "context", "text_layer", "vae_decoder_next", "vae_encoder_next"):
        cases = list_cases(Backend("cpu", pipeline), options, [name])
        assert {case.component for case in cases} == {name}
    monkeypatch.setattr(sweep, "_Window", pytest.fail)
    monkeypatch.setattr(VideoPipeline, "decoder", property(pytest.fail))
    for name in ("context", "text_layer", "vae_encoder_next"):
        list_cases(Backend("cpu", pipeline), options, [name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engines", "--lpips={file}"), "--lpips is for comparing policies"),
        (("--generation",), "Missing option '--prompt'"),
        (("--engines", "--dtype=fp16"), "--dtype is for engines"),
        (("--engines", "--height=100"), "height: expected"),
        (
            ("--engines", "--generation", "--prompt=a", "--component=vae"),
            "component: expected some of block, head, context, text_layer, vae_decoder_next, "
            "vae_encoder_next, got vae. Name what the bundle has and mc-bench times.",
        ),
        (
            ("--engines", "--backend=cpu", "--backend=cpu"),
            "--backend: expected each once, got cpu more than once. Leave it out.",
        ),
        *(
            ((f"--{flag}", *values), f"--{flag} needs --engines or --generation. Add it, or leave")
            for flag, *values in (
                *(("dtype", "fp16"), ("engine-folder", "x"), ("max-vram", "1")),
                *(("device", "0"), ("backend", "cpu"), ("quick",)),
            )
        ),
        *(
            ((*mode, f"--{flag}"), f"--{flag.partition('=')[0]} needs --engines. Add it, or leave")
            for mode in ((), ("--generation", "--prompt=a"))
            for flag in ("component=block", "iterations=30")
        ),
        *(
            (
                ("--engines", f"--{flag}", value),
                f"--{flag} is not for --engines alone. Add --generation, or leave --{flag} out.",
            )
            for flag, value in (
                *(("prompt", "a"), ("prompts", "{file}"), ("policies", "motioncache")),
                *(("policy-option", "motioncache.warmup_steps=1"), ("rounds", "3")),
            )
        ),
        (
            ("--engines", "--generation", "--prompt=a", "--policies=other"),
            "policy: expected one of none,",
        ),
        (
            ("--engines", "--generation", "--prompt=a", *CACHED, "--num-inference-steps=1"),
            "warmup_steps: expected at most 0 with 1 step",
        ),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_is_opened(
    tiny_bundle, tmp_path, monkeypatch, arguments, message
) -> None:
    monkeypatch.setattr(VideoPipeline, "transformer", property(pytest.fail))
    monkeypatch.setattr(VideoPipeline, "text_encoder", property(pytest.fail))
    file = tmp_path / "file"
    file.touch()
    flags = [argument.format(file=file) for argument in arguments]
    assert message in bench("run", tiny_bundle, *SIZES[1:], *flags, code=2)


def test_generations_come_before_the_windows_of_the_sweep_and_after_the_machine(
    tiny_bundle, monkeypatch
) -> None:
    """A window stays in memory, which is measured of the generations; the machine stands still."""
    log = []

    def note(name: str) -> None:
        function = getattr(latency_cli, name)

        def run(*arguments, **values):
            log.append(name)
            return function(*arguments, **values)

        monkeypatch.setattr(latency_cli, name, run)

    for name in ("list_cases", "describe_machine", "time_generations", "build_latency_report"):
        note(name)
    flags = ("--engines", "--generation", "--prompt=a", "--quick", "--component=head")
    bench("run", tiny_bundle, *flags, *SIZES)
    assert log == ["describe_machine", "time_generations", "list_cases", "build_latency_report"]


def test_a_part_that_is_missing_ends_it_before_anything_is_timed(tiny_bundle, monkeypatch) -> None:
    def missing(_):
        raise BundleError("text encoder: expected one, got none.")

    monkeypatch.setattr(VideoPipeline, "text_encoder", property(missing))
    monkeypatch.setattr(latency_cli, "take_rounds", pytest.fail)
    monkeypatch.setattr(latency_cli, "time_generations", pytest.fail)
    flags = ("--engines", "--generation", "--prompt=a")
    assert "expected one, got none" in bench("run", tiny_bundle, *flags, *SIZES, code=1)


@pytest.mark.parametrize(
    ("flags", "rounds", "iterations"),
    [
        ((), 5, 30),
        (("--quick",), 1, 5),
        (("--rounds=3", "--iterations=30"), 3, 30),
        (("--quick", "--rounds=2", "--iterations=7"), 2, 7),
    ],
)
def test_a_generation_has_as_many_samples_as_compare_needs(
    tiny_bundle, monkeypatch, flags, rounds, iterations
) -> None:
    asked = []
    monkeypatch.setattr(latency_cli, "policy_runner", lambda *_: None)
    monkeypatch.setattr(latency_cli, "list_cases", lambda *_: [])
    monkeypatch.setattr(latency_cli, "take_rounds", lambda _, number, *__: asked.append(number))
    monkeypatch.setattr(
        latency_cli, "time_generations", lambda _, number, *__: asked.append(number)
    )
    bench("run", tiny_bundle, "--engines", "--generation", "--prompt=a", *flags)
    assert asked == [rounds, iterations]


def test_what_the_user_should_know_is_said_once_and_in_the_report(
    tiny_bundle, tmp_path: Path
) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    options = {"coefficients": (1.0, 0.0), "threshold": 1.5, "warmup_steps": 1}
    preset = Preset("flowcache", "long", options, "calibrated", "a test", steps=50)
    presets = {preset.key: preset.to_json()}
    add_files(bundle, {}, lambda manifest: replace(manifest, presets=presets))
    output = tmp_path / "report.json"
    flags = ("--policies=flowcache:long", f"--prompt={'b' * 600}", "--rounds=1", *SIZES)
    text = bench("run", bundle, "--generation", *flags, "-o", output)
    report = json.loads(output.read_text())
    for start in ("flowcache:long: expected 50 steps", "prompt: expected at most 512 tokens"):
        (said,) = (caveat for caveat in report["caveats"] if caveat.startswith(start))
        assert text.splitlines().count(said) == 1
    settings = report["run"]["policies"]["flowcache:long"]
    assert settings["preset"] == "long" and settings["coefficients"] == [1, 0]


def test_what_was_asked_for_is_in_the_report(engines, generated) -> None:
    run = generated["run"]
    assert {name: run[name] for name in ("prompt", "rounds", "dtype")} == {
        "prompt": "a",
        "rounds": 2,
        "dtype": "fp32",
    }
    unused = ("engine_folder", "max_vram", "device", "iterations")
    assert {run[name] for name in unused} == {None}
    assert run["policies"]["none"] == {}
    cached = run["policies"]["motioncache"]
    assert (cached["threshold"], cached["coefficients"], cached["compat"]) == (100, [1, 0], "fixed")
    assert {*cached} == {entry.name for entry in fields(MotionCacheConfig)}
    swept = engines["run"]
    assert (swept["iterations"], swept["rounds"]) == (5, None)
    assert (swept["prompt"], swept["policies"]) == (None, {})


def test_cases_take_turns_and_each_has_its_reference(monkeypatch) -> None:
    kernel = iter(range(1, 100))
    monkeypatch.setattr(sweep, "time_kernel", lambda size: float(next(kernel)))
    log: list[str] = []
    cases = [Case(name, "block", lambda name=name: log.append(name), 1) for name in "abc"]
    taken = Sweep()
    take_rounds(cases, 3, taken)
    warm = sweep.WARMUP_ROUNDS
    assert len(log) == 3 * (3 + warm)
    assert log[3 * warm :] == [*"abc", *"bca", *"cab"]
    assert {*map(len, taken.warmup.values())} == {warm}
    references = [[timed.reference_ms for timed in taken.samples[case]] for case in range(3)]
    assert references == [[7, 12, 14], [8, 10, 15], [9, 11, 13]]


def test_the_words_of_a_page_say_what_they_count(generated) -> None:
    page = render_latency(generated)
    assert "<th>s per video s</th>" in page and "real time" not in page
    assert "<td>policy motioncache</td>" in page and "warmup_steps=1, " in page


def test_chunks_are_numbered_by_whole_numbers(generated) -> None:
    (axes,) = latency_page._draw_chunks(generated).axes
    ticks = axes.get_xticks()
    assert len(ticks) > 1 and (ticks == np.round(ticks)).all()


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


def test_the_kernel_counts_by_round_not_by_sample() -> None:
    steady = [2.0, 2.1, 9.0], [2.0, 2.1, 2.2], [5.0, 2.1, 2.2], None, [None]
    assert kernel_by_round(steady) == [2.0, 2.1, 2.2]
    assert kernel_by_round([[1.0], [2.0, 3.0]]) == [1.5, 3.0]
    assert kernel_by_round([None, []]) == []


def test_a_round_is_quiet_where_the_kernel_took_little_longer_than_in_the_fastest() -> None:
    assert find_quiet_rounds([2.5, 2.0, 2.39, 2.41]) == [1, 2]
    assert not is_busy([2.5, 2.0, 2.39, 2.41]) and is_busy([2.5, 2.0, 2.41])
    assert find_quiet_rounds([]) == [] and not is_busy([])
