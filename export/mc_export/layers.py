"""Layers that more than one adapter is made of.

Neighbours: `skyreels`, `magi` and `t5`, which use them.

Axes: K tokens, M visible keys, H heads, D head size.
"""

__all__ = ["AffineNorm", "Linear", "RmsNorm", "attend", "silu", "split_heads"]

import torch
from torch import Tensor, nn

from mc_export.islands import Island


class Linear(nn.Module):
    """`x @ weight + bias` with the matrix stored [in, out], as ONNX's MatMul takes it.

    Args:
        inputs: Size of the last axis of what comes in.
        outputs: Size of the last axis of what goes out.
        bias: Whether there is one.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map shape (..., in) to (..., out)."""
        product = x @ self.weight
        return product if self.bias is None else product + self.bias


class AffineNorm(Island):
    """Layer norm with learned scale and shift.

    Args:
        channels: Size C of the last axis.
        epsilon: Added to the variance.
    """

    def __init__(self, channels: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise shape (..., C)."""
        shape = (x.shape[-1],)
        return nn.functional.layer_norm(x, shape, self.weight, self.bias, self.epsilon)


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


def silu(x: Tensor) -> Tensor:
    """Activate in the graph of the timesteps, in float32, by the exponential.

    ONNX Runtime's Sigmoid errs by about 1e-7 on the CPU however small the sigmoid is: where x is
    -10, that is 0.2 % of what should come out, and of a timestep's modulation it is the same error
    in every token. Its Exp errs by 1e-7 of the value. In float16 it would overflow.

    Args:
        x: Of any shape.

    Returns:
        `x * sigmoid(x)`, of the same shape.
    """
    return x / (1 + torch.exp(-x))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Turn (1, K, H*D) into (1, H, K, D)."""
    return x.reshape(1, -1, heads, x.shape[-1] // heads).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in the form that TensorRT fuses: MatMul, Softmax, MatMul, the scale on q alone.

    Scaling the keys as well, as torch's own decomposition does, would pass over the whole cache.
    Where several heads of queries share a head of keys, their queries are rows of one matrix, one
    head after the other: keys are not repeated.

    Args:
        q: Queries, shape (1, H, K, D).
        k: Keys, shape (1, G, M, D); H is a multiple of G, and head h of the queries sees head
            h // (H / G) of the keys.
        v: Values, shape (1, G, M, D).

    Returns:
        shape (1, K, H*D).
    """
    heads, key_heads = q.shape[1], k.shape[1]
    if heads != key_heads:
        q = q.reshape(1, key_heads, -1, q.shape[-1])
    scores = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)
    values = scores @ v
    if heads != key_heads:
        values = values.reshape(1, heads, -1, q.shape[-1])
    return values.transpose(1, 2).flatten(2)
