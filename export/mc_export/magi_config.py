"""The sizes of a MAGI-1 transformer: its configuration, its tensors, what a manifest says of it.

Neighbours: `load_magi_checkpoint` reads the configuration, `check_tensors` holds a checkpoint
against the tensors, `magi_components` makes graphs of both.
"""

__all__ = ["MagiConfig", "describe_transformer", "transformer_tensors"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mc_engines.errors import CheckpointError
from mc_engines.model_sizes import describe_magi
from mc_export.checkpoint import load_finite
from mc_export.magi import WAVES, BlockSizes
from mc_export.tensor_source import Shape, TensorSource

# No least share is recomputed with the published settings.
TOKEN_BUCKETS = 0.1, 0.25, 0.5, 0.75, 1.0
_DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
# What these graphs do not compute otherwise.
_FIXED = {
    "model_name": "videodit_ardf",
    "t_patch_size": 1,
    "xattn_cond_hidden_ratio": 1.0,
    "cond_gating_ratio": 1.0,
}


@dataclass(frozen=True)
class MagiConfig:
    """The transformer's sizes, from the official configuration's keys.

    Attributes:
        layers: Blocks.
        block: Sizes of each.
        text_dim: Channels of the text embedding.
        text_tokens: The most that a prompt has.
        model_channels: Of the latents as the model takes them.
        latent_channels: Of the latents; half as many where the model takes them twice.
        patch: Latents of a patch along height and width.
        latents_scale: Latents are multiplied by it on their way in, and divided on their way out.
        norm_offset: Is added to the stored weights of most norms.
        rounding: The type that sinusoids of a timestep are rounded to.
        distilled: Whether the model is told the length of its steps.
    """

    layers: int
    block: BlockSizes
    text_dim: int
    text_tokens: int
    model_channels: int
    latent_channels: int
    patch: int
    latents_scale: float
    norm_offset: float
    rounding: torch.dtype
    distilled: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "MagiConfig":
        """Take the sizes from a configuration.

        Args:
            config: As `load_magi_checkpoint` gives it.

        Returns:
            The sizes.

        Raises:
            CheckpointError: No model of this family has them.
        """
        for key, expected in _FIXED.items():
            if config[key] != expected:
                raise CheckpointError(
                    f"transformer: expected {key} {expected}, got {config[key]}. "
                    "Use a MAGI-1 checkpoint."
                )
        channels, doubled = config["in_channels"], config["half_channel_vae"]
        block = BlockSizes(
            config["hidden_size"],
            config["num_attention_heads"],
            config["num_query_groups"],
            config["kv_channels"],
            config["ffn_hidden_size"],
            config["gated_linear_unit"],
            int(config["hidden_size"] * config["cond_hidden_ratio"]),
            config["layernorm_epsilon"],
        )
        _check_sizes(config, block)
        return cls(
            config["num_layers"],
            block,
            config["caption_channels"],
            config["caption_max_length"],
            channels,
            channels // 2 if doubled else channels,
            config["patch_size"],
            config["x_rescale_factor"],
            1.0 if config["apply_layernorm_1p"] else 0.0,
            _DTYPES[config["params_dtype"]],
            config["distill"],
        )

    @property
    def patch_channels(self) -> int:
        """Latents of a patch."""
        return self.latent_channels * self.patch**2

    @property
    def bands(self) -> int:
        """Rotary frequencies; each turns a pair of channels on each of three axes."""
        return self.block.head_dim // 8


def _check_sizes(config: Mapping[str, Any], block: BlockSizes) -> None:
    """Refuse sizes that no model of this family has."""
    problems = {
        "out_channels": config["out_channels"] != config["in_channels"],
        "in_channels": config["half_channel_vae"] and config["in_channels"] % 2,
        "num_query_groups": block.heads % block.key_heads,
        "kv_channels": block.head_dim % 8,
        "params_dtype": config["params_dtype"] not in _DTYPES,
    }
    for key, wrong in problems.items():
        if wrong:
            raise CheckpointError(
                f"transformer: expected sizes of a MAGI-1 model, got {key} {config[key]}. "
                "Take config.json from where the weights come from."
            )


def describe_transformer(config: Mapping[str, Any], tensors: TensorSource) -> dict[str, Any]:
    """Say what the runtime must know of the transformer; stands in the manifest.

    Args:
        config: As `load_magi_checkpoint` gives it.
        tensors: The checkpoint's tensors; the rotary frequencies are read.

    Returns:
        The manifest's `config.transformer`.

    Raises:
        CheckpointError: The configuration is not one of MAGI-1; a frequency is not finite.
    """
    MagiConfig.read(config)  # which refuses other models
    return describe_magi(config) | {
        "rope_bands": load_finite(tensors, "rope.bands").float().tolist(),
        "key_layout": "half_split",
        "token_buckets": list(TOKEN_BUCKETS),
    }


def transformer_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Name every tensor of the transformer and its shape, as the official checkpoint stores them.

    Args:
        config: As `load_magi_checkpoint` gives it.

    Returns:
        Shapes by tensor name.

    Raises:
        CheckpointError: The configuration is not one of MAGI-1.
    """
    c = MagiConfig.read(config)
    dim, condition = c.block.dim, c.block.condition_dim
    shapes: dict[str, Shape] = {
        "x_embedder.weight": (dim, c.model_channels, 1, c.patch, c.patch),
        "y_embedder.null_caption_embedding": (c.text_tokens, c.text_dim),
        "rope.bands": (c.bands,),
        "videodit_blocks.final_layernorm.weight": (dim,),
        "videodit_blocks.final_layernorm.bias": (dim,),
        "final_linear.linear.weight": (c.patch**2 * c.model_channels, dim),
    }
    linears = {
        "t_embedder.mlp.0": (condition, 2 * WAVES),
        "t_embedder.mlp.2": (condition, condition),
        "y_embedder.y_proj_xattn.0": (dim, c.text_dim),
        "y_embedder.y_proj_adaln.0": (condition, c.text_dim),
    }
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for layer in range(c.layers):
        at = f"videodit_blocks.layers.{layer}."
        shapes |= {f"{at}{name}": shape for name, shape in _layer_shapes(c.block).items()}
    return shapes


def _layer_shapes(b: BlockSizes) -> dict[str, Shape]:
    queries, keys = b.heads * b.head_dim, b.key_heads * b.head_dim
    attention = "self_attention."
    norms = {
        f"{attention}linear_qkv.layer_norm": b.dim,
        "self_attn_post_norm": b.dim,
        "mlp.layer_norm": b.dim,
        "mlp_post_norm": b.dim,
    }
    norms |= {
        f"{attention}{part}_layernorm{kind}": b.head_dim for part in "qk" for kind in ("", "_xattn")
    }
    shapes: dict[str, Shape] = {
        "ada_modulate_layer.proj.0.weight": (2 * b.dim, b.condition_dim),
        "ada_modulate_layer.proj.0.bias": (2 * b.dim,),
        f"{attention}linear_qkv.q.weight": (queries, b.dim),
        f"{attention}linear_qkv.qx.weight": (queries, b.dim),
        f"{attention}linear_qkv.k.weight": (keys, b.dim),
        f"{attention}linear_qkv.v.weight": (keys, b.dim),
        f"{attention}linear_kv_xattn.weight": (2 * keys, b.dim),
        f"{attention}linear_proj.weight": (b.dim, 2 * queries),
        "mlp.linear_fc1.weight": ((1 + b.gated) * b.ffn_dim, b.dim),
        "mlp.linear_fc2.weight": (b.dim, b.ffn_dim),
    }
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    return shapes
