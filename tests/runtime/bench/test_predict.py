"""`mc-bench predict`: figures against published ones, and what it refuses."""

import json
import math
import re
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import psutil
import pytest
from click.testing import CliRunner

from mc_engines.building.bounds import Bounds, bound_tensor
from mc_runtime.bench import host_plan, reference
from mc_runtime.bench.cli import main
from mc_runtime.bench.devices import DEVICES, Device
from mc_runtime.bench.memory_plan import DTYPES, find_ways_to_fit, plan_memory
from mc_runtime.bench.predict import Efficiency, Request, predict
from mc_runtime.bench.predicted_model import describe_model
from mc_runtime.bench.schemas import find_fault, read_schema
from mc_runtime.pipeline import VideoPipeline
from mc_runtime.run_plan import plan_run
from motioncache import DecisionTrace, Mode

CONFIG = "skyreels-df-1.3b-540p"
MODEL = describe_model(CONFIG)
SHORT = replace(MODEL.defaults, height=64, width=64, num_inference_steps=3, num_frames=37)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_device_and_type_gives_a_report_of_the_schema(device: str, dtype: str) -> None:
    if dtype not in DEVICES[device].flops:
        with pytest.raises(ValueError, match=f"dtype: expected one of .* for {device}, got fp8"):
            predict(MODEL, Request(SHORT, device, dtype))
        return
    report = predict(MODEL, Request(SHORT, device, dtype))
    schema = read_schema("prediction")
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(report, schema, cls=jsonschema.Draft202012Validator)
    assert find_fault("prediction", report) is None
    for which in report["time"].values():
        for seconds in which.values():
            assert 0 < seconds["bound"] < seconds["estimate"]


def test_a_window_of_keys_is_as_large_as_its_tokens_say() -> None:
    memory = predict(MODEL, Request(MODEL.defaults, "rtx-4090", "bf16"))["memory"]
    tokens = 25 * (544 // 16) * (960 // 16)
    # Two branches, keys and values, 30 layers of 12 heads of 128.
    assert memory["kv_cache"] == 2 * 2 * 30 * tokens * 12 * 128 * 2 == 18_800_640_000
    assert memory["capacity"] == 24 * 2**30
    assert not memory["fits"] and memory["peak"] > 0.95 * memory["capacity"]


def test_vanilla_takes_its_operations_at_the_devices_rate() -> None:
    # 135 rows of two branches, each a bidirectional forward of 25 latent frames: 127.7 TFLOPs of
    # products with weights, 484.2 of attention. MotionCache's table 1 prints 113 PFLOPs for it,
    # which is 135 x 2 x 420.7, of a chunk-causal forward.
    options = replace(MODEL.defaults, num_frames=177)
    time = predict(MODEL, Request(options, "a800", "bf16"))["time"]
    expected = 135 * 2 * (127.7e12 + 484.2e12) / DEVICES["a800"].flops["bf16"]
    assert time["vanilla"]["total"]["bound"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "device", "settings"),
    [
        (CONFIG, "rtx-4090", {}),
        (CONFIG, "rtx-4090", {"overlap_history": 77}),
        (CONFIG, "rtx-5090", {"num_frames": 177, "height": 720, "width": 1280}),
        ("skyreels-df-14b-540p", "jetson-agx-orin", {"num_frames": 177}),
        ("skyreels-df-14b-540p", "rtx-5090", {}),
        ("skyreels-df-14b-720p", "l40s", {}),
        ("magi-4.5b", "rtx-4090", {}),
        ("magi-24b", "a800", {"num_frames": 240}),
        ("magi-24b-distill", "rtx-4090", {}),
    ],
)
def test_what_would_make_it_fit_does(name: str, device: str, settings: dict[str, Any]) -> None:
    model = describe_model(name)
    options = replace(model.defaults, **settings)
    memory = predict(model, Request(options, device, "bf16"))["memory"]
    assert not memory["fits"] and memory["ways_to_fit"]
    for way in memory["ways_to_fit"]:
        flags = re.findall(r"--([\w-]+)(?: ([\w.]+))?", way["change"])
        named = {flag.replace("-", "_"): value for flag, value in flags if value}
        named |= {flag[3:].replace("-", "_"): 0 for flag, _ in flags if flag.startswith("no-")}
        assert named.pop("dtype", "bf16") == way["dtype"]
        assert {key: float(value) for key, value in named.items()} == way["settings"]
        assert ("max-vram" in way["change"]) == way["streamed"]
        changed = replace(options, **way["settings"])
        plan = plan_memory(
            model, changed, way["dtype"], streamed=way["streamed"], vae_on_cpu=way["vae_on_cpu"]
        )
        assert plan.peak == way["peak"] <= 0.95 * DEVICES[device].memory
        if not way["streamed"] and not way["vae_on_cpu"]:
            after = predict(model, Request(changed, device, way["dtype"]))["memory"]
            assert after["fits"] and after["peak"] == way["peak"] and not after["ways_to_fit"]


def test_ways_to_fit_are_the_mildest_of_every_kind() -> None:
    card, options = DEVICES["rtx-4090"], replace(MODEL.defaults, overlap_history=77)
    ways = find_ways_to_fit(MODEL, options, "bf16", card)
    kinds = {way.change.split(" (")[0]: way.settings for way in ways}
    assert set(kinds) == {
        *("the VAE on the CPU", "no guidance", "shorter windows", "a smaller video"),
    }
    assert kinds["shorter windows"] == {"base_num_frames": 77, "overlap_history": 57}
    assert kinds["a smaller video"] == {"height": 512, "width": 896}
    ways = find_ways_to_fit(MODEL, MODEL.defaults, "bf16", DEVICES["jetson-agx-orin"])
    assert not any(way.vae_on_cpu for way in ways)  # the host shares the memory


def test_smaller_weights_are_named_where_the_device_has_them() -> None:
    large = describe_model("skyreels-df-14b-540p")
    options = replace(large.defaults, height=224, width=384)
    ways = find_ways_to_fit(large, options, "bf16", DEVICES["rtx-5090"])
    assert any("--dtype fp8, which nothing here builds yet" in way.change for way in ways)
    assert {way.dtype for way in find_ways_to_fit(large, options, "fp32", DEVICES["a800"])} == {
        "fp32",
        "bf16",
    }


def test_text_encoder_and_vae_are_counted_where_they_are_told(tiny_bundle) -> None:
    model = describe_model(str(tiny_bundle))
    manifest = VideoPipeline.from_bundle(tiny_bundle).bundle.manifest
    layer = manifest.components["text_layer"]
    weights = sum(int(np.prod(spec.shape)) for spec in layer.graphs["fp16"].weights)
    one = Bounds(8, 8, 8)  # latents of a video of 64 by 64
    states = sum(
        math.prod(bound_tensor(spec, {"h": one, "w": one})[2])
        for spec in manifest.components["vae_decoder_next"].graphs["fp16"].inputs
        if spec.name.startswith("state")
    )
    assert model.text_layer == weights
    plan = plan_memory(model, SHORT, "fp16")
    assert plan.text_encoder == 2 * weights
    assert plan.vae == 2 * (model.vae_weights + 2 * states)
    without = plan_memory(model, SHORT, "fp16", vae_on_cpu=True)
    assert plan.peak - without.peak == plan.vae
    memory = predict(model, Request(SHORT, "a800", "bf16"))["memory"]
    assert memory["left_out"] == ["activations of the text encoder", "activations of the VAE"]
    text = run("skyreels-mini", "--device=a800", "--height=64", "--width=64")
    assert "VAE, weights and states not known" in " ".join(text.split())
    assert "without text encoder and VAE, whose sizes are not known" in " ".join(text.split())


def test_half_of_the_bandwidth_and_of_the_operations_take_twice_as_long() -> None:
    slow = replace(MODEL.defaults, num_inference_steps=3)
    halved = Efficiency(Efficiency.flops / 2, Efficiency.bandwidth / 2)
    reports = [
        predict(MODEL, Request(slow, "l40s", "bf16", efficiency=efficiency))
        for efficiency in (Efficiency(), halved)
    ]
    first, second = (report["time"]["policy"]["total"] for report in reports)
    assert second["estimate"] == pytest.approx(2 * first["estimate"])
    assert second["bound"] == first["bound"]


def test_a_trace_gives_the_shares_and_another_size_keeps_them(tiny_bundle, tmp_path: Path) -> None:
    model = describe_model(str(tiny_bundle))
    sizes = {"height": 64, "width": 64, "num_frames": 37, "num_inference_steps": 3}
    options = replace(model.defaults, **sizes)
    plan = plan_run(options, 0, model.grid)
    shape = plan.shape
    recorded = {"windows": [asdict(window) for window in plan.windows], "options": asdict(options)}
    trace = DecisionTrace.empty(shape, {"text_tokens": [4, 4], **recorded})
    active = np.repeat(shape.active[:, None], 2, axis=1)
    trace.mode[active], trace.bucket[active] = Mode.PARTIAL, shape.tokens // 2
    trace.recompute[active] = 1
    path = tmp_path / "run.trace"
    trace.save(path)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    for sides in ((), ("--height=128", "--width=128")):
        output = tmp_path / f"{len(sides)}.json"
        run(tiny_bundle, "--device=a800", "--trace", path, "-o", output, *flags, *sides)
        share = json.loads(output.read_text())["computed_share"]
        steps, clean = active.sum(), 2 * (shape.active.shape[1] - 1)
        assert share == pytest.approx(steps / 2 / (steps + clean))
    text = run(tiny_bundle, "--device=a800", "--trace", path, *flags[:3], code=2)
    assert (
        "trace: expected a run with num_inference_steps 50, got one with "
        "num_inference_steps 3. Pass --num-inference-steps 3." in text
    )


def test_the_trace_of_a_continued_video_has_its_prefix(tiny_bundle, tmp_path: Path) -> None:
    pipeline = VideoPipeline.from_bundle(tiny_bundle, threads=1)
    options = replace(SHORT, num_inference_steps=2)
    given = np.zeros((17, 64, 64, 3), np.uint8)
    trace = pipeline.run("a", video=given, options=options, decode=False).trace
    model = describe_model(str(tiny_bundle))
    report = predict(model, Request(options, "a800", "bf16", trace=trace))
    assert report["computed_share"] == pytest.approx(1)
    whole = predict(model, Request(options, "a800", "bf16"))
    assert report["work"]["flops"] < whole["work"]["flops"]
    longer = replace(options, num_frames=57)
    with pytest.raises(ValueError, match=r"num_frames 57, got .* 37. Pass --num-frames 37\."):
        predict(model, Request(longer, "a800", "bf16", trace=trace))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": None, "options": None}, "got one without windows, options. Pass a file"),
        ({"interrupted": True}, "got one of an interrupted one. Pass a file that mc-generate"),
    ],
)
def test_a_trace_that_does_not_say_enough_is_refused(changes: dict[str, Any], message: str) -> None:
    plan = plan_run(SHORT, 0, MODEL.grid)
    windows = [asdict(window) for window in plan.windows]
    recorded = {"windows": windows, "options": asdict(SHORT), "text_tokens": [4, 4], **changes}
    kept = {name: value for name, value in recorded.items() if value is not None}
    trace = DecisionTrace.empty(plan.shape, kept)
    with pytest.raises(ValueError, match=message):
        predict(MODEL, Request(SHORT, "a800", "bf16", trace=trace))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("skyreels", "--device=a800"), "expected a bundle or one of skyreels-df-1.3b-540p"),
        ((CONFIG, "--device=rtx-4080"), "Did you mean rtx-4090?"),
        ((CONFIG, "--device=a800", "--dtype=fp8"), "expected one of bf16, fp16, fp32 for a800"),
        ((CONFIG, "--device=this-cpu", "--dtype=bf16"), "expected one of fp32 for this-cpu"),
        ((CONFIG, "--device=a800", "--height=100"), "height: expected"),
        ((CONFIG, "--device=a800", "--computed=1.5"), "0<=x<=1"),
        ((CONFIG, "--device=a800", "--flops-efficiency=0"), "0<x<=1"),
    ],
)
def test_what_cannot_be_predicted_is_refused(arguments, message: str) -> None:
    assert message in run(*arguments, code=2)


def test_the_page_says_that_it_is_a_model_and_where_the_figures_are_from() -> None:
    text = " ".join(run(CONFIG, "--device=jetson-agx-orin", "--num-frames=37").split())
    assert "A model, not a measurement" in text
    assert "technical brief" in text and "which the host shares" in text
    assert "without activations of the text encoder and activations of the VAE, whose sizes" in text


def test_this_cpu_is_measured(monkeypatch) -> None:
    times = iter((50.0, 40.0, 80.0, 50.0, 50.0))
    monkeypatch.setattr(reference, "time_kernel", lambda: next(times))
    report = predict(MODEL, Request(SHORT, "this-cpu", "fp32"))
    # Five products of matrices of 1024 rows and columns, in the least of five times.
    assert report["rates"]["flops"] == pytest.approx(5 * 2 * 1024**3 / 0.040)
    assert report["rates"]["flops"] == report["rates"]["attention_flops"]
    assert report["rates"]["bandwidth"] > 1e8 and next(times, None) is None
    memory = report["memory"]
    assert memory["capacity"] == psutil.virtual_memory().total
    assert find_fault("prediction", report) is None
    held = memory["host"]["anonymous"]
    assert memory["peak"] == max(sum(held.values()), memory["text_encoder"]) > 0
    # Two branches, keys and values in float32, 30 layers; 1.25e9 weights of blocks, cast.
    assert held["kv_cache"] == 2 * 2 * 30 * 10 * 4 * 4 * 1536 * 4
    assert held["weights"] == pytest.approx(4 * 1_251_525_120, rel=1e-3)
    assert memory["host"]["mapped"]["libraries"] > 1e7
    assert predict(MODEL, Request(SHORT, "a800", "bf16"))["memory"]["host"] is None


def test_what_would_make_it_fit_on_this_cpu_does(monkeypatch) -> None:
    monkeypatch.setattr(host_plan, "measure_process", lambda: (40_000_000, 40_000_000))
    options = replace(MODEL.defaults, height=256, width=448)
    cpu = Device("this CPU", {"fp32": 1e11}, 1e10, 21 * 2**30, "measured now", True)
    assert not host_plan.plan_host(MODEL, options).fits(cpu)
    plan = partial(host_plan.plan_host, MODEL)
    ways = find_ways_to_fit(MODEL, options, "fp32", cpu, host=plan)
    assert {way.change.split(" (")[0] for way in ways} == {
        *("no guidance", "shorter windows", "a smaller video"),
    }
    for way in ways:
        assert way.peak == plan(replace(options, **way.settings)).peak <= 0.95 * cpu.memory
        assert not way.streamed and not way.vae_on_cpu
