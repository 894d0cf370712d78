"""Activations of passes on a GPU, in one block that every pass over chunks of a size uses.

Neighbours: `DevicePasses` fills it.
"""

__all__ = ["MEMORY_REMEDY", "Room", "open_room"]

import weakref
from dataclasses import dataclass, field, replace

from mc_engines.device.arrays import DeviceArray, allocate_array, allocate_block
from mc_engines.device.device import Device
from mc_engines.specs import TensorSpec

MEMORY_REMEDY = (
    "Pass --max-vram to stream the weights, or generate a smaller video or shorter window."
)
# What every pass over chunks of L tokens uses, and of which graph's tensor it has the shape. `y0`
# and `y1` are output of one block and input of the next, in turn; `spare` takes a new residual.
_ROOM = {
    "patches": ("embed", "patches"),
    "x": ("embed", "x"),
    "y0": ("block", "y"),
    "y1": ("block", "y"),
    "cos": ("block", "cos"),
    "sin": ("block", "sin"),
    "modulation": ("block", "modulation"),
    "k_new": ("block", "k_new"),
    "v_new": ("block", "v_new"),
    "out": ("combine", "out"),
    "spare": ("combine", "new_residual"),
    "head_modulation": ("head", "head_modulation"),
    "velocity": ("head", "patches"),
}


@dataclass(frozen=True, eq=False)
class Room:
    """Arrays of `_ROOM`, motion, and indices: rows, slots, row_map, and zeros for frame ids.

    The modulation has one row, since a chunk has one timestep: every frame id is 0.

    Attributes:
        device: Whose memory it is.
        arrays: By name.
        unused: Room for last frames that nobody keeps any more.
    """

    device: Device
    arrays: dict[str, DeviceArray]
    unused: list[DeviceArray] = field(default_factory=list)

    def __getitem__(self, name: str) -> DeviceArray:
        return self.arrays[name]

    def keep_frame(self, frame: DeviceArray) -> DeviceArray:
        """Copy a last frame; its place is used again when the copy is forgotten, and not freed.

        Args:
            frame: shape (1, P, C), the same in every call.

        Returns:
            The copy, when the stream gets there.

        Raises:
            EngineError: There is not enough memory.
        """
        place = self.unused.pop() if self.unused else self._allocate_frame(frame)
        kept = replace(place)
        weakref.finalize(kept, self.unused.append, place)
        self.device.stream.copy(kept.address, frame.address, frame.nbytes)
        return kept

    def _allocate_frame(self, frame: DeviceArray) -> DeviceArray:
        purpose = f"a last frame {frame.shape}"
        return allocate_array(self.device.gpu, frame.shape, frame.dtype, purpose, MEMORY_REMEDY)


def open_room(device: Device, tokens: int) -> Room:
    """Allocate the arrays for chunks of L tokens.

    Args:
        device: With the engines whose tensors they become.
        tokens: L.

    Returns:
        The room.

    Raises:
        EngineError: There is not enough memory.
    """
    specs = [
        _fix(device, name, *source, tokens)
        for name, source in _ROOM.items()
        if device.takes(*source)
    ]
    numbers = ("rows", "slots", "row_map", "zeros")
    specs += [TensorSpec(name, "int32", (tokens,)) for name in numbers]
    specs.append(TensorSpec("motion", "float32", (tokens,)))
    purpose = f"activations of chunks of {tokens} tokens"
    arrays = allocate_block(device.gpu, specs, purpose, MEMORY_REMEDY)
    zeros = arrays["zeros"]
    device.stream.fill_zero(zeros.address, zeros.nbytes)
    return Room(device, arrays)


def _fix(device: Device, name: str, component: str, tensor: str, tokens: int) -> TensorSpec:
    """The spec of a graph's tensor for chunks of L tokens, under the room's name for it."""
    spec = device.engines[component].spec(tensor)
    sizes = {"L": tokens, "K": tokens, "F": 1}
    shape = tuple(size if isinstance(size, int) else sizes[size] for size in spec.shape)
    return TensorSpec(name, spec.dtype, shape)
