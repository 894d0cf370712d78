"""MAGI-1 checkpoints: how they are opened, and what is said of those that cannot be."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from mc_engines.bundle import Bundle
from mc_engines.errors import CheckpointError
from mc_engines.published import MAGI
from mc_export import write_component
from mc_export.checkpoint import load_checkpoint
from mc_export.cli import main
from mc_export.export_bundle import count_steps, export_bundle
from mc_export.magi_checkpoint import (
    ACCEPTED_LAYOUT,
    load_magi_checkpoint,
    load_special_tokens,
)
from mc_export.parity import Comparison
from mc_export.size_plan import plan_components

GOLDEN = Path(__file__).parents[1] / "golden"
DISTILLED = "inference_weight.distill"
FROM_EXAMPLE = "Take config.json from where the weights come from."


def write(folder: Path, case: str = "magi-a", **sections: dict) -> Path:
    """A copy of a golden checkpoint whose configuration is changed, by section."""
    shutil.copytree(GOLDEN / case, folder, dirs_exist_ok=True)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for section, changes in sections.items():
        config[section] |= changes
    file.write_text(json.dumps(config))
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_one_file_and_shards_are_opened_without_reading_them():
    for case, weights, distilled in (
        ("magi-a", DISTILLED, True),
        ("magi-b", "inference_weight", False),
    ):
        checkpoint = load_magi_checkpoint(GOLDEN / case)
        stored = {}
        for file in (GOLDEN / case / weights).glob("*.safetensors"):
            stored |= load_file(file)
        part = checkpoint.transformer
        assert part.tensors.names() == stored.keys()
        assert all(torch.equal(part.tensors.load(name), stored[name]) for name in stored)
        assert part.config.keys() == MAGI["magi-24b"].transformer.keys()
        assert part.config["distill"] is distilled
        assert (checkpoint.family, checkpoint.text_encoder, checkpoint.vae) == ("magi", None, None)
        assert checkpoint.scheduler["num_steps"] == 16


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"engine_config": {"fp8_quant": True}},
            "expected weights of 16 or 32 bits, got fp8_quant true. "
            "Use the checkpoint of the same model that is not quantised.",
        ),
        (
            {"runtime_config": {"cfg_number": 3}},
            f"expected cfg_number 1 of a distilled model, got 3. {FROM_EXAMPLE}",
        ),
        (
            {"engine_config": {"distill": False}},
            f"expected cfg_number 3 of a base model, got 1. {FROM_EXAMPLE}",
        ),
        (
            {"runtime_config": {"chunk_width": 5}},
            "expected chunk_width 6, which the model was trained with, got 5. " + FROM_EXAMPLE,
        ),
        (
            {"runtime_config": {"num_steps": 18}},
            "expected num_steps that window_size cuts into equal stages, got 18 steps and 4 "
            f"stages. {FROM_EXAMPLE}",
        ),
        (
            {"runtime_config": {"window_size": 2, "noise2clean_kvrange": [5, 4, 3]}},
            "expected num_steps that noise2clean_kvrange cuts into equal stages, got 16 steps and "
            f"3 stages. {FROM_EXAMPLE}",
        ),
        (
            {"runtime_config": {"window_size": 0}},
            "expected num_steps that window_size cuts into equal stages, got 16 steps and 0 "
            f"stages. {FROM_EXAMPLE}",
        ),
        (
            {"runtime_config": {"text_scales": [7.5]}},
            "expected cfg_t_range, prev_chunk_scales and text_scales of one length, got 1 and 5. "
            + FROM_EXAMPLE,
        ),
    ],
    ids=["fp8", "three-passes", "one-pass", "chunk", "window", "ranges", "no-window", "scales"],
)
def test_settings_that_do_not_fit_are_named(tmp_path, sections, message):
    with pytest.raises(CheckpointError) as error:
        load_magi_checkpoint(write(tmp_path, **sections))
    assert str(error.value) == f"{tmp_path / 'config.json'}: {message}"


def test_all_keys_are_seen_where_no_range_is_given(tmp_path):
    changes = {"noise2clean_kvrange": [], "clean_chunk_kvrange": -1}
    checkpoint = load_magi_checkpoint(write(tmp_path, runtime_config=changes))
    assert checkpoint.scheduler["noise2clean_kvrange"] == []


def test_a_configuration_without_a_key_is_named(tmp_path):
    file = write(tmp_path) / "config.json"
    config = json.loads(file.read_text())
    del config["model_config"]["num_layers"], config["model_config"]["kv_channels"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as error:
        load_magi_checkpoint(tmp_path)
    assert str(error.value) == (
        f"{file}: expected model_config with kv_channels, num_layers, got none of that name. "
        f"{FROM_EXAMPLE} Another family has another --model."
    )


def test_what_is_no_checkpoint_is_told_what_one_is(tmp_path):
    for folder, got in ((tmp_path, "a folder without config.json"), (tmp_path / "x", "no folder")):
        with pytest.raises(CheckpointError) as error:
            load_magi_checkpoint(folder)
        assert str(error.value) == f"{folder}: expected {ACCEPTED_LAYOUT}, got {got}."


def test_a_checkpoint_of_the_other_family_is_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match=r"got one of MAGI-1\. Pass --model magi\.$"):
        load_checkpoint(GOLDEN / "magi-a")
    shutil.copy(GOLDEN / "skyreels-a/transformer/config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"expected model_config with .* another --model"):
        load_magi_checkpoint(tmp_path)


def test_weights_that_belong_to_another_configuration_are_named(tmp_path):
    (write(tmp_path) / DISTILLED).rename(tmp_path / "inference_weight.fp8.distill")
    with pytest.raises(CheckpointError) as error:
        load_magi_checkpoint(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / DISTILLED}: expected the weights that config.json with distill True asks "
        "for, got inference_weight.fp8.distill. Check that they belong together; quantised "
        "weights (.fp8) are not read."
    )


def test_packed_weights_are_told_how_to_unpack_them(tmp_path):
    folder = write(tmp_path, "magi-b") / "inference_weight"
    for shard in folder.glob("*.safetensors"):
        shard.rename(shard.with_name(f"{shard.name}.zst"))
    with pytest.raises(CheckpointError) as error:
        load_magi_checkpoint(tmp_path)
    assert str(error.value) == (
        f"{folder / 'model-00001-of-00002.safetensors.zst'}: expected unpacked weights, got 2 "
        f"packed with zstd. Run: zstd -d {folder}/*.zst"
    )
    for shard in folder.glob("*.zst"):  # unpacked beside what they were packed in
        shutil.copy(shard, shard.with_suffix(""))
    assert load_magi_checkpoint(tmp_path).transformer.tensors.names()


# ---- tensors


def export(folder: Path, target: Path) -> None:
    export_bundle(load_magi_checkpoint(folder), target)


def test_large_configuration_and_small_weights_are_told_apart(tmp_path):
    """As a 24B configuration beside 4.5B weights is: more layers, other widths."""
    folder = write(tmp_path / "checkpoint", model_config={"num_layers": 3, "hidden_size": 256})
    with pytest.raises(CheckpointError) as error:
        export(folder, tmp_path / "bundle")
    message = str(error.value)
    assert message.startswith("transformer: expected 92 tensors, got 66: 26 missing (videodit_bl")
    assert "wrongly shaped (final_linear.linear.weight (32, 128) instead of (32, 256)" in message
    assert message.endswith("Check that weights and configuration belong together.")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rope.bands": None}, "1 missing (rope.bands)"),
        ({"rope.scale": torch.ones(2)}, "1 unexpected (rope.scale)"),
        ({"rope.bands": torch.ones(5)}, "1 wrongly shaped (rope.bands (5,) instead of (4,))"),
        (
            {"rope.bands": torch.ones(4).to(torch.float8_e4m3fn)},
            "1 not float32, float16 or bfloat16 (rope.bands)",
        ),
    ],
    ids=["missing", "unexpected", "shape", "type"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, problem):
    file = write(tmp_path / "checkpoint") / DISTILLED / "model.safetensors"
    tensors = load_file(file) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(CheckpointError, match=r"^transformer: expected 66 tensors, got ") as error:
        export(tmp_path / "checkpoint", tmp_path / "bundle")
    assert f": {problem}. " in str(error.value)


@pytest.fixture
def quick(monkeypatch):
    """Graphs are neither traced nor proved."""
    monkeypatch.setattr(write_component, "_write_graphs", lambda source, model, folder, baked: {})
    monkeypatch.setattr(write_component, "export_component", lambda source: None)
    good = Comparison("head", "fp32", None, "patches", 0.0, 0.0, 1.0, 1.0, 1e-4)
    monkeypatch.setattr(write_component, "_prove", lambda written: [good])


@pytest.mark.parametrize(
    "name",
    [
        "y_embedder.null_caption_embedding",
        "rope.bands",
        "x_embedder.weight",
        "videodit_blocks.layers.1.self_attention.linear_proj.weight",
        "videodit_blocks.layers.0.self_attention.k_layernorm_xattn.bias",
        "final_linear.linear.weight",
    ],
)
def test_a_weight_that_is_not_finite_is_named(quick, tmp_path, name):
    file = write(tmp_path / "checkpoint") / DISTILLED / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        export(tmp_path / "checkpoint", tmp_path / "bundle")
    assert str(error.value).startswith(f"tensor '{name}': expected finite values, got NaN")
    assert not (tmp_path / "bundle").exists()


def test_sixteen_bits_stay_but_for_the_weights_of_norms(quick, tmp_path):
    file = write(tmp_path / "checkpoint") / DISTILLED / "model.safetensors"
    save_file({name: x.bfloat16() for name, x in load_file(file).items()}, file)
    checkpoint = load_magi_checkpoint(tmp_path / "checkpoint")
    for dtype, norms in ((None, "float32"), ("bf16", "bfloat16")):
        words: list[str] = []
        export_bundle(checkpoint, tmp_path / "bundle", dtype, True, words.append)
        assert len(words) == len(set(words)) == count_steps(checkpoint) == 19
        bundle = Bundle.open(tmp_path / "bundle")
        assert bundle.manifest.weights_dtype == "bfloat16"
        block = bundle.map_tensors("weights/block.01.safetensors")
        assert block["q_norm.weight"].dtype.name == norms
        assert block["qkv.weight"].dtype.name == "bfloat16"
        null = bundle.map_tensors("weights/null_text.safetensors")["embedding"]
        assert (null.dtype.name, null.shape) == ("bfloat16", (50, 32))


# ---- the command


def test_a_dry_run_counts_what_the_bundle_holds():
    result = run("--model", "magi", "--checkpoint", GOLDEN / "magi-a", "--dry-run")
    assert result.exit_code == 0, result.output
    for part in ("text_encoder", "vae"):
        assert f"{part}: not in {GOLDEN / 'magi-a'}, skipped: " in result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    layer = 128 * 384 + 256 * 128 + 2 * 128 * 256 + 33 * 256 + 4 * 256 + 6 * 32
    assert rows["block"][:2] == ["2", f"{2 * layer:,}"]
    assert rows["null_text"][:2] == ["1", f"{50 * 32:,}"]
    assert rows["timestep"][1] == f"{257 * 32 + 33 * 32 + 33 * 32 + 2 * 32:,}"
    assert "64 x 96 pixels, 120 frames, 144 tokens a chunk; keys of 5 + 4 chunks" in result.stdout


def test_tables_and_components_are_counted_in_their_type():
    (size,) = plan_components([], {"a": {"x": torch.zeros(3, 2)}, "b": {}}, torch.float16)
    assert (size.name, size.layers, size.parameters, size.bytes) == ("a", 1, 6, 12)


def test_without_a_checkpoint_its_layout_is_named(tmp_path):
    for model in ("magi", "magi-24b"):
        result = run("--model", model, "-o", tmp_path / "bundle")
        assert result.exit_code == 2
        assert "Missing option '--checkpoint': expected config.json (a file of" in result.stderr


def test_a_published_name_is_held_against_the_checkpoint(tmp_path):
    result = run(
        *("--model", "magi-4.5b", "--checkpoint", GOLDEN / "magi-b", "-o", tmp_path / "bundle")
    )
    assert result.exit_code == 1
    assert "expected the transformer of magi-4.5b, got one of other sizes. Pass --model magi" in (
        result.stderr
    )


def test_the_command_exports_the_transformer_and_says_so(quick, tmp_path):
    result = run("--model", "magi", "--checkpoint", GOLDEN / "magi-a", "-o", tmp_path / "bundle")
    assert result.exit_code == 0, result.output
    for part in ("text_encoder", "tokenizer", "vae", "special_tokens.npz"):
        assert f"{part}: not in {GOLDEN / 'magi-a'}, skipped: " in result.stderr
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert (manifest.family, manifest.missing) == ("magi", ("text_encoder", "tokenizer", "vae"))
    assert "weights/special_tokens.safetensors" not in manifest.files


# ---- special tokens


def write_tokens(folder: Path, tokens: np.ndarray, name: str = "other_tokens") -> Path:
    np.savez(folder / "special_tokens.npz", **{name: tokens})
    return folder / "special_tokens.npz"


def test_special_tokens_are_taken_along_as_the_original_rounds_them(quick, tmp_path):
    tokens = np.load(GOLDEN / "magi-a/inputs.npz")["special_tokens"]
    folder = write(tmp_path / "checkpoint")
    write_tokens(folder, tokens)
    words: list[str] = []
    checkpoint = load_magi_checkpoint(folder)
    export_bundle(checkpoint, tmp_path / "bundle", report=words.append)
    assert len(words) == len(set(words)) == count_steps(checkpoint) == 20
    stored = Bundle.open(tmp_path / "bundle").map_tensors("weights/special_tokens.safetensors")
    np.testing.assert_array_equal(stored["embedding"], tokens.astype(np.float16))
    result = run("--model", "magi", "--checkpoint", folder, "--dry-run")
    assert "special_tokens.npz" not in result.stderr
    assert f"{20 * 32}" in next(x for x in result.stdout.splitlines() if "special_tokens" in x)


def test_special_tokens_of_another_kind_are_refused(tmp_path):
    for tokens, name, message in (
        (np.ones((20, 8)), "other_tokens", "shape (20, 32), got (20, 8). "),
        (np.full((20, 32), 1e9), "other_tokens", "finite other_tokens of shape (20, 32), got (20"),
        (np.ones((20, 32)), "tokens", "an npz with other_tokens, got 'other_tokens is not a file"),
    ):
        with pytest.raises(CheckpointError) as error:
            load_special_tokens(write_tokens(tmp_path, tokens, name), 32)
        assert message in str(error.value)
        assert str(error.value).endswith("Take the file from the example folder's assets.")
    (tmp_path / "special_tokens.npz").write_bytes(b"PK\3\4 no npz")
    with pytest.raises(CheckpointError, match=r"expected an npz with other_tokens, got "):
        load_special_tokens(tmp_path / "special_tokens.npz", 32)
