"""Diffusion forcing: a noise level per chunk, and the transformer's pass written for training.

`draw_levels` imitates the sampler's wave: a chunk lags `LAG` of the run behind the one before.
`predict_velocity` computes what `SkyReelsV2Transformer3DModel.forward` computes with
`enable_diffusion_forcing=True` (a test holds them equal), but modulates per chunk or frame instead
of per token and attends chunk by chunk instead of through a dense mask.
"""

__all__ = [
    "CHUNK",
    "LAG",
    "SHIFT",
    "add_noise",
    "draw_led_levels",
    "draw_levels",
    "predict_velocity",
    "shift_level",
]

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import SkyReelsV2Transformer3DModel
from numpy.typing import NDArray
from torch import Tensor, nn

CHUNK = 5  # latent frames
SHIFT = 8.0
LAG = 5 / 50  # ar_step of the number of steps
_LED = 0.65, 0.97  # places in the run of what follows a lead: noise levels 0.94 to 0.996
_FRAME_RATE = 1  # id of 24 frames per second


def shift_level(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the noise level sigma of a position in the run, 0 (clean) to 1 (noise).

    Example:
        >>> shift_level(np.array([0.0, 0.1, 0.5, 1.0])).round(2).tolist()
        [0.0, 0.47, 0.89, 1.0]
    """
    return SHIFT * uniform / (1 + (SHIFT - 1) * uniform)


def draw_levels(
    rng: np.random.Generator,
    batch: int,
    chunks: int,
    clean: NDArray[np.int64],
    places: tuple[float, float] | None = None,
) -> NDArray[np.float64]:
    """Draw the noise levels of a batch as a run passes through them.

    Args:
        rng: Source of randomness.
        batch: B.
        chunks: Chunks of each sample.
        clean: How many chunks of each sample are a finished prefix, shape (B,).
        places: From where to where in the run the first chunk that is not clean may be, 0 at its
            end; None: anywhere that leaves one chunk to denoise.

    Returns:
        sigma, shape (B, chunks). At least one chunk of a sample is strictly between 0 and 1.
    """
    active = chunks - clean
    low, high = places or (LAG * (1 - active), 1.0)
    first = rng.uniform(low, high, batch)
    place = first[:, None] + LAG * (np.arange(chunks)[None] - clean[:, None])
    place = np.where(np.arange(chunks)[None] < clean[:, None], 0.0, place)
    return shift_level(np.clip(place, 0.0, 1.0))


def draw_led_levels(rng: np.random.Generator, sigma: NDArray[np.float64]) -> NDArray[np.float64]:
    """Let half of the chunks follow a first frame that has less noise.

    The others of such a chunk have so much that not they but the words say where an object goes.

    Args:
        rng: Source of randomness.
        sigma: Noise level of one chunk per sample, shape (B, 1).

    Returns:
        Noise level of each frame, shape (B, 5).
    """
    levels = sigma.repeat(CHUNK, axis=1)
    led = rng.random(len(sigma)) < 0.5
    levels[led] = shift_level(rng.uniform(*_LED, (led.sum(), 1)))
    levels[led, 0] *= rng.uniform(0.1, 1.0, led.sum())
    return levels


def add_noise(latents: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return noised latents and the velocity `noise - latents`.

    Args:
        latents: shape (B, 16, frames, h, w).
        sigma: Noise level of each chunk or frame, shape (B, chunks or frames).
        noise: Like `latents`.
    """
    frames = latents.shape[2] // sigma.shape[1]
    level = sigma.repeat_interleave(frames, dim=1)[:, None, :, None, None]
    return torch.lerp(latents, noise, level), noise - latents


def predict_velocity(
    model: SkyReelsV2Transformer3DModel,
    x: Tensor,
    timesteps: Tensor,
    text: Tensor,
    bias: Tensor,
    first: int = 0,
    depth: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the velocity of noised latents, and what the model knows of them half-way.

    Args:
        model: The transformer.
        x: Noised latents, shape (B, 16, frames, h, w); whole chunks, or less than one.
        timesteps: Of each chunk or frame, shape (B, chunks or frames), 0 to 999.
        text: Embeddings, shape (B, T, 128).
        bias: Added to the logits of the cross-attention, shape (B, 1, 1, T).
        first: Place of the first frame of `x` in the video.
        depth: Blocks before half-way.

    Returns:
        Velocity, shape like `x`; tokens after so many blocks, shape (B, L, C).
    """
    batch, levels = timesteps.shape
    conditions = model.condition_embedder
    waves = conditions.timesteps_proj(timesteps.flatten()).float()
    embedded = conditions.time_embedder(waves).unflatten(0, (batch, levels, 1))
    rate = model.fps_projection(model.fps_embedding.weight[_FRAME_RATE])
    modulation = (conditions.time_proj(F.silu(embedded)) + rate).unflatten(-1, (6, -1))
    text = conditions.text_embedder(text)
    rotation = _rotation(model, x, first)
    tokens = model.patch_embedding(x).flatten(2).transpose(1, 2).unflatten(1, (levels, -1))
    length = len(rotation) // max(1, x.shape[2] // CHUNK)
    states = [tokens]
    for block in model.blocks:
        states.append(_apply_block(block, states[-1], modulation, text, bias, rotation, length))
    shift, scale = (model.scale_shift_table[0] + embedded).chunk(2, dim=2)
    out = model.proj_out(_norm(states[-1], model.norm_out) * (1 + scale) + shift)
    return _unpatchify(out.flatten(1, 2), x.shape), states[depth].flatten(1, 2)


def _norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def _rotation(model: SkyReelsV2Transformer3DModel, x: Tensor, first: int) -> Tensor:
    """Return the rotary factors as complex numbers, shape (L, 1, D / 2)."""
    frames = x.shape[2]
    cos, sin = model.rope(x.new_empty(1, 1, first + frames, *x.shape[3:]))
    start = cos.shape[1] // (first + frames) * first
    return torch.complex(cos[0, start:, ..., 0::2].float(), sin[0, start:, ..., 1::2].float())


def _apply_block(
    block: nn.Module,
    x: Tensor,
    modulation: Tensor,
    text: Tensor,
    bias: Tensor,
    rotation: Tensor,
    length: int,
) -> Tensor:
    """Apply a block to tokens of shape (B, levels, L, C), rows of one level each."""
    parts = (block.scale_shift_table[0] + modulation).unbind(-2)
    shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = parts
    attended = _attend_self(
        block.attn1, _norm(x, block.norm1) * (1 + scale) + shift, rotation, length
    )
    x = x + gate * attended
    x = x + _attend_text(block.attn2, _norm(x, block.norm2), text, bias)
    return x + gate_ffn * block.ffn(_norm(x, block.norm3) * (1 + scale_ffn) + shift_ffn)


def _attend_self(layer: nn.Module, x: Tensor, rotation: Tensor, length: int) -> Tensor:
    """Let each chunk, so many tokens, attend to itself and to those before."""
    flat = x.flatten(1, 2)
    query, key = (
        _rotate(norm(project(flat)).unflatten(-1, (layer.heads, -1)), rotation)
        for norm, project in ((layer.norm_q, layer.to_q), (layer.norm_k, layer.to_k))
    )
    value = layer.to_v(flat).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    outs = [
        F.scaled_dot_product_attention(
            query[:, :, end - length : end], key[:, :, :end], value[:, :, :end]
        )
        for end in range(length, flat.shape[1] + 1, length)
    ]
    joined = torch.cat(outs, dim=2)  # (B, H, L, D)
    return layer.to_out[0](joined.transpose(1, 2).flatten(2)).view_as(x)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs of channels; (B, L, H, D) becomes (B, H, L, D)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x).transpose(1, 2)


def _attend_text(layer: nn.Module, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
    query = layer.norm_q(layer.to_q(x.flatten(1, 2)))
    key, value = layer.norm_k(layer.to_k(text)), layer.to_v(text)
    query, key, value = (
        part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (query, key, value)
    )
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
    return layer.to_out[0](out.transpose(1, 2).flatten(2)).view_as(x)


def _unpatchify(out: Tensor, shape: torch.Size) -> Tensor:
    """Put rows of 2 x 2 patches, shape (B, L, 2 * 2 * 16), back into latents of that shape."""
    batch, channels, frames, height, width = shape
    grid = out.reshape(batch, frames, height // 2, width // 2, 2, 2, channels)
    return grid.permute(0, 6, 1, 2, 4, 3, 5).reshape(shape)
