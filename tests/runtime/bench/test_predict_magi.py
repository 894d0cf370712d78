"""`mc-bench predict` of MAGI-1: the published job, and bytes and seconds by hand."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import T5Config, T5EncoderModel

from mc_engines.published import MAGI, T5_XXL
from mc_export.magi_config import transformer_tensors
from mc_runtime.bench.cli import main
from mc_runtime.bench.devices import DEVICES
from mc_runtime.bench.predict import Request, predict
from mc_runtime.bench.predicted_model import describe_model
from mc_runtime.bench.roofline import EngineCosts, Limits, predict_run
from mc_runtime.bench.schemas import read_schema
from mc_runtime.families.magi_schedule import MagiSchedule
from mc_runtime.families.magi_work import plan_uncached
from mc_runtime.flops import count_work
from motioncache import DecisionTrace, Mode

BASE, DISTILLED = describe_model("magi-4.5b"), describe_model("magi-4.5b-distill")
LARGE = describe_model("magi-24b")
L = 6 * 45 * 45  # tokens of a chunk at 720 x 720
ROW = 2 * 34 * 8 * 128  # keys and values of a token: all layers, eight heads of 128
SEVEN = replace(DISTILLED.defaults, num_frames=168)
NO_LIMITS = Limits(1.0, 1.0, 1.0, 1.0, 1.0)


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def memory_of(model, **changes):
    options = replace(model.defaults, **changes)
    return predict(model, Request(options, "h100", "bf16"))["memory"]


@pytest.mark.parametrize("name", MAGI)
def test_every_published_model_gives_a_report_of_the_schema(name: str, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    text = run(name, "--device=rtx-4090", "--num-inference-steps=8", "-o", output)
    report = json.loads(output.read_text())
    jsonschema.validate(report, read_schema("prediction"), cls=jsonschema.Draft202012Validator)
    assert report["settings"]["num_frames"] == 96 and report["text_tokens"] == [100] * 4 + [50]
    assert report["time"]["vanilla"] is None and "every chunk in every row" not in text
    assert report["memory"]["left_out"] == ["activations of the text encoder", "VAE"]
    assert 0 < report["time"]["policy"]["total"]["bound"]


# ---- operations


def test_the_published_job_is_walked_with_the_operations_that_are_counted() -> None:
    """7 chunks of 4.5B, distilled: 139 PF in MotionCache's table."""
    plan = DISTILLED.plan(SEVEN)
    schedule = MagiSchedule.from_manifest(DISTILLED.config, SEVEN)
    counted = count_work(
        DISTILLED.flops, plan_uncached(schedule, plan, [100] * 7, 50), padded=False
    )
    work = predict(DISTILLED, Request(SEVEN, "a800", "bf16"))["work"]
    assert work["flops"] + work["attention"] == counted.total
    assert counted.total / 139e15 == pytest.approx(1, abs=0.02)


def test_guidance_takes_the_passes_that_have_a_weight_or_are_seen() -> None:
    """By hand, from time 0.3 on, which is step 48 of 64: q = 0, and 1 - p = 0.

    The prompt's branch goes on as long as a younger chunk sees its keys; the last chunk has none.
    """
    options = replace(BASE.defaults, num_frames=168)
    mode = BASE.family.passes(BASE.config, options, BASE.plan(options))
    assert (mode == Mode.FULL).sum(axis=(0, 2)).tolist() == [7 * 64 - 16, 7 * 64, 7 * 48]
    assert (mode == Mode.CLEAN).sum(axis=(0, 2)).tolist() == [6, 6, 0]


def test_a_share_is_computed_in_every_step_and_all_in_clean_passes() -> None:
    plan = DISTILLED.plan(SEVEN)
    schedule = DISTILLED.lay_out(SEVEN, plan, 0.2)
    partial = schedule.mode == Mode.PARTIAL
    assert (schedule.tokens[partial] == L // 5).all()
    assert partial.sum(axis=(0, 2)).tolist() == [7 * 64, 7 * 16]
    assert (schedule.tokens[schedule.mode == Mode.CLEAN] == L).all()
    reused = predict_run(
        EngineCosts(DISTILLED.flops, 0, 2, 2), DISTILLED.lay_out(SEVEN, plan, 0.0), NO_LIMITS
    )
    # Neither blocks nor head meet a reused token; 7 x 64 chunks and 6 clean ones are embedded.
    clean = sum((schedule.tokens * (schedule.mode == Mode.CLEAN)).ravel().tolist())
    blocks = DISTILLED.flops.blocks(clean, L, 50)  # they see themselves alone
    texts = sum(
        DISTILLED.flops.text_projection(length) + DISTILLED.flops.text_keys(length)
        for length in [100] * 7 + [50]
    )
    embedded = DISTILLED.flops.embed((7 * 64 + 6) * L)
    assert reused.total.flops + reused.total.attention == blocks + texts + embedded


def test_a_branch_moves_as_many_keys_as_it_keeps() -> None:
    schedule = DISTILLED.lay_out(SEVEN, DISTILLED.plan(SEVEN))
    assert schedule.slots == (5, 4)
    costs = EngineCosts(DISTILLED.flops, 0, 2, 2)
    kept, more = (
        predict_run(costs, replace(schedule, slots=slots), NO_LIMITS).total.copied
        for slots in ((5, 4), (5, 5))
    )
    # Read once, and joined with the new rows in keys and in values, in each of 7 x 16 copies.
    assert more - kept == 7 * 16 * 34 * 4 * L * 8 * 128 * 2


def test_the_bound_of_a_chunk_is_that_of_its_passes_by_hand() -> None:
    """One chunk, four steps, no copies: four passes that see nothing but themselves."""
    options = replace(DISTILLED.defaults, num_frames=24, num_inference_steps=4, nearly_clean=False)
    time = predict(DISTILLED, Request(options, "a800", "bf16"))["time"]["policy"]["total"]
    rate, bandwidth = DEVICES["a800"].flops["bf16"], DEVICES["a800"].bandwidth
    # q, text q, k and v; out of both attentions; feed-forward of 12288; scores and their use.
    matrices = 3072 * (2 * 3072 + 2 * 1024) + 2 * 3072 * 3072 + 2 * 3072 * 12288
    block = (2 * L * matrices + 4 * L * 3072 * (L + 100)) / rate
    # Patches of 64 float32, rows of 3072 in 16 bit, a matrix of both.
    end = max(2 * L * 64 * 3072 / rate, (4 * L * 64 + 2 * L * 3072 + 2 * 64 * 3072) / bandwidth)

    def keys_of(tokens: int) -> float:
        projection, keys = 4096 * 3072, 34 * 2 * 3072 * 1024
        operations = 2 * tokens * (projection + keys)
        moved = 2 * (projection + keys) + 2 * ROW * tokens + tokens * (4 * 4096 + 2 * 3072)
        return max(operations / rate, moved / bandwidth)

    expected = 4 * (34 * block + 2 * end) + keys_of(100) + keys_of(50)
    assert time["bound"] == pytest.approx(expected, rel=1e-9)


# ---- memory


@pytest.mark.parametrize(
    ("model", "changes", "chunks"),
    [
        (DISTILLED, {}, 4 + 4),
        (DISTILLED, {"num_frames": 168}, 5 + 4),
        (DISTILLED, {"num_frames": 168, "nearly_clean": False}, 5),
        (DISTILLED, {"num_frames": 48}, 2 + 2),
        (BASE, {"num_frames": 240}, 5 + 5 + 4),
    ],
)
def test_a_branch_keeps_the_keys_that_anything_sees(model, changes, chunks: int) -> None:
    memory = memory_of(model, **changes)
    assert memory["kv_cache"] == chunks * L * ROW * 2
    active = min(4, (changes.get("num_frames", 96)) // 24)
    assert memory["residuals"] == active * L * 64 * 4  # velocities in float32


def test_without_ranges_every_chunk_is_kept() -> None:
    schedule = DISTILLED.config["schedule"] | {"kv_ranges": [], "clean_kv_range": None}
    model = replace(DISTILLED, config=DISTILLED.config | {"schedule": schedule})
    assert memory_of(model, num_frames=240)["kv_cache"] == (10 + 4) * L * ROW * 2


def test_a_prompt_has_keys_for_every_number_of_chunks_left_up_to_eight() -> None:
    for frames, captions in ((96, 4), (168, 7), (240, 8)):
        keys = memory_of(DISTILLED, num_frames=frames)["prompt_keys"]
        assert keys == (100 * captions + 50) * ROW * 2
    plain = replace(DISTILLED, tokens=(98, 50, 0))  # without special tokens there is one caption
    assert memory_of(plain, num_frames=168)["prompt_keys"] == (98 + 50) * ROW * 2


@pytest.mark.parametrize(("name", "billions"), [("magi-4.5b-distill", 4.44), ("magi-24b", 23.86)])
def test_the_weights_are_those_of_the_checkpoint(name: str, billions: float) -> None:
    model, layers = describe_model(name), describe_model(name).flops.layers
    tensors = transformer_tensors(MAGI[name].transformer)
    matrices = {key: np.prod(shape) for key, shape in tensors.items() if len(shape) > 1}
    block = sum(int(size) for key, size in matrices.items() if "layers." in key)
    flops = model.flops
    assert layers * (flops.block_weights + flops.context_weights) == block
    assert block / 1e9 == pytest.approx(billions, rel=1e-3)
    assert sum(map(np.prod, tensors.values())) / 1e9 == pytest.approx(billions, rel=0.02)
    # The keys of texts are made with one layer's weights at a time. Doubled channels are summed.
    held = block - (layers - 1) * flops.context_weights
    held += int(matrices["y_embedder.y_proj_xattn.0.weight"]) + 2 * 64 * flops.dim
    assert memory_of(model, num_inference_steps=4)["weights"] == 2 * held


def test_a_layer_of_the_text_encoder_is_that_of_t5() -> None:
    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(**T5_XXL))
    layer = sum(parameter.numel() for parameter in encoder.encoder.block[1].parameters())
    assert DISTILLED.text_layer == pytest.approx(layer, rel=1e-4)
    assert memory_of(DISTILLED, num_frames=24)["text_encoder"] == 2 * DISTILLED.text_layer


def test_what_makes_it_fit_are_settings_that_this_family_has() -> None:
    memory = predict(LARGE, Request(LARGE.defaults, "h100", "bf16"))["memory"]
    assert not memory["fits"]
    kinds = {way["change"].split(" (")[0] for way in memory["ways_to_fit"]}
    assert kinds >= {"streamed weights", "a shorter video"}
    distilled = describe_model("magi-24b-distill")
    memory = predict(distilled, Request(distilled.defaults, "h100", "bf16"))["memory"]
    assert {way["change"]: way["settings"] for way in memory["ways_to_fit"]}[
        "no nearly clean guidance (--no-nearly-clean)"
    ] == {"nearly_clean": False}


# ---- what is refused


def recorded(model, options) -> DecisionTrace:
    plan = model.plan(options)
    mode = model.family.passes(model.config, options, plan)
    said = model.family.describe(model.config, options, plan, model.tokens)
    windows = [asdict(window) for window in plan.windows]
    trace = DecisionTrace.empty(plan.shape, said | {"windows": windows, "options": asdict(options)})
    trace.mode[:] = mode
    trace.recompute[mode >= 0] = 1
    trace.bucket[mode >= 0] = plan.shape.tokens
    return trace


def test_a_trace_of_another_family_or_model_is_refused(tmp_path: Path) -> None:
    small = {"height": 32, "width": 32, "num_inference_steps": 4, "num_frames": 24}
    base = replace(BASE.defaults, **small)
    skyreels = describe_model("skyreels-df-1.3b-540p")
    other = replace(skyreels.defaults, height=32, width=32, num_inference_steps=3, num_frames=17)
    cases = [
        (skyreels, other, recorded(BASE, base), "got one with the settings nearly_clean, which"),
        (BASE, base, recorded(skyreels, other), "got one with the settings guidance_scale, "),
        (
            DISTILLED,
            base,
            recorded(BASE, base),
            "expected a run with 2 passes of guidance, got one with 3. Pass a trace of this model.",
        ),
        (
            DISTILLED,
            base,
            recorded(DISTILLED, replace(base, nearly_clean=False)),
            "nearly_clean True, got one with nearly_clean False. Pass --no-nearly-clean.",
        ),
    ]
    for model, options, trace, message in cases:
        with pytest.raises(ValueError, match=message):
            predict(model, Request(options, "a800", "bf16", trace=trace))
    whole = predict(BASE, Request(base, "a800", "bf16", trace=recorded(BASE, base)))
    assert whole["computed_share"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device=rtx-4080"], "Did you mean rtx-4090?"),
        (["--device=a800", "--guidance-scale=1"], "guidance_scale: expected a setting of this mod"),
        (["--device=a800", "--base-num-frames=97"], "base_num_frames: expected a setting of this"),
        (["--device=a800", "--num-frames=100"], "num_frames: expected a multiple of 24, got 100."),
        (["--device=a800", "--num-inference-steps=6"], "num_inference_steps: expected a multiple"),
        (["--device=this-cpu"], "mc-bench predict --device this-cpu: expected a bundle of another"),
    ],
)
def test_what_cannot_be_predicted_is_refused(arguments, message: str) -> None:
    assert message in run("magi-4.5b", *arguments, code=2)


def test_a_setting_of_this_family_is_refused_for_the_other() -> None:
    text = run("skyreels-mini", "--device=a800", "--no-nearly-clean", code=2)
    assert "nearly_clean: expected a setting of this model" in text
