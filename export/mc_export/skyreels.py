"""The SkyReels-V2 transformer as graphs that recompute any subset of a chunk's tokens.

One module per graph: `TextProjection`, `Context`, `Timestep`, `Embed`, `Block`, `Head`, `Motion`,
`Combine`. `skyreels_components` fills them from a checkpoint; `export_component` traces them;
`mc_runtime` drives them in the order they stand here.

Axes: B batch (1), L tokens of a chunk, K recomputed tokens, S cache slots, M visible keys, T text
tokens, F latent frames of a chunk, P positions of a frame, C channels, H heads, D head size.

Source: Wan 2.1 (arXiv 2503.20314) and SkyReels-V2 (arXiv 2504.13074); tensor names are those of
diffusers' SkyReelsV2Transformer3DModel.
"""

__all__ = [
    "Block",
    "Combine",
    "Context",
    "Embed",
    "Head",
    "Motion",
    "TextProjection",
    "Timestep",
]

from typing import cast

import torch
from torch import Tensor, nn

from mc_export.islands import Island
from mc_export.layers import AffineNorm, Linear, RmsNorm, attend, silu, split_heads

ROPE_THETA = 10_000.0
TIMESTEP_THETA = 10_000.0
MOTION_EPSILON = 1e-8


class ModulatedNorm(Island):
    """Layer norm, then scale and shift of each token's latent frame."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor, frame_ids: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Normalise x (1, K, C) with shift and scale (F, C), looked up by frame_ids (K)."""
        normal = nn.functional.layer_norm(x, (x.shape[-1],), eps=self.epsilon)
        return normal * (1 + scale.index_select(0, frame_ids)) + shift.index_select(0, frame_ids)


class GatedSum(Island):
    """Residual sum whose update is gated by each token's latent frame."""

    def forward(self, x: Tensor, update: Tensor, frame_ids: Tensor, gate: Tensor) -> Tensor:
        """Add update (1, K, C) to x (1, K, C), gated by gate (F, C) looked up by frame_ids (K)."""
        return x + update * gate.index_select(0, frame_ids)


class Modulation(Island):
    """The learned table added to the modulation of the timestep."""

    def __init__(self, parts: int, channels: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, parts, channels))

    def forward(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Split modulation, broadcastable to (F, parts, C), into `parts` arrays (F, C)."""
        total = modulation + self.table
        return tuple(total[:, part] for part in range(total.shape[1]))


class Rotate(Island):
    """Rotary position embedding in the half-split form: pair j is channels j and D/2 + j."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x (1, H, K, D) by the angles whose cos and sin are (K, D/2)."""
        half = cos.shape[-1]
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class TextProjection(nn.Module):
    """Text embedding to the transformer's width, once per prompt."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.up = Linear(text_dim, dim)
        self.down = Linear(dim, dim)

    def forward(self, embedding: Tensor) -> Tensor:
        """Map the embedding (1, T, text_dim) to (1, T, C)."""
        hidden = nn.functional.gelu(self.up(embedding), approximate="tanh")
        return cast(Tensor, self.down(hidden))


class Context(nn.Module):
    """Cross-attention keys and values of one layer, once per prompt."""

    def __init__(self, dim: int, heads: int, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.kv = Linear(dim, 2 * dim)
        self.k_norm = RmsNorm(dim, epsilon)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Map projected text (1, T, C) to cross_k and cross_v (1, H, T, D)."""
        k, v = self.kv(text).chunk(2, dim=-1)
        return split_heads(self.k_norm(k), self.heads), split_heads(v, self.heads)


class Timestep(nn.Module):
    """Timesteps (and the fps id, where the model has one) to the modulation of a run.

    The sinusoids are computed in float64, as diffusers does; this graph runs once per generation.
    """

    def __init__(self, freq_dim: int, dim: int, fps_embedding: bool) -> None:
        super().__init__()
        self.dim = dim
        half = torch.arange(freq_dim // 2, dtype=torch.float64) / (freq_dim // 2)
        self.frequencies: Tensor
        self.register_buffer("frequencies", TIMESTEP_THETA**-half)
        self.embed_up = Linear(freq_dim, dim)
        self.embed_down = Linear(dim, dim)
        self.project = Linear(dim, 6 * dim)
        if fps_embedding:
            self.fps_embedding = nn.Parameter(torch.zeros(2, dim))
            self.fps_up = Linear(dim, dim)
            self.fps_down = Linear(dim, 6 * dim)

    def forward(self, timesteps: Tensor, fps_id: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute the modulation of blocks and head.

        Args:
            timesteps: 0 to 999, shape (n), int64.
            fps_id: 0 for 16 frames per second, 1 for anything else, shape (1), int64.

        Returns:
            modulation (n, 6, C) and head_modulation (n, C).
        """
        angles = timesteps.to(torch.float64)[:, None] * self.frequencies[None]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(torch.float32)
        hidden = self.embed_down(silu(self.embed_up(waves)))
        modulation = self.project(silu(hidden))
        if fps_id is not None:
            fps = self.fps_embedding.index_select(0, fps_id)
            modulation = modulation + self.fps_down(silu(self.fps_up(fps)))
        return modulation.reshape(-1, 6, self.dim), hidden


class Embed(nn.Module):
    """Patches of a chunk's latents to tokens."""

    def __init__(self, patch_channels: int, dim: int) -> None:
        super().__init__()
        self.project = Linear(patch_channels, dim)

    def forward(self, patches: Tensor) -> Tensor:
        """Map patches (1, L, c*ph*pw), channel first, to x (1, L, C)."""
        return cast(Tensor, self.project(patches))


class Block(nn.Module):
    """One transformer block on the recomputed tokens of a chunk.

    The cache is updated by a gather: the visible keys are looked up by `kv_map` in the cached rows
    followed by the new ones, so that slot s of the cache is named s, and new row j is named S + j.
    """

    def __init__(self, dim: int, ffn_dim: int, heads: int, epsilon: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = Modulation(6, dim)
        self.attention_norm = ModulatedNorm(epsilon)
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = RmsNorm(dim, epsilon)
        self.k_norm = RmsNorm(dim, epsilon)
        self.rotate = Rotate()
        self.out = Linear(dim, dim)
        self.gated_sum = GatedSum()
        self.cross_norm = AffineNorm(dim, epsilon)
        self.cross_q = Linear(dim, dim)
        self.cross_q_norm = RmsNorm(dim, epsilon)
        self.cross_out = Linear(dim, dim)
        self.ffn_norm = ModulatedNorm(epsilon)
        self.ffn_up = Linear(dim, ffn_dim)
        self.ffn_down = Linear(ffn_dim, dim)

    def forward(
        self,
        x: Tensor,
        frame_ids: Tensor,
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
            frame_ids: Row of `modulation` for each token, shape (K), int32.
            modulation: Of each latent frame, shape (F, 6, C).
            cos: Cosines of the rotary angles, shape (K, D/2).
            sin: Sines, shape (K, D/2).
            cross_k: Keys of the text, shape (1, H, T, D).
            cross_v: Values of the text, shape (1, H, T, D).
            k_cache: Keys of this layer, rotated, shape (1, H, S, D).
            v_cache: Values of this layer, shape (1, H, S, D).
            kv_map: Where each visible key lies: s is slot s of the cache, S + j is new row j;
                shape (M), int32.

        Returns:
            y (1, K, C), k_new (1, H, K, D), v_new (1, H, K, D).
        """
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = self.modulation(modulation)
        normal = self.attention_norm(x, frame_ids, shift, scale)
        q, k, v = self.qkv(normal).chunk(3, dim=-1)
        q = self.rotate(split_heads(self.q_norm(q), self.heads), cos, sin)
        k_new = self.rotate(split_heads(self.k_norm(k), self.heads), cos, sin)
        v_new = split_heads(v, self.heads)
        keys = torch.cat([k_cache, k_new], dim=2).index_select(2, kv_map)
        values = torch.cat([v_cache, v_new], dim=2).index_select(2, kv_map)
        x = self.gated_sum(x, self.out(attend(q, keys, values)), frame_ids, gate)
        q = split_heads(self.cross_q_norm(self.cross_q(self.cross_norm(x))), self.heads)
        x = x + self.cross_out(attend(q, cross_k, cross_v))
        hidden = self.ffn_up(self.ffn_norm(x, frame_ids, ffn_shift, ffn_scale))
        update = self.ffn_down(nn.functional.gelu(hidden, approximate="tanh"))
        return self.gated_sum(x, update, frame_ids, ffn_gate), k_new, v_new


class Head(nn.Module):
    """Block output to patches of velocity."""

    def __init__(self, dim: int, patch_channels: int, epsilon: float) -> None:
        super().__init__()
        self.modulation = Modulation(2, dim)
        self.norm = ModulatedNorm(epsilon)
        self.project = Linear(dim, patch_channels)

    def forward(self, out: Tensor, frame_ids: Tensor, head_modulation: Tensor) -> Tensor:
        """Compute the patches of velocity.

        Args:
            out: Output of the last block, shape (1, L, C).
            frame_ids: Row of `head_modulation` for each token, shape (L), int32.
            head_modulation: Of each latent frame, shape (F, C).

        Returns:
            Patches, channel last, shape (1, L, ph*pw*c).
        """
        shift, scale = self.modulation(head_modulation[:, None])
        return cast(Tensor, self.project(self.norm(out, frame_ids, shift, scale)))


class Motion(Island):
    """Relative change of the block output from one latent frame to the next."""

    def forward(self, out: Tensor, previous: Tensor) -> Tensor:
        """Compare out (1, F, P, C) with the frames before, the first with previous (1, P, C).

        Returns:
            mean |h[f] - h[f-1]| / max(mean |h[f-1]|, 1e-8), means over channels; shape (F, P). The
            published code adds 1e-8 instead; onnxscript 0.7.2 drops so small a summand.
        """
        before = torch.cat([previous[:, None], out[:, :-1]], dim=1)
        change = (out - before).abs().mean(-1) / before.abs().mean(-1).clamp(min=MOTION_EPSILON)
        return change.squeeze(0)


class Combine(nn.Module):
    """Reused and recomputed tokens to the output of a chunk and its new residual."""

    def forward(
        self, x: Tensor, residual: Tensor, y: Tensor, rows: Tensor, row_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Merge y into x + residual.

        Args:
            x: Embedded tokens, shape (1, L, C).
            residual: Block output minus input at each token's last recompute, shape (1, L, C).
            y: Block output of the recomputed tokens, shape (1, K, C).
            rows: The token of each row of y, shape (K), int32.
            row_map: l for a reused token l, L + j for one recomputed as row j; shape (L), int32.

        Returns:
            out (1, L, C) and the new residual (1, L, C).
        """
        out = torch.cat([x + residual, y], dim=1).index_select(1, row_map)
        fresh = y - x.index_select(1, rows)
        return out, torch.cat([residual, fresh], dim=1).index_select(1, row_map)
