"""`mc-bench predict` on a bundle of MAGI-1 with every part, of random weights, and its traces."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from magi_parts import write_whole
from safetensors.torch import load_file

from mc_runtime.bench.cli import main
from mc_runtime.bench.memory_plan import plan_memory
from mc_runtime.bench.predict import Request, predict
from mc_runtime.bench.predicted_model import describe_model
from mc_runtime.families.magi_schedule import MagiSchedule
from mc_runtime.families.magi_work import plan_uncached
from mc_runtime.flops import count_work
from mc_runtime.pipeline import VideoPipeline
from motioncache import make_policy

CASE = Path(__file__).parent.parent / "golden" / "magi-a"
RULE = {"threshold": 0.06, "chunk_threshold": 0.03, "warmup_steps": 1, "coarse_steps": 5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_whole(CASE, tmp_path_factory.mktemp("magi") / "special", special=True)


@pytest.fixture(scope="module")
def bundle(export, checkpoint) -> Path:
    return export(checkpoint, "magi")


@pytest.fixture(scope="module")
def pipeline(bundle) -> VideoPipeline:
    return VideoPipeline.from_bundle(bundle, threads=1)


@pytest.fixture(scope="module")
def trace(pipeline):
    """Of a run that skips a part of the tokens."""
    policy = make_policy("motioncache", RULE, "magi")
    width = pipeline.bundle.manifest.config["transformer"]["text_dim"]
    embeds = np.random.default_rng(0).standard_normal((1, 9, width), np.float32)
    return pipeline.run(prompt_embeds=embeds, policy=policy, decode=False).trace


def walk(model, request):
    work = predict(model, request)["work"]
    return work["flops"] + work["attention"]


def test_a_trace_is_walked_with_the_operations_that_are_counted_of_it(bundle, trace) -> None:
    model = describe_model(str(bundle))
    counted = count_work(model.flops, trace, padded=True).total
    assert walk(model, Request(model.defaults, "a800", "bf16", trace=trace)) == counted
    plan, null = model.plan(model.defaults), model.tokens[1]
    schedule = MagiSchedule.from_manifest(model.config, model.defaults)
    captions = [11] * plan.shape.active.shape[1]  # two special tokens before those of the prompt
    uncached = plan_uncached(schedule, plan, captions, null)
    told = replace(model, tokens=(9, *model.tokens[1:]))
    expected = count_work(model.flops, uncached, padded=False).total
    assert walk(told, Request(model.defaults, "a800", "bf16")) == expected > counted


def test_the_command_takes_the_trace_and_keeps_its_shares(bundle, trace, tmp_path: Path) -> None:
    path, output = tmp_path / "run.trace", tmp_path / "report.json"
    trace.save(path)
    arguments = ["predict", str(bundle), "--device=a800", f"--trace={path}", "-o", str(output)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(output.read_text())
    assert 0 < report["computed_share"] < 1
    assert report["text_tokens"] == trace.run["encoded_tokens"]
    result = CliRunner().invoke(main, [*arguments, "--overwrite", "--num-frames=48"])
    assert result.exit_code == 2
    assert f"Pass --num-frames {trace.run['options']['num_frames']}." in result.stderr


def test_text_encoder_and_vae_of_a_bundle_are_counted(checkpoint, bundle, pipeline) -> None:
    model = describe_model(str(bundle))
    manifest = pipeline.bundle.manifest
    layer = manifest.components["text_layer"].graphs["fp32"].weights
    assert model.text_layer == sum(math.prod(spec.shape) for spec in layer)
    vae = load_file(checkpoint / "vae/diffusion_pytorch_model.safetensors")
    positions = "cls_token", "pos_embed"  # that no graph has
    stored = sum(x.numel() for name, x in vae.items() if not name.endswith(positions))
    half = len(vae["encoder.last_layer.weight"]) // 2 * 257  # of the mean, and biases
    assert model.vae_weights == pytest.approx(stored - half, rel=2e-3)
    plan = plan_memory(model, model.defaults, "fp16")
    assert plan.vae == 2 * model.vae_weights and plan.text_encoder == 2 * model.text_layer
    memory = predict(model, Request(model.defaults, "a800", "bf16"))["memory"]
    assert memory["left_out"] == ["activations of the text encoder", "activations of the VAE"]
