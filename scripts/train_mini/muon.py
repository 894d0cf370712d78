"""An optimizer for matrices: momentum whose singular values are made equal.

Muon learns more from a sample than AdamW at this size. Matrices and convolution kernels go through
it (kernels as matrices of one row per output channel); everything else through AdamW.
"""

__all__ = ["build_optimizers", "descend", "orthogonalise"]

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_DECAY = 0.1  # of matrices that are kept small, times the rate, in each step
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return a matrix with the same singular vectors and singular values near 1.

    Newton-Schulz iteration with a quintic polynomial, which pushes singular values into about
    0.7 to 1.2 and goes no further.

    Args:
        matrix: shape (..., n, m).
        steps: Iterations.

    Source: K. Jordan et al., Muon: an optimizer for hidden layers in neural networks (2024).
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class _Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; tall matrices take larger steps. Decay is decoupled."""

    def __init__(
        self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; those of one shape in one go."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    direction = self._direct(parameter, group["momentum"])
                    by_shape[direction.shape[0], direction.shape[1]].append((parameter, direction))
            for (rows, columns), pairs in by_shape.items():
                scale = max(1, rows / columns) ** 0.5
                updates = orthogonalise(torch.stack([direction for _, direction in pairs]))
                for (parameter, _), update in zip(pairs, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def _direct(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Return where the gradient and its momentum point, as a matrix."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"]
        average.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(average, momentum).flatten(1)


def build_optimizers(
    model: nn.Module,
    matrix_rate: float,
    other_rate: float,
    others: tuple[str, ...],
    decayed: tuple[str, ...] = (),
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of a model and AdamW for the rest.

    Args:
        model: What is trained.
        matrix_rate: Learning rate of Muon.
        other_rate: Learning rate of AdamW.
        others: Parts of parameters' names that go to AdamW although they are matrices: embeddings
            and the first and last layers.
        decayed: Beginnings of the names of matrices that Muon keeps small: parts that nothing
            else bounds, for norms follow, and that would outgrow 16-bit arithmetic.
    """
    matrices: dict[float, list[nn.Parameter]] = {_DECAY: [], 0.0: []}
    rest = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and min(parameter.flatten(1).shape) > 1
        other = any(part in name for part in others)
        decay = _DECAY if name.startswith(decayed) else 0.0
        (matrices[decay] if is_matrix and not other else rest).append(parameter)
    groups = [{"params": params, "weight_decay": decay} for decay, params in matrices.items()]
    return [
        _Muon(groups, matrix_rate),
        torch.optim.AdamW(rest, other_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def descend(
    loss: Tensor, model: nn.Module, optimizers: list[torch.optim.Optimizer], factor: float
) -> float:
    """Take one step down the loss, the learning rates times `factor`; return the gradient's norm.

    Gradients are clipped to a norm of 1.
    """
    model.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("full_rate", group["lr"])
        optimizer.step()
    return norm.item()
