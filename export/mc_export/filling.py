"""What adapters do alike: fill a module with a checkpoint's tensors, draw sample inputs.

Neighbours: `skyreels_components` and `magi_components`, which use it.
"""

__all__ = [
    "SAMPLE_ROWS",
    "Load",
    "Tensors",
    "empty_module",
    "fill_module",
    "make_drawer",
    "sample_view",
]

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

Load: TypeAlias = Callable[[str], Tensor]
Tensors: TypeAlias = dict[str, Tensor]
SAMPLE_ROWS = 6  # recomputed tokens of a sample pass
_SLOTS = 16  # of the cache beside it


def make_drawer() -> Callable[..., Tensor]:
    """Return what draws normal samples, one after the other, the same in every export."""
    return partial(torch.randn, generator=torch.Generator().manual_seed(0))


def sample_view(
    draw: Callable[..., Tensor], angles: Tensor, heads: int, head_dim: int
) -> tuple[Tensors, dict[str, dict[int, str]]]:
    """Draw what the tokens of a block's sample pass see: positions, text, cached and new keys.

    Args:
        draw: Of `make_drawer`.
        angles: Rotary angles of the tokens, shape (SAMPLE_ROWS, pairs).
        heads: Of keys and values.
        head_dim: Channels of each.

    Returns:
        The inputs, and their sizes that change from call to call.
    """
    text, cache = (1, heads, 7, head_dim), (1, heads, _SLOTS, head_dim)
    inputs = {
        "cos": angles.cos(),
        "sin": angles.sin(),
        "cross_k": draw(*text),
        "cross_v": draw(*text),
        "k_cache": draw(*cache),
        "v_cache": draw(*cache),
        "kv_map": torch.tensor([0, 1, 2, 16, 17, 5, 18, 19, 20, 21], dtype=torch.int32),
    }
    sizes = {
        **{name: {0: "K"} for name in ("cos", "sin")},
        **{name: {2: "T"} for name in ("cross_k", "cross_v")},
        **{name: {2: "S"} for name in ("k_cache", "v_cache")},
        "kv_map": {0: "M"},
    }
    return inputs, sizes


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
