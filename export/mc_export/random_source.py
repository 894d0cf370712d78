"""A checkpoint that is made up: each tensor from its name and a seed, so that no file is needed.

It stands in for real weights where their values do not matter: the real sizes (28 GB of them) can
be exported and run on a machine that has neither the files nor the room for them. Neighbour:
`TensorSource`, which this is one of.
"""

__all__ = ["RandomSource"]

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mc_export.tensor_source import Shape

# Values are drawn in float32 in pieces of this many, so that a bfloat16 tensor of a billion values
# does not need twice its own size beside itself.
_PIECE = 1 << 22


class RandomSource:
    """Random tensors of given names and shapes, the same for the same seed.

    Matrices are normal with variance 1 / fan-in, so that what flows through them keeps its size;
    weights of norms are about 1, biases small.

    Args:
        shapes: Shape of each tensor by name, as `check_tensors` expects them.
        dtype: Of every tensor.
        seed: Of all tensors; each is drawn from the seed and its own name, in any order.

    Example:
        >>> source = RandomSource({"norm.weight": (2,)}, torch.bfloat16, seed=0)
        >>> source.load("norm.weight").equal(source.load("norm.weight"))
        True
    """

    def __init__(self, shapes: Mapping[str, Shape], dtype: torch.dtype, seed: int) -> None:
        self._shapes = dict(shapes)
        self._dtype = dtype
        self._seed = seed

    def names(self) -> frozenset[str]:
        """Every name given."""
        return frozenset(self._shapes)

    def shape(self, name: str) -> Shape:
        """The shape given."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype given, for every tensor."""
        if name not in self._shapes:
            raise KeyError(name)
        return self._dtype

    def load(self, name: str) -> Tensor:
        """Draw the tensor; it is made anew at each call and kept by the caller alone."""
        shape = self._shapes[name]
        mean, deviation = _mean_and_deviation(name, shape)
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        tensor = torch.empty(shape, dtype=self._dtype)
        values = tensor.view(-1)
        for start in range(0, values.numel(), _PIECE):
            piece = values[start : start + _PIECE]
            piece.copy_(torch.normal(mean, deviation, piece.shape, generator=generator))
        return tensor


def _mean_and_deviation(name: str, shape: Shape) -> tuple[float, float]:
    if name.endswith("bias"):
        return 0.0, 0.02
    fan_in = math.prod(shape[1:])
    return (1.0, 0.1) if fan_in == 1 else (0.0, fan_in**-0.5)
