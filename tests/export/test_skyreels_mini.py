"""The small model in the package: found offline, of the right sizes, small enough to ship."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.train_mini.presets import PRESETS
from scripts.train_mini.text import MAX_TOKENS

from mc_engines.published import PUBLISHED
from mc_export.checkpoint import load_checkpoint
from mc_export.cli import main
from mc_export.export_bundle import expected_tensors
from mc_export.fetch import PACKAGED, fetch_checkpoint
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
    assert _max_tokens(PACKAGED / "tokenizer") == MAX_TOKENS


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
    assert presets.keys() == PRESETS.keys()
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
