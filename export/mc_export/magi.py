"""The MAGI-1 transformer as graphs that recompute any subset of a chunk's tokens.

One module per graph: `TextProjection`, `Context`, `Timestep`, `Embed`, `Block`, `Head`, `Motion`.
`magi_components` fills them from a checkpoint; `export_component` traces them. They are called as
those of `skyreels` are, but for what differs between the models: a chunk has one modulation, which
gates and neither shifts nor scales; the text is attended to beside the chunk's keys, not after
them; the head takes no modulation; motion is measured on latents.

Axes: B batch (1), L tokens of a chunk, K recomputed tokens, S cache slots, M visible keys, T text
tokens, F latent frames of a chunk, P positions of a frame, C channels, H heads of queries, G heads
of keys and values, D head size, R rotated channels of a head, E channels of the condition.

Source: MAGI-1 (arXiv 2505.13211), SandAI-org/MAGI-1 6ff822e, inference/model/dit. In 16 bit the
original computes patch embedding, conditions, text projection, final layer, norms of rotated
queries and keys, rotation, gated sums and post-norms in float32, and so do these graphs: they are
islands. Two things differ: the attention's output projection multiplies and gives 16 bits, where
the original takes the time to do it in float32; and the 1 that the original adds to the stored
weights of norms, in 16 bits where a norm belongs to the text, is added in float32 at export.
"""

__all__ = [
    "Block",
    "BlockSizes",
    "Context",
    "Embed",
    "Head",
    "Motion",
    "TextProjection",
    "Timestep",
]

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mc_export.islands import Island
from mc_export.layers import AffineNorm, Linear, attend, silu, split_heads

TIMESTEP_THETA = 10_000.0
TIMESTEP_SCALE = 1000.0
WAVES = 128  # of the timestep, each as cosine and sine


@dataclass(frozen=True)
class BlockSizes:
    """The sizes of a block.

    Attributes:
        dim: C.
        heads: H.
        key_heads: G.
        head_dim: D.
        ffn_dim: Inner channels of the feed-forward.
        gated: Whether the feed-forward is gated, and its first matrix twice as wide.
        condition_dim: E.
        epsilon: Of every norm.
    """

    dim: int
    heads: int
    key_heads: int
    head_dim: int
    ffn_dim: int
    gated: bool
    condition_dim: int
    epsilon: float


class RotateFirst(Island):
    """Rotary position embedding of a head's first channels, in the half-split form.

    Pair j is channels j and R/2 + j; channels from R on are left as they are.
    """

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x (1, H, K, D) by the angles whose cos and sin are (K, R/2)."""
        half = cos.shape[-1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([*turned, rest], dim=-1)


class GatedPostNorm(Island):
    """Residual sum whose update is gated and then normalised."""

    def __init__(self, channels: int, epsilon: float) -> None:
        super().__init__()
        self.norm = AffineNorm(channels, epsilon)

    def forward(self, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        """Add to x (1, K, C) the norm of update (1, K, C) times gate (1, C)."""
        return x + cast(Tensor, self.norm(update * gate))


class TextProjection(Island):
    """Text embedding to the transformer's width, once per prompt."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.project = Linear(text_dim, dim)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map the embedding (1, T, text_dim) to (1, T, C)."""
        return nn.functional.silu(self.project(embedding))


class Context(nn.Module):
    """Cross-attention keys and values of one layer, once per prompt."""

    def __init__(self, dim: int, key_heads: int, head_dim: int, epsilon: float) -> None:
        super().__init__()
        self.key_heads = key_heads
        self.kv = Linear(dim, 2 * key_heads * head_dim, bias=False)
        self.k_norm = AffineNorm(head_dim, epsilon)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Map projected text (1, T, C) to cross_k and cross_v (1, G, T, D)."""
        k, v = self.kv(text).chunk(2, dim=-1)
        return self.k_norm(split_heads(k, self.key_heads)), split_heads(v, self.key_heads)


class TimeEmbedding(nn.Module):
    """A time, or the length of a step, as a vector of the condition's width.

    Angles reach 32,000, so that their rounding matters: they are computed in float32 in the order
    of the original. Its frequencies are exponentials of float32 numbers, whose last bit depends on
    the machine; here they are rounded correctly.

    Args:
        condition_dim: E.
        rounding: The sinusoids are rounded to this type, as the original does.
    """

    def __init__(self, condition_dim: int, rounding: torch.dtype) -> None:
        super().__init__()
        self.rounding = rounding
        exponents = -math.log(TIMESTEP_THETA) * torch.arange(WAVES, dtype=torch.float32) / WAVES
        self.frequencies: Tensor
        self.register_buffer("frequencies", exponents.double().exp().float())
        self.up = Linear(2 * WAVES, condition_dim)
        self.down = Linear(condition_dim, condition_dim)

    def forward(self, times: Tensor) -> Tensor:
        """Map times (n) to (n, E)."""
        angles = times[:, None] * self.frequencies[None] * TIMESTEP_SCALE
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        waves = waves.to(self.rounding).to(torch.float32)
        return cast(Tensor, self.down(silu(self.up(waves))))


class Timestep(nn.Module):
    """Timesteps to the modulation of a run.

    The text enters here as one of two rows of the null caption, never as the prompt, so that the
    modulation is a table that is known before the run. `null_rows` holds the last row of the null
    caption, which the branches without a prompt take, and then the last but one, which the branch
    with a prompt takes, and a distilled model in every pass.
    """

    def __init__(self, condition_dim: int, text_dim: int, rounding: torch.dtype) -> None:
        super().__init__()
        self.embed = TimeEmbedding(condition_dim, rounding)
        self.null_rows = nn.Parameter(torch.zeros(2, text_dim))
        self.project = Linear(text_dim, condition_dim)

    def forward(self, timesteps: Tensor, null_row: Tensor, distill: Tensor | None = None) -> Tensor:
        """Compute the modulation of the blocks.

        Args:
            timesteps: From 0, which is noise, to 1, which is clean, shape (n).
            null_row: Which row of the null caption: 0 the last, 1 the last but one; shape (n),
                int64.
            distill: Of a distilled model, what stands for the length of its steps: half the
                number of steps, or 8 divided by the step's interval where there are 12; shape (n).

        Returns:
            modulation, shape (n, E).
        """
        condition = self.embed(timesteps)
        if distill is not None:
            condition = condition + self.embed(distill)
        return cast(Tensor, condition + self.project(self.null_rows.index_select(0, null_row)))


class Embed(Island):
    """Patches of a chunk's latents to tokens."""

    def __init__(self, patch_channels: int, dim: int) -> None:
        super().__init__()
        self.project = Linear(patch_channels, dim, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches (1, L, c*ph*pw), channel first, to x (1, L, C)."""
        return cast(Tensor, self.project(patches))


class Block(nn.Module):
    """One transformer block on the recomputed tokens of a chunk.

    The cache is updated by a gather, as in `skyreels.Block`: slot s of the cache is named s in
    `kv_map`, and new row j is named S + j.
    """

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        dim, epsilon = sizes.dim, sizes.epsilon
        self.sizes = sizes
        self.norm = AffineNorm(dim, epsilon)
        self.qkv = Linear(dim, 2 * (sizes.heads + sizes.key_heads) * sizes.head_dim, bias=False)
        self.q_norm = AffineNorm(sizes.head_dim, epsilon)
        self.k_norm = AffineNorm(sizes.head_dim, epsilon)
        self.cross_q_norm = AffineNorm(sizes.head_dim, epsilon)
        self.rotate = RotateFirst()
        self.out = Linear(2 * sizes.heads * sizes.head_dim, dim, bias=False)
        self.gates = Linear(sizes.condition_dim, 2 * dim)
        self.gated_sum = GatedPostNorm(dim, epsilon)
        self.ffn_norm = AffineNorm(dim, epsilon)
        self.ffn_up = Linear(dim, (1 + sizes.gated) * sizes.ffn_dim, bias=False)
        self.ffn_down = Linear(sizes.ffn_dim, dim, bias=False)
        self.ffn_gated_sum = GatedPostNorm(dim, epsilon)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        cos: Tensor,
        sin: Tensor,
        cross_k: Tensor,
        cross_v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        kv_map: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the block's output for K tokens, and their keys and values.

        Args:
            x: Hidden states of the recomputed tokens, shape (1, K, C).
            modulation: Of the chunk, shape (1, E).
            cos: Cosines of the rotary angles, shape (K, R/2).
            sin: Sines, shape (K, R/2).
            cross_k: Keys of the text, shape (1, G, T, D).
            cross_v: Values of the text, shape (1, G, T, D).
            k_cache: Keys of this layer, rotated, shape (1, G, S, D).
            v_cache: Values of this layer, shape (1, G, S, D).
            kv_map: Where each visible key lies: s is slot s of the cache, S + j is new row j;
                shape (M), int32.

        Returns:
            y (1, K, C), k_new (1, G, K, D), v_new (1, G, K, D).
        """
        q, cross_q, k, v = self._project(self.norm(x))
        q = self.rotate(self.q_norm(q), cos, sin)
        k_new = self.rotate(self.k_norm(k), cos, sin)
        keys = torch.cat([k_cache, k_new], dim=2).index_select(2, kv_map)
        values = torch.cat([v_cache, v], dim=2).index_select(2, kv_map)
        seen = attend(q, keys, values)
        read = attend(self.cross_q_norm(cross_q), cross_k, cross_v)
        gates = torch.tanh(self.gates(nn.functional.silu(modulation)))
        gate, ffn_gate = gates.chunk(2, dim=-1)
        x = self.gated_sum(x, self.out(torch.cat([seen, read], dim=-1)), gate)
        return self.ffn_gated_sum(x, self._feed_forward(self.ffn_norm(x)), ffn_gate), k_new, v

    def _project(self, x: Tensor) -> list[Tensor]:
        """Queries, queries of the text, keys and values, each (1, heads, K, D)."""
        heads = (self.sizes.heads, self.sizes.heads, self.sizes.key_heads, self.sizes.key_heads)
        parts = self.qkv(x).split([count * self.sizes.head_dim for count in heads], dim=-1)
        return [split_heads(part, count) for part, count in zip(parts, heads, strict=True)]

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = self.ffn_up(x)
        if self.sizes.gated:
            gate, value = hidden.chunk(2, dim=-1)
            return cast(Tensor, self.ffn_down(nn.functional.silu(gate) * value))
        return cast(Tensor, self.ffn_down(nn.functional.gelu(hidden)))


class Head(Island):
    """Block output to patches of velocity, which points from noise to clean latents."""

    def __init__(self, dim: int, patch_channels: int, epsilon: float) -> None:
        super().__init__()
        self.norm = AffineNorm(dim, epsilon)
        self.project = Linear(dim, patch_channels, bias=False)

    def forward(self, out: Tensor) -> Tensor:
        """Map the output of the last block (1, L, C) to patches (1, L, ph*pw*c), channel last."""
        return cast(Tensor, self.project(self.norm(out)))


class Motion(Island):
    """Change of the latents from one latent frame to the next."""

    def forward(self, latents: Tensor, previous: Tensor) -> Tensor:
        """Compare each latent frame with the one before it.

        Args:
            latents: Of a chunk, as rows of patches, shape (1, F, P, c*ph*pw).
            previous: Of the last latent frame of the chunk before, shape (1, P, c*ph*pw).

        Returns:
            mean |x[f] - x[f-1]|, over channels and the patch; shape (F, P).
        """
        before = torch.cat([previous[:, None], latents[:, :-1]], dim=1)
        return (latents - before).abs().mean(-1).squeeze(0)
