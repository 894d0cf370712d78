"""The one place where the original layout's names become those of diffusers and transformers.

The original repositories keep three models under names and configuration keys of their own; all
else in this project knows only diffusers' (transformer, VAE) and transformers' (text encoder).
Every function here is pure. A name that is not the original model's comes back as it is, for
`check_tensors` to report. `load_checkpoint` wraps the files' tensors in these.

Source: SkyworkAI/SkyReels-V2, commit abed76f, skyreels_v2_infer/modules/: `transformer.py`
(WanModel), `vae.py` (WanVAE_), `t5.py` (T5Encoder). The targets are diffusers 0.42.1's
SkyReelsV2Transformer3DModel and AutoencoderKLWan and transformers' UMT5EncoderModel.
"""

__all__ = [
    "text_encoder_config",
    "text_encoder_name",
    "transformer_config",
    "transformer_name",
    "vae_config",
    "vae_name",
]

import re
from collections.abc import Mapping
from typing import Any

from mc_engines.published import UMT5_XXL, WAN21_VAE
from mc_export.tensor_source import Shape

_TRANSFORMER = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "fps_projection.0": "fps_projection.net.0.proj",
    "fps_projection.2": "fps_projection.net.2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
# Norms are numbered by when they were written in the original, by when they run in diffusers: the
# affine one before the cross-attention is the third there and the second here.
_TRANSFORMER_BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{original}.{part}": f"{ours}.{renamed}"
    for original, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, renamed in (
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("o", "to_out.0"),
        ("norm_q", "norm_q"),
        ("norm_k", "norm_k"),
    )
}

_VAE = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_VAE_CODER = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_VAE_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_VAE_LAYER = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}

_TEXT_ENCODER = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_TEXT_ENCODER_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def transformer_config(original: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the transformer's `config.json`.

    Keys that the original never writes (its `ignore_for_config`) are the defaults of its class.

    Args:
        original: Keys of WanModel.

    Returns:
        Keys of SkyReelsV2Transformer3DModel.

    Raises:
        KeyError: A size has no default and is not given.
    """
    heads = original["num_heads"]
    return {
        "patch_size": list(original.get("patch_size", (1, 2, 2))),
        "num_attention_heads": heads,
        "attention_head_dim": original["dim"] // heads,
        "in_channels": original.get("in_dim", 16),
        "out_channels": original.get("out_dim", 16),
        "text_dim": original.get("text_dim", 4096),
        "freq_dim": original.get("freq_dim", 256),
        "ffn_dim": original["ffn_dim"],
        "num_layers": original["num_layers"],
        "cross_attn_norm": original.get("cross_attn_norm", True),
        "qk_norm": "rms_norm_across_heads" if original.get("qk_norm", True) else None,
        "eps": original.get("eps", 1e-6),
        "inject_sample_info": original.get("inject_sample_info", False),
        "rope_max_seq_len": 1024,
    }


def transformer_name(name: str) -> str:
    """Rename a tensor of the transformer.

    Args:
        name: Original name.

    Returns:
        diffusers' name.

    Example:
        >>> transformer_name("blocks.3.norm3.weight")
        'blocks.3.norm2.weight'
    """
    if match := re.fullmatch(r"(blocks\.\d+\.)(.+)", name):
        return match[1] + _rename(match[2], _TRANSFORMER_BLOCK)
    return _rename(name, _TRANSFORMER)


def vae_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Read the autoencoder's configuration off its tensors; the original stores none.

    Args:
        shapes: Shape of each tensor by its original name.

    Returns:
        Keys of AutoencoderKLWan.

    Raises:
        KeyError: A tensor that every Wan 2.1 autoencoder has is missing.
    """
    base = shapes["encoder.conv1.weight"][0]
    resample = re.compile(r"encoder\.downsamples\.(\d+)\.resample\.1\.weight")
    halvings = sorted(int(match[1]) for match in map(resample.fullmatch, shapes) if match)
    # Layers are numbered through: as many residual ones at each resolution, then a halving.
    layers = halvings[0] if halvings else 0
    starts = range(0, len(halvings) * (layers + 1) + 1, layers + 1)
    return {
        **WAN21_VAE,
        "base_dim": base,
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": [
            shapes[f"encoder.downsamples.{start}.residual.2.weight"][0] // base for start in starts
        ],
        "num_res_blocks": layers,
        "temperal_downsample": [
            f"encoder.downsamples.{index}.time_conv.weight" in shapes for index in halvings
        ],
    }


def vae_name(name: str, num_res_blocks: int) -> str:
    """Rename a tensor of the autoencoder.

    The original numbers the layers of a coder through. diffusers does so in the encoder; in the
    decoder it counts residual layers (one more than in the encoder) anew at each resolution, and
    keeps the doubling that follows them apart.

    Args:
        name: Original name.
        num_res_blocks: Residual layers of the encoder at each resolution.

    Returns:
        diffusers' name.

    Example:
        >>> vae_name("decoder.upsamples.5.residual.2.weight", num_res_blocks=2)
        'decoder.up_blocks.1.resnets.1.conv1.weight'
    """
    match = re.fullmatch(r"(encoder|decoder)\.(.+)", name)
    if not match:
        return _rename(name, _VAE)
    coder, rest = match.groups()
    if layer := re.fullmatch(r"(downsamples|middle|upsamples)\.(\d+)\.(.+)", rest):
        where = _vae_layer(layer[1], layer[2], num_res_blocks)
        return f"{coder}.{where}.{_rename(layer[3], _VAE_LAYER)}"
    return f"{coder}.{_rename(rest, _VAE_CODER)}"


def _vae_layer(part: str, number: str, num_res_blocks: int) -> str:
    if part == "downsamples":
        return f"down_blocks.{number}"
    if part == "middle":
        return f"mid_block.{_VAE_MIDDLE.get(number, number)}"
    block, layer = divmod(int(number), num_res_blocks + 2)
    kind = f"resnets.{layer}" if layer <= num_res_blocks else "upsamplers.0"
    return f"up_blocks.{block}.{kind}"


def text_encoder_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Read the text encoder's configuration off its tensors; the original stores none.

    Args:
        shapes: Shape of each tensor by its original name.

    Returns:
        Keys of UMT5Config.

    Raises:
        KeyError: A tensor that every umT5 encoder has is missing.
    """
    vocabulary, channels = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    norm = re.compile(r"blocks\.\d+\.norm1\.weight")
    return {
        **UMT5_XXL,
        "vocab_size": vocabulary,
        "d_model": channels,
        "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads,
        "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_layers": sum(bool(norm.fullmatch(name)) for name in shapes),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def text_encoder_name(name: str) -> str:
    """Rename a tensor of the text encoder.

    Args:
        name: Original name.

    Returns:
        transformers' name.

    Example:
        >>> text_encoder_name("blocks.0.ffn.gate.0.weight")
        'encoder.block.0.layer.1.DenseReluDense.wi_0.weight'
    """
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        return f"encoder.block.{match[1]}.{_rename(match[2], _TEXT_ENCODER_BLOCK)}"
    return _rename(name, _TEXT_ENCODER)


def _rename(name: str, table: Mapping[str, str]) -> str:
    """Replace a whole name, or the module before its last dot."""
    if name in table:
        return table[name]
    module, _, leaf = name.rpartition(".")
    return f"{table[module]}.{leaf}" if module in table else name
