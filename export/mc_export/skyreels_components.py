"""The SkyReels-V2 transformer's components, filled from a checkpoint.

Neighbours: `skyreels` computes; `export_component` traces what this module lists. Matrices are
transposed to [in, out]; q, k and v are concatenated; the columns of q and k are reordered within
each head, so that rotary pairs lie half a head apart instead of side by side. That is exact, and
cheaper to rotate; cached keys are in that order too, which only the graphs ever see.
"""

__all__ = ["describe_transformer", "transformer_components", "transformer_tensors"]

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mc_engines.errors import CheckpointError
from mc_engines.model_sizes import describe_skyreels
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
from mc_export.skyreels import (
    ROPE_THETA,
    Block,
    Combine,
    Context,
    Embed,
    Head,
    Motion,
    TextProjection,
    Timestep,
)
from mc_export.tensor_source import TensorSource

# 0.4 is the least that MotionCache recomputes with its published settings, if it recomputes at all.
TOKEN_BUCKETS = 0.25, 0.4, 0.5, 0.75, 1.0


@dataclass(frozen=True)
class _Config:
    """The transformer's sizes, from diffusers' configuration keys."""

    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    text_dim: int
    freq_dim: int
    in_channels: int
    out_channels: int
    patch_size: tuple[int, int, int]
    epsilon: float
    fps_embedding: bool
    rope_max_positions: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def patch(self) -> int:
        return math.prod(self.patch_size)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "_Config":
        patch_size = tuple(config["patch_size"])
        if patch_size[0] != 1:
            raise CheckpointError(
                f"transformer: expected a patch of one latent frame, got patch_size {patch_size}. "
                "Use a SkyReels-V2 diffusion-forcing checkpoint."
            )
        return cls(
            config["num_layers"],
            config["num_attention_heads"],
            config["attention_head_dim"],
            config["ffn_dim"],
            config["text_dim"],
            config["freq_dim"],
            config["in_channels"],
            config.get("out_channels") or config["in_channels"],
            patch_size,
            config["eps"],
            bool(config.get("inject_sample_info", False)),
            config["rope_max_seq_len"],
        )


def describe_transformer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what the runtime must know of the transformer; stands in the manifest.

    Args:
        config: The checkpoint's configuration, diffusers' keys.

    Returns:
        The manifest's `config.transformer`.
    """
    c = _Config.read(config)
    spatial = 2 * (c.head_dim // 6)
    return describe_skyreels(config) | {
        "rope_theta": ROPE_THETA,
        "rope_axes": [c.head_dim - 2 * spatial, spatial, spatial],
        "rope_max_positions": c.rope_max_positions,
        "key_layout": "half_split",
        "token_buckets": list(TOKEN_BUCKETS),
    }


def transformer_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name every tensor of the transformer and its shape, as diffusers stores them.

    Args:
        config: The checkpoint's configuration, diffusers' keys.

    Returns:
        Shapes by tensor name.
    """
    c = _Config.read(config)
    embedder = "condition_embedder"
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (c.dim, c.in_channels, *c.patch_size),
        "patch_embedding.bias": (c.dim,),
        "scale_shift_table": (1, 2, c.dim),
    }
    linears = {
        f"{embedder}.time_embedder.linear_1": (c.dim, c.freq_dim),
        f"{embedder}.time_embedder.linear_2": (c.dim, c.dim),
        f"{embedder}.time_proj": (6 * c.dim, c.dim),
        f"{embedder}.text_embedder.linear_1": (c.dim, c.text_dim),
        f"{embedder}.text_embedder.linear_2": (c.dim, c.dim),
        "proj_out": (c.out_channels * c.patch, c.dim),
    }
    if c.fps_embedding:
        shapes["fps_embedding.weight"] = (2, c.dim)
        linears |= {"fps_projection.net.0.proj": (c.dim, c.dim)}
        linears |= {"fps_projection.net.2": (6 * c.dim, c.dim)}
    for layer in range(c.layers):
        shapes |= _norm_shapes(f"blocks.{layer}.", c)
        linears |= _layer_linears(f"blocks.{layer}.", c)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _layer_linears(at: str, c: _Config) -> dict[str, tuple[int, int]]:
    square = [
        f"{at}attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    return dict.fromkeys(square, (c.dim, c.dim)) | {
        f"{at}ffn.net.0.proj": (c.ffn_dim, c.dim),
        f"{at}ffn.net.2": (c.dim, c.ffn_dim),
    }


def _norm_shapes(at: str, c: _Config) -> dict[str, tuple[int, ...]]:
    norms = [f"{at}attn{n}.norm_{part}.weight" for n in (1, 2) for part in "qk"]
    vectors = [*norms, f"{at}norm2.weight", f"{at}norm2.bias"]
    return {f"{at}scale_shift_table": (1, 6, c.dim)} | dict.fromkeys(vectors, (c.dim,))


def transformer_components(
    config: Mapping[str, Any], tensors: TensorSource
) -> Iterator[ComponentSource]:
    """Make the components of the transformer in the order in which a run needs them.

    Args:
        config: The checkpoint's configuration, diffusers' keys.
        tensors: The checkpoint's tensors, diffusers' names; loaded when a component is exported.

    Yields:
        text_projection, context, timestep, embed, block, head, motion, combine; each is loaded when
        it is asked for, so that one at a time is in memory.

    Raises:
        CheckpointError: The configuration is not one of a diffusion-forcing SkyReels-V2.
    """
    c = _Config.read(config)
    load = partial(load_finite, tensors)
    for make in (_text_projection, _context, _timestep, _embed, _block, _head):
        yield make(c, load)
    yield _motion(c)
    yield _combine(c)


def _text_projection(c: _Config, load: Load) -> ComponentSource:
    draw = make_drawer()
    at = "condition_embedder.text_embedder."
    weights = _linear("up", load, f"{at}linear_1") | _linear("down", load, f"{at}linear_2")
    module = fill_module(TextProjection(c.text_dim, c.dim), weights)
    inputs = {"embedding": draw(1, 7, c.text_dim)}
    return ComponentSource("text_projection", module, inputs, {"embedding": {1: "T"}}, ("text",))


def _context(c: _Config, load: Load) -> ComponentSource:
    draw = make_drawer()

    def layer_weights(layer: int) -> Tensors:
        at = f"blocks.{layer}.attn2."
        kv = _joined("kv", load, [f"{at}to_k", f"{at}to_v"])
        return kv | {"k_norm.weight": load(f"{at}norm_k.weight")}

    return ComponentSource(
        "context",
        empty_module(Context(c.dim, c.heads, c.epsilon)),
        {"text": draw(1, 7, c.dim)},
        {"text": {1: "T"}},
        ("cross_k", "cross_v"),
        tuple(partial(layer_weights, layer) for layer in range(c.layers)),
    )


def _timestep(c: _Config, load: Load) -> ComponentSource:
    at = "condition_embedder."
    weights = (
        _linear("embed_up", load, f"{at}time_embedder.linear_1")
        | _linear("embed_down", load, f"{at}time_embedder.linear_2")
        | _linear("project", load, f"{at}time_proj")
    )
    inputs = {"timesteps": torch.tensor([999, 500, 20, 1, 0])}
    if c.fps_embedding:
        weights["fps_embedding"] = load("fps_embedding.weight")
        weights |= _linear("fps_up", load, "fps_projection.net.0.proj")
        weights |= _linear("fps_down", load, "fps_projection.net.2")
        inputs["fps_id"] = torch.tensor([1])
    module = Timestep(c.freq_dim, c.dim, c.fps_embedding)
    return ComponentSource(
        "timestep",
        fill_module(module, weights),
        inputs,
        {"timesteps": {0: "n"}},
        ("modulation", "head_modulation"),
        precisions=("fp32",),  # a table of a run, computed on the host whatever runs the blocks
    )


def _embed(c: _Config, load: Load) -> ComponentSource:
    draw = make_drawer()
    weight = load("patch_embedding.weight").flatten(1).T
    weights = {"project.weight": weight, "project.bias": load("patch_embedding.bias")}
    module = fill_module(Embed(c.in_channels * c.patch, c.dim), weights)
    inputs = {"patches": draw(1, 6, c.in_channels * c.patch)}
    return ComponentSource("embed", module, inputs, {"patches": {1: "L"}}, ("x",))


def _block(c: _Config, load: Load) -> ComponentSource:
    draw = make_drawer()
    angles = draw(SAMPLE_ROWS, c.head_dim // 2) * math.tau
    own = {
        "x": draw(1, SAMPLE_ROWS, c.dim),
        "frame_ids": torch.arange(SAMPLE_ROWS, dtype=torch.int32) % 3,
        "modulation": draw(3, 6, c.dim) * 0.1,
    }
    seen, sizes = sample_view(draw, angles, c.heads, c.head_dim)
    sizes |= {"x": {1: "K"}, "frame_ids": {0: "K"}, "modulation": {0: "F"}}
    return ComponentSource(
        "block",
        empty_module(Block(c.dim, c.ffn_dim, c.heads, c.epsilon)),
        own | seen,
        sizes,
        ("y", "k_new", "v_new"),
        tuple(partial(_block_weights, c, load, layer) for layer in range(c.layers)),
        float32=frozenset({"modulation", "cos", "sin"}),
        heads=c.heads,
    )


def _block_weights(c: _Config, load: Load, layer: int) -> Tensors:
    at, self_at, cross_at = (f"blocks.{layer}.{part}" for part in ("", "attn1.", "attn2."))
    order = _half_split_order(c.heads, c.head_dim)
    qkv = [f"{self_at}to_q", f"{self_at}to_k", f"{self_at}to_v"]
    return (
        _joined("qkv", load, qkv, [order, order, slice(None)])
        | _linear("out", load, f"{self_at}to_out.0")
        | _linear("cross_q", load, f"{cross_at}to_q")
        | _linear("cross_out", load, f"{cross_at}to_out.0")
        | _linear("ffn_up", load, f"{at}ffn.net.0.proj")
        | _linear("ffn_down", load, f"{at}ffn.net.2")
        | {
            "modulation.table": load(f"{at}scale_shift_table"),
            "q_norm.weight": load(f"{self_at}norm_q.weight")[order],
            "k_norm.weight": load(f"{self_at}norm_k.weight")[order],
            "cross_q_norm.weight": load(f"{cross_at}norm_q.weight"),
            "cross_norm.weight": load(f"{at}norm2.weight"),
            "cross_norm.bias": load(f"{at}norm2.bias"),
        }
    )


def _head(c: _Config, load: Load) -> ComponentSource:
    draw = make_drawer()
    weights = _linear("project", load, "proj_out")
    weights["modulation.table"] = load("scale_shift_table")
    return ComponentSource(
        "head",
        fill_module(Head(c.dim, c.out_channels * c.patch, c.epsilon), weights),
        {
            "out": draw(1, 6, c.dim),
            "frame_ids": torch.arange(6, dtype=torch.int32) % 3,
            "head_modulation": draw(3, c.dim) * 0.1,
        },
        {"out": {1: "L"}, "frame_ids": {0: "L"}, "head_modulation": {0: "F"}},
        ("patches",),
        float32=frozenset({"head_modulation"}),
    )


def _motion(c: _Config) -> ComponentSource:
    draw = make_drawer()
    inputs = {"out": draw(1, 3, 4, c.dim), "previous": draw(1, 4, c.dim)}
    dynamic = {"out": {1: "F", 2: "P"}, "previous": {1: "P"}}
    float32 = frozenset({"change"})
    return ComponentSource("motion", Motion().eval(), inputs, dynamic, ("change",), (), float32)


def _combine(c: _Config) -> ComponentSource:
    draw = make_drawer()
    inputs = {
        "x": draw(1, 5, c.dim),
        "residual": draw(1, 5, c.dim),
        "y": draw(1, 3, c.dim),
        "rows": torch.tensor([4, 1, 2], dtype=torch.int32),
        "row_map": torch.tensor([0, 6, 7, 3, 5], dtype=torch.int32),
    }
    long = {name: {1: "L"} for name in ("x", "residual")}
    dynamic = long | {"y": {1: "K"}, "rows": {0: "K"}, "row_map": {0: "L"}}
    return ComponentSource("combine", Combine().eval(), inputs, dynamic, ("out", "new_residual"))


def _half_split_order(heads: int, head_dim: int) -> Tensor:
    """Columns of all heads, each head's even columns before its odd ones."""
    columns = torch.arange(heads * head_dim).view(heads, head_dim // 2, 2)
    return columns.transpose(1, 2).flatten()


def _linear(to: str, load: Load, name: str) -> Tensors:
    return {f"{to}.weight": load(f"{name}.weight").T, f"{to}.bias": load(f"{name}.bias")}


def _joined(to: str, load: Load, names: list[str], orders: list[Any] | None = None) -> Tensors:
    """Several matrices side by side as [in, out], the columns of each in its order."""
    orders = orders or [slice(None)] * len(names)
    pairs = list(zip(names, orders, strict=True))
    weight = torch.cat([load(f"{name}.weight")[order] for name, order in pairs]).T
    bias = torch.cat([load(f"{name}.bias")[order] for name, order in pairs])
    return {f"{to}.weight": weight, f"{to}.bias": bias}
