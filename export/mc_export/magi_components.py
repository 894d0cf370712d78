"""The MAGI-1 transformer's components, filled from a checkpoint.

Neighbours: `magi` computes; `export_component` traces what this module lists. What can be folded
into the weights is, so that no graph has it: matrices are transposed to [in, out]; q, the text's q,
k and v are one matrix; of the text's keys and values, which the checkpoint stores head by head,
keys come first; the output projection, which takes slices of both attentions in turn, takes one
behind the other; 1 is added to the weights of norms that are stored without it; the scale of the
latents and their doubled channels are in the matrices of `embed` and `head`. Sums are made in
float32, which is how they are stored unless another type is asked for.
"""

__all__ = ["null_caption", "transformer_components"]

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mc_engines.model_sizes import MAGI_NULL_TOKENS
from mc_export.checkpoint import load_finite
from mc_export.component import ComponentSource
from mc_export.filling import (
    SAMPLE_ROWS,
    Load,
    Tensors,
    empty_module,
    fill_module,
    make_drawer,
    sample_view,
)
from mc_export.magi import Block, Context, Embed, Head, Motion, TextProjection, Timestep
from mc_export.magi_config import MagiConfig
from mc_export.tensor_source import TensorSource

PROJECTION_SLICES = 8  # that the attentions are cut into, whatever the number of heads


def null_caption(config: Mapping[str, Any], tensors: TensorSource) -> Tensors:
    """Load what the branches without a prompt attend to, and the clean pass of a chunk.

    Args:
        config: As `load_magi_checkpoint` gives it.
        tensors: The checkpoint's tensors.

    Returns:
        `embedding`, shape (T, text_dim): the first 50 rows of the null caption.

    Raises:
        CheckpointError: A value is NaN or infinite.
    """
    rows = load_finite(tensors, "y_embedder.null_caption_embedding")
    return {"embedding": rows[: min(MAGI_NULL_TOKENS, config["caption_max_length"])]}


def transformer_components(
    config: Mapping[str, Any], tensors: TensorSource
) -> Iterator[ComponentSource]:
    """Make the components of the transformer in the order in which a run needs them.

    Args:
        config: As `load_magi_checkpoint` gives it.
        tensors: The checkpoint's tensors; loaded when a component is exported.

    Yields:
        text_projection, context, timestep, embed, block, head, motion; each is loaded when it is
        asked for, so that one at a time is in memory.

    Raises:
        CheckpointError: The configuration is not one of MAGI-1; a weight is NaN or infinite.
    """
    c = MagiConfig.read(config)
    load = partial(load_finite, tensors)
    for make in (_text_projection, _context, _timestep, _embed, _block, _head):
        yield make(c, load)
    yield _motion(c)


def _text_projection(c: MagiConfig, load: Load) -> ComponentSource:
    draw = make_drawer()
    weights = _linear("project", load, "y_embedder.y_proj_xattn.0")
    return ComponentSource(
        "text_projection",
        fill_module(TextProjection(c.text_dim, c.block.dim), weights),
        {"embedding": draw(1, 7, c.text_dim)},
        {"embedding": {1: "T"}},
        ("text",),
        float32=frozenset({"embedding"}),
    )


def _context(c: MagiConfig, load: Load) -> ComponentSource:
    draw = make_drawer()
    b = c.block

    def layer_weights(layer: int) -> Tensors:
        at = f"videodit_blocks.layers.{layer}.self_attention."
        by_head = load(f"{at}linear_kv_xattn.weight").T
        kv = by_head.reshape(b.dim, b.key_heads, 2, b.head_dim).transpose(1, 2).flatten(1)
        return {"kv.weight": kv} | _norm("k_norm", load, f"{at}k_layernorm_xattn", c.norm_offset)

    return ComponentSource(
        "context",
        empty_module(Context(b.dim, b.key_heads, b.head_dim, b.epsilon)),
        {"text": draw(1, 7, b.dim)},
        {"text": {1: "T"}},
        ("cross_k", "cross_v"),
        tuple(partial(layer_weights, layer) for layer in range(c.layers)),
    )


def _timestep(c: MagiConfig, load: Load) -> ComponentSource:
    weights = (
        _linear("embed.up", load, "t_embedder.mlp.0")
        | _linear("embed.down", load, "t_embedder.mlp.2")
        | _linear("project", load, "y_embedder.y_proj_adaln.0")
        | {"null_rows": load("y_embedder.null_caption_embedding")[-2:].flip(0)}
    )
    inputs = {
        "timesteps": torch.tensor([0.0, 0.0013, 0.3, 0.9999]),
        "null_row": torch.tensor([1, 0, 1, 0]),
    }
    if c.distilled:
        inputs["distill"] = torch.tensor([32.0, 8.0, 4.0, 32.0])
    return ComponentSource(
        "timestep",
        fill_module(Timestep(c.block.condition_dim, c.text_dim, c.rounding), weights),
        inputs,
        {name: {0: "n"} for name in inputs},
        ("modulation",),
        precisions=("fp32",),  # a table of a run, computed on the host whatever runs the blocks
    )


def _embed(c: MagiConfig, load: Load) -> ComponentSource:
    draw = make_drawer()
    kernel = load("x_embedder.weight").float()
    copies = kernel.reshape(c.block.dim, -1, c.patch_channels)  # of the latents' channels, 1 or 2
    matrix = copies.sum(1).T * c.latents_scale
    return ComponentSource(
        "embed",
        fill_module(Embed(c.patch_channels, c.block.dim), {"project.weight": matrix}),
        {"patches": draw(1, 6, c.patch_channels)},
        {"patches": {1: "L"}},
        ("x",),
        float32=frozenset({"patches"}),
    )


def _block(c: MagiConfig, load: Load) -> ComponentSource:
    draw, b = make_drawer(), c.block
    angles = draw(SAMPLE_ROWS, 3 * c.bands) * math.tau
    own = {"x": draw(1, SAMPLE_ROWS, b.dim), "modulation": draw(1, b.condition_dim)}
    seen, sizes = sample_view(draw, angles, b.key_heads, b.head_dim)
    return ComponentSource(
        "block",
        empty_module(Block(b)),
        own | seen,
        {"x": {1: "K"}} | sizes,
        ("y", "k_new", "v_new"),
        tuple(partial(_block_weights, c, load, layer) for layer in range(c.layers)),
        float32=frozenset({"modulation", "cos", "sin"}),
        heads=b.key_heads,
    )


def _block_weights(c: MagiConfig, load: Load, layer: int) -> Tensors:
    at = f"videodit_blocks.layers.{layer}."
    attention = f"{at}self_attention."
    qkv = [load(f"{attention}linear_qkv.{part}.weight") for part in ("q", "qx", "k", "v")]
    norm = partial(_norm, load=load, offset=c.norm_offset)
    return (
        {
            "qkv.weight": torch.cat(qkv).T,
            "out.weight": _projection(load(f"{attention}linear_proj.weight").T),
            "ffn_up.weight": load(f"{at}mlp.linear_fc1.weight").T,
            "ffn_down.weight": load(f"{at}mlp.linear_fc2.weight").T,
        }
        | _linear("gates", load, f"{at}ada_modulate_layer.proj.0")
        | norm("norm", name=f"{attention}linear_qkv.layer_norm", offset=0.0)
        | norm("q_norm", name=f"{attention}q_layernorm")
        | norm("k_norm", name=f"{attention}k_layernorm")
        | norm("cross_q_norm", name=f"{attention}q_layernorm_xattn")
        | norm("gated_sum.norm", name=f"{at}self_attn_post_norm")
        | norm("ffn_norm", name=f"{at}mlp.layer_norm", offset=0.0)
        | norm("ffn_gated_sum.norm", name=f"{at}mlp_post_norm")
    )


def _projection(matrix: Tensor) -> Tensor:
    """Rows that take a slice of one attention, then one of the other: first all of one."""
    slices = matrix.reshape(PROJECTION_SLICES, 2, -1, matrix.shape[-1])
    return slices.transpose(0, 1).flatten(0, 2)


def _head(c: MagiConfig, load: Load) -> ComponentSource:
    draw, b = make_drawer(), c.block
    rows = load("final_linear.linear.weight").float().reshape(-1, c.model_channels, b.dim)
    matrix = rows[:, : c.latent_channels].flatten(0, 1).T / c.latents_scale
    weights = _norm("norm", load, "videodit_blocks.final_layernorm", c.norm_offset)
    return ComponentSource(
        "head",
        fill_module(Head(b.dim, c.patch_channels, b.epsilon), weights | {"project.weight": matrix}),
        {"out": draw(1, 6, b.dim)},
        {"out": {1: "L"}},
        ("patches",),
        float32=frozenset({"patches"}),
    )


def _motion(c: MagiConfig) -> ComponentSource:
    draw = make_drawer()
    inputs = {
        "latents": draw(1, 3, 4, c.patch_channels),
        "previous": draw(1, 4, c.patch_channels),
    }
    dynamic = {"latents": {1: "F", 2: "P"}, "previous": {1: "P"}}
    float32 = frozenset({*inputs, "change"})
    return ComponentSource("motion", Motion().eval(), inputs, dynamic, ("change",), (), float32)


def _linear(to: str, load: Load, name: str) -> Tensors:
    return {f"{to}.weight": load(f"{name}.weight").T, f"{to}.bias": load(f"{name}.bias")}


def _norm(to: str, load: Load, name: str, offset: float) -> Tensors:
    """The weights of a norm; the sum with an offset is float32."""
    weight = load(f"{name}.weight")
    weight = weight.float() + offset if offset else weight
    return {f"{to}.weight": weight, f"{to}.bias": load(f"{name}.bias")}
