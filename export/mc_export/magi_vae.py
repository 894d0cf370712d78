"""The autoencoder of MAGI-1 as graphs: a vision transformer each way.

`VaeEmbed` makes tokens of patches or of latents, `VaeBlock` is one layer of either transformer,
`VaeEncoderHead` and `VaeDecoderHead` make latents and frames of its tokens. `magi_vae_components`
fills them from a checkpoint; `mc_runtime.tiled_vae` cuts tiles, puts a token of its own before
those of a tile, and drives them.

Axes: N tokens of a tile, and the one before them where there are blocks; f, h, w latents of a tile,
C channels, H heads, D head size.

Source: MAGI-1 (arXiv 2505.13211), SandAI-org/MAGI-1 6ff822e, inference/model/vae/vae_module.py.
"""

__all__ = ["VaeBlock", "VaeDecoderHead", "VaeEmbed", "VaeEncoderHead"]

from torch import Tensor, nn

from mc_export.islands import Island
from mc_export.layers import AffineNorm, Linear, attend

EPSILON = 1e-5  # of every norm


class HeadNorm(Island):
    """Normalises each head by its standard deviation, to which the epsilon is added."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise shape (..., D)."""
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred * centred).mean(-1, keepdim=True).sqrt()
        return centred / (deviation + EPSILON)


class VaeEmbed(nn.Module):
    """Patches of pixels, or latents, as tokens that know where they are."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.project = Linear(inputs, channels)

    def forward(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Map patches (1, N, inputs) to tokens and add their positions, both (1, N, C)."""
        tokens: Tensor = self.project(patches) + positions
        return tokens


class VaeBlock(nn.Module):
    """One layer: attention among all tokens, whose queries, keys and values are normed by head."""

    def __init__(self, channels: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(channels, 3 * channels)
        self.head_norm = HeadNorm()
        self.out = Linear(channels, channels)
        self.norm = AffineNorm(channels, EPSILON)
        self.ffn_up = Linear(channels, inner)
        self.ffn_down = Linear(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (1, N, C) to their like."""
        size = x.shape[-1] // self.heads
        heads = self.qkv(x).reshape(1, -1, 3 * self.heads, size)
        q, k, v = self.head_norm(heads).transpose(1, 2).chunk(3, dim=1)
        x = x + self.out(attend(q, k, v))
        updated: Tensor = x + self.ffn_down(nn.functional.gelu(self.ffn_up(self.norm(x))))
        return updated


class VaeEncoderHead(nn.Module):
    """Tokens to latents: the mean of their distribution, which is also its mode."""

    def __init__(self, channels: int, latent_channels: int) -> None:
        super().__init__()
        self.norm = AffineNorm(channels, EPSILON)
        self.project = Linear(channels, latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (1, N, C) to latents (1, N, z)."""
        latents: Tensor = self.project(self.norm(x))
        return latents


class VaeDecoderHead(nn.Module):
    """Tokens to pixels: each becomes its block of the video, which a convolution smooths.

    Args:
        channels: C.
        patch: Frames, rows and columns of a block.
    """

    def __init__(self, channels: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.norm = AffineNorm(channels, EPSILON)
        length, height, width = patch
        self.smooth = nn.Conv3d(channels // (length * height * width), 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (1, f, h, w, C) to frames (1, 3, frames, height, width), not yet clipped."""
        _, f, h, w, _ = x.shape
        length, height, width = self.patch
        blocks = self.norm(x).reshape(f, h, w, length, height, width, -1)
        video = blocks.permute(6, 0, 3, 1, 4, 2, 5)
        frames: Tensor = self.smooth(video.reshape(1, -1, f * length, h * height, w * width))
        return frames
