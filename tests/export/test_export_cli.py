"""mc-export: what it says, and with which code it ends."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mc_export.cli import main

GOLDEN = Path(__file__).parents[1] / "golden" / "skyreels-a"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_dry_run_prints_the_plan_and_what_the_checkpoint_lacks(tmp_path: Path) -> None:
    result = run("--model", "skyreels", "--checkpoint", GOLDEN, "--dry-run")
    assert result.exit_code == 0
    assert f"vae: not in {GOLDEN}, skipped: latents cannot be decoded" in result.stderr
    assert f"text_encoder: not in {GOLDEN}, skipped: prompts cannot be encoded" in result.stderr
    assert "KV cache, one branch" in result.stdout
    assert "10,200 tokens a chunk" in result.stdout


def test_a_dry_run_plans_the_video_it_is_asked_for() -> None:
    result = run(
        *("--model", "skyreels", "--checkpoint", GOLDEN, "--dry-run"),
        *("--height", 64, "--width", 96, "--base-num-frames", 37),
    )
    assert "64 x 96 pixels, 37 frames a window, 120 tokens a chunk, 240 a window" in result.stdout


def test_without_an_output_it_is_wrong_usage() -> None:
    result = run("--model", "skyreels", "--checkpoint", GOLDEN)
    assert result.exit_code == 2
    assert "Missing option '-o' / '--output'. Name the bundle's folder." in result.stderr


def test_without_checkpoint_and_hub_the_accepted_forms_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    result = run("--model", "skyreels", "-o", tmp_path / "bundle")
    assert result.exit_code == 2
    assert "pip install 'motioncache[export]'" in result.stderr
    assert "a diffusers folder" in result.stderr and "the original layout" in result.stderr


def test_a_published_name_is_held_against_the_checkpoint(tmp_path: Path) -> None:
    result = run(
        "--model", "skyreels-df-14b-540p", "--checkpoint", GOLDEN, "-o", tmp_path / "bundle"
    )
    assert result.exit_code == 1
    assert (
        "expected the transformer of skyreels-df-14b-540p, got one of other sizes" in result.stderr
    )


def test_another_family_is_wrong_usage(tmp_path: Path) -> None:
    result = run("--model", "wan", "--checkpoint", GOLDEN, "-o", tmp_path / "bundle")
    assert result.exit_code == 2
    assert "'wan' is not one of 'skyreels', 'magi'" in result.stderr


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "transformer", folder / "transformer")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"inject_sample_info": False}))
    result = run("--model", "skyreels", "--checkpoint", folder, "-o", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "fps_embedding.weight" in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_an_output_that_exists_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "file").touch()
    result = run("--model", "skyreels", "--checkpoint", GOLDEN, "-o", tmp_path / "bundle")
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert "traced" not in result.stderr
