"""The small model in the package: found offline, of the right sizes, small enough to ship."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.train_mini.presets import PRESETS
from scripts.train_mini.text import MAX_TOKENS, TEXT_DIM
from scripts.train_mini.transformer import build_transformer

from mc_engines.published import PUBLISHED
from mc_export.checkpoint import load_checkpoint
from mc_export.cli import main
from mc_export.export_bundle import expected_tensors
from mc_export.fetch import PACKAGED, fetch_checkpoint
from mc_export.onnx_export import export_component
from mc_export.skyreels_components import transformer_components
from mc_export.skyreels_family import _max_tokens
from motioncache import Preset, make_policy
from motioncache.options import parse_options

LIMIT = 16 * 2**20


def test_it_is_found_without_the_hub(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert fetch_checkpoint("skyreels-mini") == PACKAGED


def test_every_part_is_there_with_the_published_sizes() -> None:
    checkpoint = load_checkpoint(PACKAGED)
    assert checkpoint.transformer.config == dict(PUBLISHED["skyreels-mini"].transformer)
    assert checkpoint.tokenizer is not None and checkpoint.scheduler is not None
    assert checkpoint.scheduler["flow_shift"] == pytest.approx(8)
    assert expected_tensors(checkpoint).keys() == {"transformer", "text_encoder", "vae"}


def test_prompts_are_padded_as_in_training() -> None:
    length = json.loads((PACKAGED / "tokenizer" / "tokenizer_config.json").read_text())
    assert _max_tokens(PACKAGED / "tokenizer") == length["model_max_length"] == MAX_TOKENS <= 512


@torch.no_grad()
def test_its_timesteps_keep_their_digits_in_onnx_runtime() -> None:
    """The oracle is diffusers' embedder in float64."""
    part = load_checkpoint(PACKAGED).transformer
    components = transformer_components(part.config, part.tensors)
    source = next(component for component in components if component.name == "timestep")
    graph = ir.to_proto(export_component(source)).SerializeToString()
    steps = torch.arange(0, 1000, 37)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    modulation, head = session.run(None, {"timesteps": steps.numpy(), "fps_id": np.array([1])})
    model = build_transformer().double()
    model.load_state_dict(load_file(PACKAGED / "transformer" / SAFETENSORS_WEIGHTS_NAME))
    fps = model.fps_projection(model.fps_embedding(torch.tensor([1])))
    text = torch.zeros(1, 1, TEXT_DIM, dtype=torch.float64)
    expected_head, expected, *_ = model.condition_embedder(steps, text)
    expected = (expected + fps).unflatten(1, (6, -1))
    np.testing.assert_allclose(head, expected_head, atol=3e-6, rtol=0)
    np.testing.assert_allclose(modulation, expected, atol=3e-6, rtol=0)


def test_a_tokenizer_without_a_length_takes_512_tokens(tmp_path: Path) -> None:
    assert _max_tokens(None) == _max_tokens(tmp_path) == 512
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1e30}')
    assert _max_tokens(tmp_path) == 512


def test_it_is_at_most_16_mb_of_float16() -> None:
    assert sum(path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file()) <= LIMIT
    files = list(PACKAGED.rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


def test_its_presets_are_those_of_their_script_and_name_no_machine() -> None:
    presets = load_checkpoint(PACKAGED).presets
    names = {f"{policy}:calibrated" for policy in ("teacache", "flowcache", "motioncache")}
    assert presets.keys() == PRESETS.keys() == names | {"motioncache:fitted"}
    for key, value in presets.items():
        preset = Preset.from_json(key, value)
        assert (preset.key, preset.origin, preset.steps) == (key, "calibrated", 50)
        config: Any = make_policy(preset.policy, preset.options).config
        found = type(config)(threshold=config.threshold, coefficients=config.coefficients)
        assert config == replace(found, **parse_options(type(config), PRESETS[key]))
        assert "mc-calibrate" in preset.source and "/" not in preset.source


def test_a_dry_run_plans_its_own_size() -> None:
    result = CliRunner().invoke(main, ["--model", "skyreels-mini", "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "64 x 64 pixels, 97 frames a window, 320 tokens a chunk, 1,600 a window" in result.stdout


def test_another_checkpoint_does_not_pass_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint" / "transformer"
    shutil.copytree(PACKAGED / "transformer", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 5}))
    arguments = ["--model", "skyreels-mini", "--checkpoint", str(folder.parent)]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "bundle")])
    assert result.exit_code == 1
    assert "expected the transformer of skyreels-mini, got one of other sizes" in result.stderr
