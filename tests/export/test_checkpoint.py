"""Opening a checkpoint in diffusers' layout, and what is said of one that cannot be used."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_tiny_checkpoint
from transformers import UMT5Config, UMT5EncoderModel

from mc_engines.errors import CheckpointError
from mc_export.checkpoint import ACCEPTED_FORMS, check_tensors, load_checkpoint, load_finite
from mc_export.random_source import RandomSource
from motioncache import Preset

GOLDEN = Path(__file__).parents[1] / "golden"
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 20,
    "num_layers": 2,
    "text_dim": 12,
    "freq_dim": 8,
}


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    sizes = UMT5Config(d_model=12, d_kv=4, d_ff=16, num_heads=2, num_layers=2, vocab_size=32)
    return {
        "transformer": SkyReelsV2Transformer3DModel(**TRANSFORMER),
        "vae": AutoencoderKLWan(base_dim=4, dim_mult=[1, 1], temperal_downsample=[True]),
        "text_encoder": UMT5EncoderModel(sizes).to(torch.bfloat16),
    }


@pytest.fixture(scope="module")
def folder(models: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny checkpoint as diffusers and transformers write it, sharded."""
    folder = tmp_path_factory.mktemp("diffusers")
    for name, model in models.items():
        model.save_pretrained(folder / name, max_shard_size="10KB")
    UniPCMultistepScheduler(num_train_timesteps=999).save_pretrained(folder / "scheduler")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    index = {"_class_name": "SkyReelsV2DiffusionForcingPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_every_part_opens_as_its_model_has_it(models: dict, folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    for name, model in models.items():
        part = getattr(checkpoint, name)
        expected = model.state_dict()
        expected.pop("encoder.embed_tokens.weight", None)  # the same table as shared.weight
        assert part.tensors.names() == expected.keys()
        for tensor, value in expected.items():
            assert part.tensors.shape(tensor) == value.shape
            assert part.tensors.dtype(tensor) == value.dtype
            assert torch.equal(part.tensors.load(tensor), value)
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    assert checkpoint.transformer.config["ffn_dim"] == 20
    assert checkpoint.transformer.config["rope_max_seq_len"] == 1024
    assert checkpoint.vae is not None and checkpoint.vae.config["base_dim"] == 4
    assert checkpoint.text_encoder is not None and checkpoint.text_encoder.config["d_kv"] == 4
    assert checkpoint.scheduler is not None
    assert checkpoint.scheduler["num_train_timesteps"] == 999
    assert checkpoint.tokenizer == folder / "tokenizer"


@pytest.mark.parametrize("case", ["skyreels-a", "skyreels-b"])
def test_a_folder_with_the_transformer_alone_opens(case: str) -> None:
    checkpoint = load_checkpoint(GOLDEN / case)
    stored = load_file(GOLDEN / case / "transformer" / "diffusion_pytorch_model.safetensors")
    assert checkpoint.transformer.tensors.names() == stored.keys()
    assert checkpoint.path == GOLDEN / case
    for part in ("text_encoder", "vae", "tokenizer", "scheduler"):
        assert getattr(checkpoint, part) is None


def test_a_tokenizer_without_its_json_counts_as_missing(tmp_path: Path) -> None:
    folder = write(tmp_path, {})
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_text("")
    assert load_checkpoint(folder).tokenizer is None


def write(folder: Path, change: dict, index: dict | None = None) -> Path:
    """Write a transformer whose configuration alone is checked."""
    (folder / "transformer").mkdir()
    config = {"_class_name": "SkyReelsV2Transformer3DModel"} | TRANSFORMER | change
    config = {key: value for key, value in config.items() if value != "absent"}
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, folder / "transformer" / "x.safetensors")
    if index is not None:
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "WanTransformer3DModel"}, "got WanTransformer3DModel"),
        ({"image_dim": 1280}, r"got an image-to-video one \(image_dim 1280\)"),
        (
            {"added_kv_proj_dim": 24, "in_channels": 36},
            r"image-to-video one \(added_kv_proj_dim 24, in_channels 36\)",
        ),
        ({"ffn_dim": "absent"}, "config.json: expected the keys ffn_dim, got none of that name"),
    ],
)
def test_another_transformer_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write(tmp_path, change))


@pytest.mark.parametrize("pipeline", ["SkyReelsV2Pipeline", "WanPipeline"])
def test_a_pipeline_without_diffusion_forcing_is_refused(tmp_path: Path, pipeline: str) -> None:
    message = f"expected a SkyReelsV2DiffusionForcingPipeline, got {pipeline}. Use one of skyreels-"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write(tmp_path, {}, {"_class_name": pipeline}))


def test_what_is_no_checkpoint_is_told_the_accepted_forms(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, got in ((tmp_path, "a folder with neither"), (tmp_path / "file", "no folder")):
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        assert str(caught.value) == f"{path}: expected {ACCEPTED_FORMS}, got {got}."


def test_the_transformer_folder_itself_is_told_to_give_its_parent(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="Give the folder that it lies in"):
        load_checkpoint(folder / "transformer")


@pytest.mark.parametrize("content", ["{", "[]", "\0"])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: str) -> None:
    write(tmp_path, {})
    (tmp_path / "transformer" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: expected (a )?JSON"):
        load_checkpoint(tmp_path)


def test_a_part_without_weights_is_an_error_not_a_missing_part(tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"vae: expected weights in \*\.safetensors, got none"
    ):
        load_checkpoint(tmp_path)


SHAPES = {"a": (2, 3), "b": (4,), "c": (1,)}


def test_tensors_that_fit_pass() -> None:
    check_tensors("part", RandomSource(SHAPES, torch.float16, 0), SHAPES)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"a": (2, 3), "b": (4,)}, "1 missing (c)"),
        (SHAPES | {"d": (1,)}, "1 unexpected (d)"),
        (SHAPES | {"b": (5,)}, "1 wrongly shaped (b (5,) instead of (4,))"),
        (
            {"b": (4,), **{f"x{i}": (1,) for i in range(5)}},
            "2 missing (a, c); 5 unexpected (x0, x1, x2 and 2 more)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(changed: dict, problem: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_tensors("transformer", RandomSource(changed, torch.float32, 0), SHAPES)
    assert str(caught.value) == (
        f"transformer: expected 3 tensors, got {len(changed)}: {problem}. "
        "Check that weights and configuration belong together."
    )


def test_quantised_tensors_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"3 not float32, float16 or bfloat16 \(a, b, c\)"):
        check_tensors("vae", RandomSource(SHAPES, torch.float8_e4m3fn, 0), SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    write(tmp_path, {})
    tensor = torch.zeros(3, 5, dtype=dtype)
    tensor[1, 2] = value
    save_file({"blocks.0.x": tensor, "ok": -tensor[:1]}, tmp_path / "transformer" / "x.safetensors")
    tensors = load_checkpoint(tmp_path).transformer.tensors
    assert load_finite(tensors, "ok").dtype == dtype
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.x': expected finite values, got NaN"):
        load_finite(tensors, "blocks.0.x")


def test_presets_come_with_a_checkpoint_and_are_checked(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "checkpoint", parts=("transformer",))
    assert load_checkpoint(folder).presets == {}
    preset = Preset("flowcache", "calibrated", {"threshold": 0.1}, "calibrated", "a test")
    file = folder / "presets.json"
    file.write_text(json.dumps({preset.key: preset.to_json()}))
    assert load_checkpoint(folder).presets == {preset.key: preset.to_json()}
    file.write_text(json.dumps({preset.key: {"policy": "flowcache"}}))
    expected = f"{file}: expected presets that mc-calibrate made, got: preset {preset.key}: "
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        load_checkpoint(folder)
