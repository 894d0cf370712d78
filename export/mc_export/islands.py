"""Marks the arithmetic that stays in float32 in the fp16 and bf16 graphs.

Neighbours: the adapters subclass `Island`, the precision pass casts at its border.
"""

__all__ = ["Island", "cast_real", "narrow"]

import copy
from typing import Any

import torch


class Island(torch.nn.Module):
    """A submodule whose arithmetic stays float32, whatever the precision of the graph around it.

    The precision pass turns every float32 tensor outside islands into fp16 or bf16 and casts at an
    island's border, so a subclass's forward holds just the arithmetic that the model itself keeps
    in float32: a norm, a modulation, a rotation, and nothing beside it.
    """


def narrow(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Copy a module so that it computes in a 16-bit type, but for its islands.

    What leaves an island is rounded, also where the next island takes it, which graphs do not do.

    Args:
        module: In float32.
        dtype: float16 or bfloat16.

    Returns:
        The copy. Its floating-point inputs have that type; those that go into islands may be
        float32, and are cast where another submodule takes them, as in graphs.
    """

    def cast_inputs(part: torch.nn.Module, to: torch.dtype) -> None:
        def cast(part: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return cast_real(inputs, to), {key: cast_real(each, to) for key, each in named.items()}

        part.register_forward_pre_hook(cast, with_kwargs=True)

    def border(island: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return cast_real(output, dtype)

    def lower(part: torch.nn.Module) -> None:
        if isinstance(part, Island):  # with all that is inside of it
            cast_inputs(part, torch.float32)
            part.register_forward_hook(border)
            return
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            tensor.data = cast_real(tensor.data, dtype)
        children = list(part.children())
        if not children:
            cast_inputs(part, dtype)
        for child in children:
            lower(child)

    narrowed = copy.deepcopy(module)
    lower(narrowed)
    return narrowed


def cast_real(value: Any, dtype: torch.dtype) -> Any:
    """Cast a floating-point tensor, or those of a tuple; return everything else as it is."""
    if isinstance(value, tuple):
        return tuple(cast_real(part, dtype) for part in value)
    is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.to(dtype) if is_real else value
