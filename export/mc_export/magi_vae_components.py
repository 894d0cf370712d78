"""The components of MAGI-1's autoencoder, filled from a checkpoint.

Neighbours: `magi_vae` computes, `mc_runtime.tiled_vae` drives the exported graphs. Matrices are
transposed to [in, out]; of the encoder's last one only the half that gives the mean is kept.

Source: SandAI-org/MAGI-1 6ff822e, inference/model/vae/vae_model.py; the sizes of tiles are those of
inference/pipeline/video_process.py.
"""

__all__ = ["describe_vae", "vae_components", "vae_positions", "vae_tensors"]

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mc_engines.errors import CheckpointError
from mc_export.checkpoint import load_finite
from mc_export.component import ComponentSource
from mc_export.filling import Load, Tensors, empty_module, fill_module, make_drawer
from mc_export.magi_vae import VaeBlock, VaeDecoderHead, VaeEmbed, VaeEncoderHead
from mc_export.tensor_source import TensorSource

TILE_PIXELS = 256  # of a tile, along each side
TILE_OVERLAP = 0.25  # with the next, as a share of its side
HALVES = "encoder", "decoder"
_SAMPLE = 2, 3, 4  # latents of the tile that graphs are traced with
# What the original takes where a configuration leaves a size out.
_SIZES = {
    "video_size": 256,
    "video_length": 16,
    "patch_size": 8,
    "patch_length": 4,
    "z_chans": 4,
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "mlp_ratio": 4.0,
}
# Keys that would change the network: the value that is supported, and the original's default.
_FIXED: dict[str, tuple[Any, Any]] = {
    "in_chans": (3, 3),
    "double_z": (True, True),
    "with_cls_token": (True, True),
    "qkv_bias": (True, False),
    "ln_in_attn": (True, False),
    "conv_last_layer": (True, False),
    "norm_code": (False, False),
    "use_rope": (False, False),
    "use_final_proj": (False, False),
}
_USE_RELEASED = "Use the autoencoder that MAGI-1 was released with."


@dataclass(frozen=True)
class _Config:
    """The sizes of the network.

    Attributes:
        channels: C.
        heads: H.
        inner: Channels inside of the feed-forward.
        layers: Of each transformer.
        latent_channels: z.
        patch: Frames, rows and columns that a latent stands for.
        grid: Latents along time, height and width that positions were learnt for.
    """

    channels: int
    heads: int
    inner: int
    layers: int
    latent_channels: int
    patch: tuple[int, int, int]
    grid: tuple[int, int, int]

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "_Config":
        """Take the sizes from config.json, after refusing what these graphs do not compute."""
        inner = config.get("ddconfig", {})
        given = {
            "_class_name": (config.get("_class_name"), "ViTVAE"),
            "model_type": (config.get("model_type", "vit"), "vit"),
        } | {key: (inner.get(key, default), value) for key, (value, default) in _FIXED.items()}
        for key, (got, expected) in given.items():
            if got != expected:
                raise CheckpointError(
                    f"vae config: expected {key} {expected}, got {got}. {_USE_RELEASED}"
                )
        c = _SIZES | {key: value for key, value in inner.items() if key in _SIZES}
        patch = c["patch_length"], c["patch_size"], c["patch_size"]
        lengths = c["video_length"], c["video_size"], c["video_size"]
        channels, heads = c["embed_dim"], c["num_heads"]
        if channels % heads or channels % math.prod(patch):
            raise CheckpointError(
                f"vae config: expected embed_dim that {heads} heads and the {math.prod(patch)} "
                f"pixels of a patch divide, got {channels}. {_USE_RELEASED}"
            )
        return cls(
            channels,
            heads,
            int(channels * c["mlp_ratio"]),
            c["depth"],
            c["z_chans"],
            patch,
            tuple(size // step for size, step in zip(lengths, patch, strict=True)),
        )


def vae_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name every tensor of the autoencoder and its shape.

    Args:
        config: Its config.json.

    Returns:
        Shapes by tensor name.

    Raises:
        CheckpointError: The configuration is not that of MAGI-1's autoencoder.
    """
    c = _Config.read(config)
    pixels = math.prod(c.patch)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.patch_embed.proj.weight": (c.channels, 3, *c.patch),
        "encoder.last_layer.weight": (2 * c.latent_channels, c.channels),
        "decoder.proj_in.weight": (c.channels, c.latent_channels),
        "decoder.last_layer.weight": (3, c.channels // pixels, 3, 3, 3),
    }
    for half in HALVES:
        shapes |= {f"{half}.norm.weight": (c.channels,)}
        for layer in range(c.layers):
            at = f"{half}.blocks.{layer}."
            shapes |= {
                f"{at}attn.qkv.weight": (3 * c.channels, c.channels),
                f"{at}attn.proj.weight": (c.channels, c.channels),
                f"{at}norm2.weight": (c.channels,),
                f"{at}mlp.fc1.weight": (c.inner, c.channels),
                f"{at}mlp.fc2.weight": (c.channels, c.inner),
            }
    shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    for half in HALVES:
        shapes |= {
            f"{half}.cls_token": (1, 1, c.channels),
            f"{half}.pos_embed": (1, 1 + math.prod(c.grid), c.channels),
        }
    return shapes


def describe_vae(config: Mapping[str, Any], scale: float, tile_frames: int) -> dict[str, Any]:
    """Say what the runtime must know of the autoencoder; stands in the manifest.

    Args:
        config: Its config.json.
        scale: By which an encoder's latents are multiplied for the transformer.
        tile_frames: Frames that the original codes at once.

    Returns:
        The manifest's `config.vae`.

    Raises:
        CheckpointError: The configuration is not that of MAGI-1's autoencoder.
    """
    c = _Config.read(config)
    length, side, _ = c.patch
    tile = TILE_PIXELS // side
    return {
        "z_dim": c.latent_channels,
        "spatial_factor": side,
        "temporal_factor": length,
        "latents_scale": scale,
        "layers": c.layers,
        "positions": list(c.grid),
        "tile": [tile_frames // length, tile, tile],
        "overlap": int(tile * TILE_OVERLAP),
    }


def vae_positions(tensors: TensorSource) -> Tensors:
    """Load what tells tokens where they are.

    Args:
        tensors: Of the autoencoder.

    Returns:
        `encoder` and `decoder`, shape (1 + F*H*W, C): the token that stands before those of a tile,
        and what is added to each of these.

    Raises:
        CheckpointError: A value is NaN or infinite.
    """
    tables = {}
    for half in HALVES:
        table = load_finite(tensors, f"{half}.pos_embed")[0]
        first = load_finite(tensors, f"{half}.cls_token")[0].float() + table[:1].float()
        tables[half] = torch.cat([first.to(table.dtype), table[1:]])
    return tables


def vae_components(config: Mapping[str, Any], tensors: TensorSource) -> Iterator[ComponentSource]:
    """Make the components of the encoder, then those of the decoder.

    Args:
        config: Its config.json.
        tensors: Of the autoencoder; loaded when a component is exported.

    Yields:
        `vae_encoder_embed`, `vae_encoder_block`, `vae_encoder_head`, and the same of the decoder.

    Raises:
        CheckpointError: The configuration is not that of MAGI-1's autoencoder; a weight is NaN.
    """
    c = _Config.read(config)
    load = partial(load_finite, tensors)
    patches = load("encoder.patch_embed.proj.weight").flatten(1).T
    bias = load("encoder.patch_embed.proj.bias")
    yield _embed("vae_encoder_embed", c, patches, bias)
    yield _block("encoder", c, load)
    yield _encoder_head(c, load)
    latents, bias = load("decoder.proj_in.weight").T, load("decoder.proj_in.bias")
    yield _embed("vae_decoder_embed", c, latents, bias)
    yield _block("decoder", c, load)
    yield _decoder_head(c, load)


def _embed(name: str, c: _Config, matrix: Tensor, bias: Tensor) -> ComponentSource:
    draw, tokens = make_drawer(), math.prod(_SAMPLE)
    module = VaeEmbed(len(matrix), c.channels)
    inputs = {
        "patches": draw(1, tokens, len(matrix)),
        "positions": draw(1, tokens, c.channels),
    }
    return ComponentSource(
        name,
        fill_module(module, {"project.weight": matrix, "project.bias": bias}),
        inputs,
        {key: {1: "N"} for key in inputs},
        ("x",),
        float32=frozenset(inputs),
    )


def _block(half: str, c: _Config, load: Load) -> ComponentSource:
    tokens = 1 + math.prod(_SAMPLE)
    return ComponentSource(
        f"vae_{half}_block",
        empty_module(VaeBlock(c.channels, c.heads, c.inner)),
        {"x": make_drawer()(1, tokens, c.channels)},
        {"x": {1: "N"}},
        ("y",),
        tuple(_layer_loader(f"{half}.blocks.{layer}.", load) for layer in range(c.layers)),
        heads=c.heads,
    )


def _layer_loader(at: str, load: Load) -> Callable[[], Tensors]:
    matrices = {
        "qkv": "attn.qkv",
        "out": "attn.proj",
        "ffn_up": "mlp.fc1",
        "ffn_down": "mlp.fc2",
    }

    def load_layer() -> Tensors:
        weights = {f"{to}.weight": load(f"{at}{name}.weight").T for to, name in matrices.items()}
        weights |= {f"{to}.bias": load(f"{at}{name}.bias") for to, name in matrices.items()}
        return weights | _norm(f"{at}norm2", load)

    return load_layer


def _encoder_head(c: _Config, load: Load) -> ComponentSource:
    z = c.latent_channels
    weights = _norm("encoder.norm", load) | {
        "project.weight": load("encoder.last_layer.weight")[:z].T,
        "project.bias": load("encoder.last_layer.bias")[:z],
    }
    return ComponentSource(
        "vae_encoder_head",
        fill_module(VaeEncoderHead(c.channels, z), weights),
        {"x": make_drawer()(1, math.prod(_SAMPLE), c.channels)},
        {"x": {1: "N"}},
        ("latents",),
        float32=frozenset({"latents"}),
    )


def _decoder_head(c: _Config, load: Load) -> ComponentSource:
    weights = _norm("decoder.norm", load) | {
        f"smooth.{kind}": load(f"decoder.last_layer.{kind}") for kind in ("weight", "bias")
    }
    return ComponentSource(
        "vae_decoder_head",
        fill_module(VaeDecoderHead(c.channels, c.patch), weights),
        {"x": make_drawer()(1, *_SAMPLE, c.channels)},
        {"x": {1: "f", 2: "h", 3: "w"}},
        ("frames",),
    )


def _norm(name: str, load: Load) -> Tensors:
    return {f"norm.{kind}": load(f"{name}.{kind}") for kind in ("weight", "bias")}
