"""`mc-bench predict`: figures against published ones, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner

from mc_runtime.bench.cli import main
from mc_runtime.bench.devices import DEVICES
from mc_runtime.bench.predict import DTYPES, Efficiency, Request, describe_model, predict
from mc_runtime.bench.schemas import read_schema
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
    for which in report["time"].values():
        for seconds in which.values():
            assert 0 < seconds["bound"] < seconds["estimate"]


def test_the_key_cache_of_the_published_model_has_the_published_size() -> None:
    report = predict(MODEL, Request(MODEL.defaults, "rtx-4090", "bf16"))
    assert report["memory"]["kv_cache"] == pytest.approx(18.8e9, rel=1e-3)
    assert not report["memory"]["fits"]
    assert report["memory"]["ways_to_fit"][0]["change"].startswith("streamed weights")


def test_vanilla_takes_what_the_published_operations_take() -> None:
    options = replace(MODEL.defaults, num_frames=177)
    time = predict(MODEL, Request(options, "a800", "bf16"))["time"]
    assert time["vanilla"]["total"]["bound"] == pytest.approx(165.2e15 / 311.9e12, rel=1e-3)


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
    shape = plan_run(options, 0, model.grid).shape
    trace = DecisionTrace.empty(shape, {"text_tokens": [4, 4]})
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
    text = run(tiny_bundle, "--device=a800", "--trace", path, flags[2], code=2)
    assert "trace: expected" in text and "rows, branches and chunks" in text


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


def test_this_cpu_is_measured() -> None:
    rates = predict(MODEL, Request(SHORT, "this-cpu", "fp32"))["rates"]
    product = np.ones((256, 256), np.float32)
    assert rates["flops"] > 1e9 and rates["bandwidth"] > 1e8 and (product @ product).any()
