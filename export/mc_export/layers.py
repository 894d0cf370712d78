"""Layers that more than one adapter is made of.

Neighbours: `skyreels` and `umt5`, which use them.
"""

__all__ = ["RmsNorm"]

import torch
from torch import Tensor, nn

from mc_export.islands import Island


class RmsNorm(Island):
    """Root-mean-square norm over the last axis, without shift.

    Args:
        channels: Size C of the last axis: all heads together, where it is made of heads.
        epsilon: Added to the mean square.
    """

    def __init__(self, channels: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise shape (..., C)."""
        square = (hidden * hidden).mean(-1, keepdim=True)
        return hidden * torch.rsqrt(square + self.epsilon) * self.weight
