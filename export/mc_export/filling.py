"""What adapters do alike: fill a module with a checkpoint's tensors, draw sample inputs.

Neighbours: `skyreels_components` and `magi_components`, which use it.
"""

__all__ = ["Load", "Tensors", "empty_module", "fill_module", "make_drawer"]

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

Load: TypeAlias = Callable[[str], Tensor]
Tensors: TypeAlias = dict[str, Tensor]


def make_drawer() -> Callable[..., Tensor]:
    """Return what draws normal samples, one after the other, the same in every export."""
    return partial(torch.randn, generator=torch.Generator().manual_seed(0))


def empty_module(module: nn.Module) -> nn.Module:
    """Let the parameters of a module be zeros that take no memory.

    Args:
        module: Whose weights will be given to it whenever it runs: layer by layer.

    Returns:
        The module, in eval mode. Its parameters have their shapes, and cannot be written to.
    """
    for parameter in module.parameters():
        parameter.data = torch.zeros(()).expand(parameter.shape)
    return module.eval()


def fill_module(module: nn.Module, weights: Tensors) -> nn.Module:
    """Give a module its weights, in float32.

    Args:
        module: With placeholders.
        weights: By the names of its parameters, all of them.

    Returns:
        The module, in eval mode. Weights that are float32 are used where they lie.
    """
    parameters = {name: nn.Parameter(value.float(), False) for name, value in weights.items()}
    buffers = dict(module.named_buffers())
    module.load_state_dict(parameters | buffers, assign=True)
    return module.eval()
