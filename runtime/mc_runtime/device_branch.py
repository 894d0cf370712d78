"""What a guidance branch remembers within a window, on a GPU.

Neighbours: `DevicePasses` fills it; `HostBranch` is the one of the host.

Axes: L tokens of a chunk, K recomputed tokens, S cache slots, M visible slots, C channels, H heads,
D head size.
"""

__all__ = ["Contexts", "DeviceBranch", "PassKind"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mc_engines.device.arrays import DeviceArray
from mc_engines.device.cuda import Graph
from mc_runtime.passes import list_slots

Contexts = Sequence[Mapping[str, DeviceArray]]


class PassKind(NamedTuple):
    """What two passes of a branch have to have in common for one to be the other's recording.

    Attributes:
        chunk: Position in the window.
        size: K, padded up to a bucket.
        visible: M.
        context: Number of the text among those of the branch.
    """

    chunk: int
    size: int
    visible: int
    context: int


@dataclass(eq=False)
class DeviceBranch:
    """What a branch remembers, on the GPU.

    Attributes:
        context: Keys and values of the prompt by layer, where a pass names no others.
        angles: cos and sin by chunk.
        keys: By layer, shape (1, H, S, D).
        values: By layer, shape (1, H, S, D).
        capacity: Chunks that S has room for.
        residuals: By chunk, shape (1, L, C).
        kv_maps: By chunk and M, room for the map of the visible slots, shape (M,).
        contexts: Those that passes have seen; a recorded pass reads them wherever they are.
        graphs: Recorded passes; None for what was met once.
    """

    context: Contexts
    angles: list[tuple[DeviceArray, DeviceArray]]
    keys: list[DeviceArray]
    values: list[DeviceArray]
    capacity: int
    residuals: dict[int, DeviceArray] = field(default_factory=dict)
    kv_maps: dict[tuple[int, int], DeviceArray] = field(default_factory=dict)
    contexts: list[Contexts] = field(default_factory=list)
    graphs: dict[PassKind, Graph | None] = field(default_factory=dict)

    def slots(self, *chunks: int) -> NDArray[np.intp]:
        """Slots of the tokens of some chunks, one chunk after the other."""
        return list_slots(chunks, self.capacity, self.keys[0].shape[2] // self.capacity)

    def kind_of(self, chunk: int, size: int, visible: int, context: Contexts) -> PassKind:
        """Return the kind of a pass, and keep its context for as long as the branch."""
        numbers = [number for number, kept in enumerate(self.contexts) if kept is context]
        if not numbers:
            self.contexts.append(context)
        return PassKind(chunk, size, visible, *numbers or [len(self.contexts) - 1])
