"""Marks the arithmetic that stays in float32 in the fp16 and bf16 graphs.

Neighbours: the adapters subclass `Island`, the precision pass casts at its border.
"""

__all__ = ["Island"]

import torch


class Island(torch.nn.Module):
    """A submodule whose arithmetic stays float32, whatever the precision of the graph around it.

    The precision pass turns every float32 tensor outside islands into fp16 or bf16 and casts at an
    island's border, so a subclass's forward holds just the arithmetic that the model itself keeps
    in float32: a norm, a modulation, a rotation, and nothing beside it.
    """
