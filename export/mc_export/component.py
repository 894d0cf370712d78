"""What an adapter hands to the exporter: one part of the model, ready to be traced.

Neighbours: the adapters (`wan_vae_components` and its siblings) make these, the exporter turns
each into graphs and weight files. What stays float32 is decided by class: see `Island`.
"""

__all__ = ["ComponentSource"]

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mc_engines.specs import PRECISIONS, Precision


@dataclass(frozen=True)
class ComponentSource:
    """One component before export: a module, sample inputs, and where its weights come from.

    With `layers` empty the module carries its weights, which are baked into the graph. With
    `layers` given the module's parameters become inputs of the graph, named like them, and the
    module holds placeholders of the right shape.

    Attributes:
        name: Such as `vae_decoder_next`.
        module: In float32 and eval mode; its forward takes `inputs` by name and returns a tensor
            or a tuple of tensors.
        inputs: Sample inputs in forward's order: float32, int64 or int32.
        dynamic: By input name: axis -> symbol of a size that changes from call to call. Equal
            symbols mean equal sizes; a symbol may be a multiple of another, such as `8*h`.
        outputs: Names of the outputs, in order.
        layers: One callable per layer. It loads that layer's parameters alone, named as by
            `module.named_parameters()`, in the checkpoint's dtype, matrices as [in, out].
        float32: Inputs and outputs that stay float32 in every precision, such as rotary tables.
        precisions: The graphs to write.
        heads: Attention heads, where a form with fused attention is to be written as well, for
            passes over so many keys that their scores would not fit in memory.
        depth: By how much more than one layer's the errors of its outputs usually are in bf16.
    """

    name: str
    module: torch.nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, dict[int, str]]
    outputs: tuple[str, ...]
    layers: tuple[Callable[[], dict[str, torch.Tensor]], ...] = ()
    float32: frozenset[str] = frozenset()
    precisions: tuple[Precision, ...] = PRECISIONS
    heads: int = 0
    depth: int = 1
