"""MAGI-1's autoencoder in plain torch, from the formulas, tile by tile and pixel by pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor


class Vit:
    """One way through the autoencoder.

    Args:
        config: Its config.json.
        tensors: By the names of the original.
        half: `encoder` or `decoder`.
    """

    def __init__(self, config: dict, tensors: dict[str, Tensor], half: str) -> None:
        self.c = config["ddconfig"]
        self.tensors, self.half = tensors, half

    def get(self, name: str) -> Tensor:
        return self.tensors[f"{self.half}.{name}"].float()

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
        return F.layer_norm(x, weight.shape, weight, bias, 1e-5)

    def positions(self, shape: tuple[int, ...]) -> Tensor:
        learnt = self.get("pos_embed")
        side = self.c["video_size"] // self.c["patch_size"]
        grid = (self.c["video_length"] // self.c["patch_length"], side, side)
        cells = learnt[:, 1:].reshape(1, *grid, -1).permute(0, 4, 1, 2, 3)
        resized = F.interpolate(cells, size=shape, mode="trilinear", align_corners=False)
        return torch.cat([learnt[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)

    def transform(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """All layers on x (1, f*h*w, C); the first token is added and taken away again."""
        x = torch.cat([self.get("cls_token"), x], dim=1) + self.positions(shape)
        heads = self.c["num_heads"]
        for layer in range(self.c["depth"]):
            at = f"blocks.{layer}"
            qkv = self.linear(x, f"{at}.attn.qkv").unflatten(-1, (3, heads, -1))
            spread = qkv.std(-1, keepdim=True, unbiased=False) + 1e-5
            q, k, v = ((qkv - qkv.mean(-1, keepdim=True)) / spread).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + self.linear(attended, f"{at}.attn.proj")
            hidden = F.gelu(self.linear(self.norm(x, f"{at}.norm2"), f"{at}.mlp.fc1"))
            x = x + self.linear(hidden, f"{at}.mlp.fc2")
        return self.norm(x, "norm")[:, 1:]

    def encode(self, video: Tensor) -> Tensor:
        """Latents (z, f, h, w) of a tile of video (3, frames, height, width) in [-1, 1]."""
        weight = self.get("patch_embed.proj.weight")
        x = F.conv3d(video[None], weight, self.get("patch_embed.proj.bias"), weight.shape[2:])
        shape = x.shape[2:]
        x = self.transform(x.flatten(2).transpose(1, 2), shape)
        mean = self.linear(x, "last_layer").chunk(2, dim=-1)[0]
        return mean[0].T.unflatten(1, shape)

    def decode(self, latents: Tensor) -> Tensor:
        """Video (3, frames, height, width) of a tile of latents (z, f, h, w)."""
        shape = latents.shape[1:]
        x = self.transform(self.linear(latents.flatten(1).T[None], "proj_in"), shape)
        f, h, w = shape
        length, side = self.c["patch_length"], self.c["patch_size"]
        video = torch.zeros(x.shape[-1] // (length * side * side), f * length, h * side, w * side)
        blocks = x[0].reshape(f, h, w, length, side, side, -1)
        for t in range(f):
            for i in range(h):
                for j in range(w):
                    block = blocks[t, i, j].permute(3, 0, 1, 2)
                    frames, rows = (
                        slice(t * length, (t + 1) * length),
                        slice(i * side, (i + 1) * side),
                    )
                    video[:, frames, rows, j * side : (j + 1) * side] = block
        weight, bias = self.get("last_layer.weight"), self.get("last_layer.bias")
        return F.conv3d(video[None], weight, bias, padding=1)[0]


def code_in_tiles(
    code, values: Tensor, tile: tuple[int, int, int], scale: float, fade: str
) -> Tensor:
    """Code tiles of values (c, T, H, W) with an overlap of a quarter, and blend pixel by pixel.

    Args:
        code: From a tile to what becomes of it.
        values: All.
        tile: Its size along time, height and width.
        scale: How much larger a tile is along height and width after than before.
        fade: Into what a tile fades: "original" or "blended" neighbours.
    """
    length, height, width = tile
    steps = int(height * 0.75), int(width * 0.75)
    ends = int((height - steps[0]) * scale), int((width - steps[1]) * scale)
    slabs = []
    for t in range(0, values.shape[1], length):
        tops, lefts = range(0, values.shape[2], steps[0]), range(0, values.shape[3], steps[1])
        tiles = [
            [
                code(values[:, t : t + length, top : top + height, left : left + width])
                for left in lefts
            ]
            for top in tops
        ]
        seen = tiles if fade == "blended" else [[x.clone() for x in row] for row in tiles]
        rows = []
        for i, row in enumerate(tiles):
            parts = []
            for j, part in enumerate(row):
                if i:
                    above = seen[i - 1][j]
                    n = min(above.shape[2], part.shape[2], ends[0])
                    for y in range(n):
                        old = above[:, :, above.shape[2] - n + y]
                        part[:, :, y] = old * (1 - y / n) + part[:, :, y] * (y / n)
                if j:
                    before = seen[i][j - 1]
                    n = min(before.shape[3], part.shape[3], ends[1])
                    for x in range(n):
                        old = before[:, :, :, before.shape[3] - n + x]
                        part[:, :, :, x] = old * (1 - x / n) + part[:, :, :, x] * (x / n)
                cut = int(steps[0] * scale), int(steps[1] * scale)
                parts.append(part[:, :, : cut[0], : cut[1]])
            rows.append(torch.cat(parts, dim=3))
        slabs.append(torch.cat(rows, dim=2))
    return torch.cat(slabs, dim=1)
