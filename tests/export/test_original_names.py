"""The original layout, against the classes of diffusers and transformers.

The original names and shapes are written down here as the original modules make them
(SkyworkAI/SkyReels-V2, commit abed76f, skyreels_v2_infer/modules/).
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, SkyReelsV2Transformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from mc_engines.errors import CheckpointError
from mc_engines.published import PUBLISHED, UMT5_XXL, WAN21_VAE, published_name
from mc_export.checkpoint import check_tensors, load_checkpoint
from mc_export.original_names import (
    text_encoder_config,
    text_encoder_name,
    transformer_config,
    transformer_name,
    vae_config,
    vae_name,
)

Shapes = dict[str, tuple[int, ...]]

SMALL = {
    "dim": 1536,
    "ffn_dim": 8960,
    "num_heads": 12,
    "num_layers": 30,
    "inject_sample_info": True,
}
LARGE = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
TINY = {
    "_class_name": "WanModel",
    "model_type": "t2v",
    "dim": 24,
    "ffn_dim": 20,
    "freq_dim": 8,
    "text_dim": 12,
    "num_heads": 2,
    "num_layers": 2,
    "inject_sample_info": True,
}


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def conv(name: str, outputs: int, *rest: int) -> Shapes:
    return {f"{name}.weight": (outputs, *rest), f"{name}.bias": (outputs,)}


def original_transformer(config: dict) -> Shapes:
    dim, text_dim = config["dim"], config.get("text_dim", 4096)
    shapes = (
        conv("patch_embedding", dim, 16, 1, 2, 2)
        | linear("text_embedding.0", text_dim, dim)
        | linear("text_embedding.2", dim, dim)
        | linear("time_embedding.0", config.get("freq_dim", 256), dim)
        | linear("time_embedding.2", dim, dim)
        | linear("time_projection.1", dim, 6 * dim)
        | linear("head.head", dim, 64)
        | {"head.modulation": (1, 2, dim)}
    )
    if config.get("inject_sample_info"):
        shapes |= {"fps_embedding.weight": (2, dim)}
        shapes |= linear("fps_projection.0", dim, dim) | linear("fps_projection.2", dim, 6 * dim)
    for layer in range(config["num_layers"]):
        at = f"blocks.{layer}"
        shapes |= {f"{at}.modulation": (1, 6, dim)}
        shapes |= {f"{at}.norm3.weight": (dim,), f"{at}.norm3.bias": (dim,)}
        shapes |= linear(f"{at}.ffn.0", dim, config["ffn_dim"])
        shapes |= linear(f"{at}.ffn.2", config["ffn_dim"], dim)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes |= linear(f"{at}.{attention}.{part}", dim, dim)
            shapes |= {f"{at}.{attention}.norm_{part}.weight": (dim,) for part in "qk"}
    return shapes


def residual(name: str, inputs: int, outputs: int) -> Shapes:
    shapes = {f"{name}.residual.0.gamma": (inputs, 1, 1, 1)}
    shapes |= conv(f"{name}.residual.2", outputs, inputs, 3, 3, 3)
    shapes |= {f"{name}.residual.3.gamma": (outputs, 1, 1, 1)}
    shapes |= conv(f"{name}.residual.6", outputs, outputs, 3, 3, 3)
    return shapes | (
        conv(f"{name}.shortcut", outputs, inputs, 1, 1, 1) if inputs != outputs else {}
    )


def middle(coder: str, channels: int) -> Shapes:
    return (
        residual(f"{coder}.middle.0", channels, channels)
        | {f"{coder}.middle.1.norm.gamma": (channels, 1, 1)}
        | conv(f"{coder}.middle.1.to_qkv", 3 * channels, channels, 1, 1)
        | conv(f"{coder}.middle.1.proj", channels, channels, 1, 1)
        | residual(f"{coder}.middle.2", channels, channels)
    )


def original_vae(
    base: int, z_dim: int, multiples: list[int], blocks: int, temporal: list[bool]
) -> Shapes:
    widths = [base * multiple for multiple in multiples]
    shapes = conv("conv1", 2 * z_dim, 2 * z_dim, 1, 1, 1) | conv("conv2", z_dim, z_dim, 1, 1, 1)
    shapes |= conv("encoder.conv1", base, 3, 3, 3, 3)
    number, inputs = 0, base
    for stage, width in enumerate(widths):
        for _ in range(blocks):
            shapes |= residual(f"encoder.downsamples.{number}", inputs, width)
            number, inputs = number + 1, width
        if stage < len(temporal):
            at = f"encoder.downsamples.{number}"
            shapes |= conv(f"{at}.resample.1", width, width, 3, 3)
            shapes |= conv(f"{at}.time_conv", width, width, 3, 1, 1) if temporal[stage] else {}
            number += 1
    shapes |= middle("encoder", inputs) | {"encoder.head.0.gamma": (inputs, 1, 1, 1)}
    shapes |= conv("encoder.head.2", 2 * z_dim, inputs, 3, 3, 3)
    shapes |= conv("decoder.conv1", inputs, z_dim, 3, 3, 3) | middle("decoder", inputs)
    number = 0
    for stage, width in enumerate(reversed(widths)):
        for _ in range(blocks + 1):
            shapes |= residual(f"decoder.upsamples.{number}", inputs, width)
            number, inputs = number + 1, width
        if stage < len(temporal):
            at = f"decoder.upsamples.{number}"
            shapes |= conv(f"{at}.resample.1", width // 2, width, 3, 3)
            if temporal[::-1][stage]:
                shapes |= conv(f"{at}.time_conv", 2 * width, width, 3, 1, 1)
            number, inputs = number + 1, width // 2
    shapes |= {"decoder.head.0.gamma": (inputs, 1, 1, 1)}
    return shapes | conv("decoder.head.2", 3, inputs, 3, 3, 3)


def original_text_encoder(
    vocabulary: int, dim: int, inner: int, ffn: int, heads: int, layers: int, buckets: int = 32
) -> Shapes:
    shapes: Shapes = {"token_embedding.weight": (vocabulary, dim), "norm.weight": (dim,)}
    for layer in range(layers):
        at = f"blocks.{layer}"
        shapes |= {f"{at}.norm1.weight": (dim,), f"{at}.norm2.weight": (dim,)}
        shapes |= {f"{at}.attn.{part}.weight": (inner, dim) for part in "qkv"}
        shapes |= {f"{at}.attn.o.weight": (dim, inner)}
        shapes |= {f"{at}.pos_embedding.embedding.weight": (buckets, heads)}
        shapes |= {f"{at}.ffn.{part}.weight": (ffn, dim) for part in ("gate.0", "fc1")}
        shapes |= {f"{at}.ffn.fc2.weight": (dim, ffn)}
    return shapes


def shapes_of(module: torch.nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def make(build, config: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return build(config)


def transformer(config: dict) -> torch.nn.Module:
    return SkyReelsV2Transformer3DModel(**config)


def vae(config: dict) -> torch.nn.Module:
    return AutoencoderKLWan(**config)


def text_encoder(config: dict) -> torch.nn.Module:
    return UMT5EncoderModel(UMT5Config(**config))


@pytest.mark.parametrize(
    ("original", "published"),
    [(SMALL, "skyreels-df-1.3b-540p"), (LARGE, "skyreels-df-14b-720p")],
)
def test_real_transformers_are_complete(original: dict, published: str) -> None:
    config = transformer_config(original)
    assert config == PUBLISHED[published].transformer
    renamed = {transformer_name(k): v for k, v in original_transformer(original).items()}
    assert renamed == shapes_of(make(transformer, config))


def test_only_the_small_model_is_known_by_its_configuration() -> None:
    assert published_name(transformer_config(SMALL)) == "skyreels-df-1.3b-540p"
    assert published_name(transformer_config(LARGE)) is None, "540P and 720P differ in weights"
    assert published_name(transformer_config(TINY)) is None


@settings(max_examples=10, deadline=None)
@given(
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 12]),
    ffn=st.integers(1, 40),
    layers=st.integers(1, 3),
    fps=st.booleans(),
)
def test_random_transformers_are_complete(
    heads: int, head_dim: int, ffn: int, layers: int, fps: bool
) -> None:
    original = TINY | {
        "dim": heads * head_dim,
        "ffn_dim": ffn,
        "num_heads": heads,
        "num_layers": layers,
        "inject_sample_info": fps,
    }
    renamed = {transformer_name(k): v for k, v in original_transformer(original).items()}
    assert renamed == shapes_of(make(transformer, transformer_config(original)))


def test_the_real_vae_is_complete() -> None:
    original = original_vae(96, 16, [1, 2, 4, 4], 2, [False, True, True])
    config = vae_config(original)
    assert config == WAN21_VAE
    assert {vae_name(k, 2): v for k, v in original.items()} == shapes_of(make(vae, config))


@settings(max_examples=10, deadline=None)
@given(data=st.data(), half_base=st.integers(1, 3), blocks=st.integers(1, 3))
def test_random_vaes_are_complete(data: st.DataObject, half_base: int, blocks: int) -> None:
    stages = data.draw(st.integers(2, 4))
    multiples = [1, *data.draw(st.lists(st.integers(1, 4), min_size=stages, max_size=stages))][
        :stages
    ]
    temporal = data.draw(st.lists(st.booleans(), min_size=stages - 1, max_size=stages - 1))
    original = original_vae(2 * half_base, 16, multiples, blocks, temporal)
    config = vae_config(original)
    assert (config["base_dim"], config["dim_mult"]) == (2 * half_base, multiples)
    renamed = {vae_name(k, config["num_res_blocks"]): v for k, v in original.items()}
    assert renamed == shapes_of(make(vae, config))


def test_the_real_text_encoder_is_complete() -> None:
    original = original_text_encoder(256384, 4096, 4096, 10240, 64, 24)
    config = text_encoder_config(original)
    assert config == UMT5_XXL
    expected = shapes_of(make(text_encoder, config))
    del expected["encoder.embed_tokens.weight"]  # the same table as shared.weight
    assert {text_encoder_name(k): v for k, v in original.items()} == expected


@settings(max_examples=10, deadline=None)
@given(
    dim=st.integers(1, 9),
    heads=st.integers(1, 3),
    d_kv=st.integers(1, 5),
    ffn=st.integers(1, 9),
    layers=st.integers(1, 3),
    buckets=st.sampled_from([8, 32]),
)
def test_random_text_encoders_are_complete(
    dim: int, heads: int, d_kv: int, ffn: int, layers: int, buckets: int
) -> None:
    original = original_text_encoder(17, dim, heads * d_kv, ffn, heads, layers, buckets)
    config = text_encoder_config(original)
    assert config["d_kv"] == d_kv
    expected = shapes_of(make(text_encoder, config))
    del expected["encoder.embed_tokens.weight"]
    assert {text_encoder_name(k): v for k, v in original.items()} == expected


# Tensors of one shape whose names a slip could exchange: the completeness above would not see it.
ALIKE = """
transformer blocks.7.self_attn.q.weight blocks.7.attn1.to_q.weight
transformer blocks.7.self_attn.k.bias blocks.7.attn1.to_k.bias
transformer blocks.7.self_attn.v.weight blocks.7.attn1.to_v.weight
transformer blocks.7.self_attn.o.weight blocks.7.attn1.to_out.0.weight
transformer blocks.7.cross_attn.q.weight blocks.7.attn2.to_q.weight
transformer blocks.7.cross_attn.k.weight blocks.7.attn2.to_k.weight
transformer blocks.7.cross_attn.v.bias blocks.7.attn2.to_v.bias
transformer blocks.7.cross_attn.o.bias blocks.7.attn2.to_out.0.bias
transformer blocks.7.self_attn.norm_q.weight blocks.7.attn1.norm_q.weight
transformer blocks.7.cross_attn.norm_k.weight blocks.7.attn2.norm_k.weight
vae encoder.middle.2.residual.2.bias encoder.mid_block.resnets.1.conv1.bias
vae decoder.middle.0.residual.6.bias decoder.mid_block.resnets.0.conv2.bias
vae decoder.middle.0.residual.3.gamma decoder.mid_block.resnets.0.norm2.gamma
vae decoder.upsamples.14.residual.0.gamma decoder.up_blocks.3.resnets.2.norm1.gamma
text_encoder blocks.3.attn.q.weight encoder.block.3.layer.0.SelfAttention.q.weight
text_encoder blocks.3.attn.k.weight encoder.block.3.layer.0.SelfAttention.k.weight
text_encoder blocks.3.attn.v.weight encoder.block.3.layer.0.SelfAttention.v.weight
text_encoder blocks.3.ffn.gate.0.weight encoder.block.3.layer.1.DenseReluDense.wi_0.weight
text_encoder blocks.3.ffn.fc1.weight encoder.block.3.layer.1.DenseReluDense.wi_1.weight
text_encoder blocks.3.norm1.weight encoder.block.3.layer.0.layer_norm.weight
"""
RENAME = {
    "transformer": transformer_name,
    "vae": partial(vae_name, num_res_blocks=2),
    "text_encoder": text_encoder_name,
}


@pytest.mark.parametrize("line", ALIKE.split("\n")[1:-1])
def test_names_of_one_shape_are_not_exchanged(line: str) -> None:
    part, original, renamed = line.split()
    assert RENAME[part](original) == renamed


@pytest.mark.parametrize("rename", RENAME.values(), ids=RENAME)
def test_foreign_names_stay_as_they_are(rename) -> None:
    assert rename("img_emb.proj.1.weight") == "img_emb.proj.1.weight"
    assert rename("encoder.surplus") == "encoder.surplus"


@pytest.fixture(scope="module")
def original_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in the original layout, in bfloat16, its weights in two shards."""
    folder = tmp_path_factory.mktemp("original")
    (folder / "config.json").write_text(json.dumps(TINY))
    drawn = {
        name: torch.randn(shape, dtype=torch.bfloat16)
        for name, shape in original_transformer(TINY).items()
    }
    for shard, even in ((1, True), (2, False)):
        part = {name: t for i, (name, t) in enumerate(drawn.items()) if (i % 2 == 0) is even}
        save_file(part, folder / f"model-{shard:05d}-of-00002.safetensors")
    for file, shapes in (
        ("Wan2.1_VAE.pth", original_vae(2, 16, [1, 2], 1, [True])),
        ("models_t5_umt5-xxl-enc-bf16.pth", original_text_encoder(17, 12, 8, 20, 2, 2)),
    ):
        torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, folder / file)
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    (folder / "google" / "umt5-xxl" / "tokenizer.json").write_text("{}")
    return folder


def test_an_original_folder_opens_under_diffusers_names(original_folder: Path) -> None:
    checkpoint = load_checkpoint(original_folder)
    assert checkpoint.text_encoder is not None and checkpoint.vae is not None
    assert checkpoint.tokenizer == original_folder / "google" / "umt5-xxl"
    assert checkpoint.scheduler is None
    for part, build, alias in (
        (checkpoint.transformer, transformer, None),
        (checkpoint.vae, vae, None),
        (checkpoint.text_encoder, text_encoder, "encoder.embed_tokens.weight"),
    ):
        expected = shapes_of(make(build, part.config))
        expected.pop(alias or "", None)
        check_tensors("part", part.tensors, expected)
    stored = torch.load(original_folder / "Wan2.1_VAE.pth")["decoder.upsamples.1.residual.6.weight"]
    ours = checkpoint.vae.tensors.load("decoder.up_blocks.0.resnets.1.conv2.weight")
    assert torch.equal(ours, stored)
    assert checkpoint.transformer.tensors.dtype("proj_out.bias") == torch.bfloat16


def test_an_original_folder_without_the_other_parts_opens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    shapes = original_transformer(TINY)
    save_file({k: torch.zeros(v) for k, v in shapes.items()}, tmp_path / "model.safetensors")
    checkpoint = load_checkpoint(tmp_path)
    assert (checkpoint.vae, checkpoint.text_encoder, checkpoint.tokenizer) == (None, None, None)


@pytest.mark.parametrize("file", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
def test_a_file_of_another_model_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    torch.save({"surplus": torch.zeros(1)}, tmp_path / file)
    with pytest.raises(CheckpointError, match=f"{file}: expected the tensors of the original"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "i2v"}, "expected a WanModel of model_type 't2v', got WanModel 'i2v'"),
        ({"_class_name": "VideoDiT"}, "expected a WanModel of model_type 't2v', got VideoDiT"),
        ({"in_dim": 36}, r"got an image-to-video one \(in_channels 36\)"),
        ({"num_heads": 0}, "expected the sizes dim, ffn_dim, num_heads and num_layers, got"),
        ({"_class_name": "SkyReelsV2Transformer3DModel"}, "Give the folder that it lies in"),
    ],
)
def test_another_original_model_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | change))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


def test_a_folder_with_both_kinds_of_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    names = ("head.head.bias", "proj_out.bias")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'proj_out.bias': expected one tensor.*head\.head"):
        load_checkpoint(tmp_path)
