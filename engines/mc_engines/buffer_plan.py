"""Which buffers the tensors of a graph share, as ONNX Runtime decides before the graph runs.

A tensor that is needed no more leaves its buffer to the next tensor of the same shape, symbols
included; where none comes, the buffer goes back to the arena. So a buffer lives longer than its
tensors, and what is freed early on cannot be taken by a tensor of another shape.

Neighbours: `block_tape` writes down nodes, `arena` replays the tape.

Source: microsoft/onnxruntime 009aae1, core/framework/allocation_planner.cc (reuse by shape, the
buffer freed last first). That sums and products are not computed in place was found by measuring
1.31, node by node.
"""

__all__ = ["Nodes"]

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mc_engines.arena import Kind, Tape


class _Node(NamedTuple):
    """A node: tensors, the shape and bytes of each output, and what its kernel takes for itself."""

    outputs: Sequence[str]
    shape: str
    size: int
    inputs: Sequence[str]
    kind: Kind
    own: Sequence[int]


@dataclass
class _Buffer:
    """Memory of tensors one after the other; `first` and `last` are the nodes that need it."""

    name: str
    shape: str
    size: int
    kind: Kind
    first: int
    last: int


@dataclass
class Nodes:
    """The nodes of a graph, in the order in which they run.

    Example:
        >>> nodes = Nodes()
        >>> nodes.add("a", "K C", 3)
        >>> nodes.add("b", "K C", 3, ["a"])
        >>> nodes.add("c", "K C", 3, ["b"])  # where a lay
        >>> nodes.add("d", "C K", 3, ["c"])  # where b lay, as the arena has it back
        >>> nodes.record().live
        6
    """

    _nodes: list[_Node] = field(default_factory=list)

    def add(
        self,
        outputs: str | Sequence[str],
        shape: str,
        size: int,
        inputs: Sequence[str] = (),
        *,
        kind: Kind = Kind.PLANNED,
        own: Sequence[int] = (),
    ) -> None:
        """Append a node. Views of a tensor are no nodes, nor is softmax, which works in place.

        Args:
            outputs: Names; each is used once in a graph.
            shape: Of each output: what is the same here is the same to ONNX Runtime.
            size: Bytes of each output.
            inputs: Names of outputs of earlier nodes.
            kind: `PLANNED`, or `OUTPUT` of the graph, whose buffer is shared with nothing.
            own: Bytes that the kernel takes while it runs.
        """
        names = [outputs] if isinstance(outputs, str) else outputs
        self._nodes.append(_Node(names, shape, size, inputs, kind, own))

    def record(self) -> Tape:
        """Lay the tensors into buffers, and write down when each is taken and given back."""
        buffers = self._share()
        tape = Tape()
        for number, node in enumerate(self._nodes):
            for buffer in buffers:
                if buffer.first == number:
                    tape.take(buffer.name, buffer.size, buffer.kind)
            own = {f"{node.outputs[0]}, own {index}": size for index, size in enumerate(node.own)}
            for name, size in own.items():
                tape.take(name, size, Kind.SCRATCH)
            tape.give(*own)
            for buffer in buffers:
                if buffer.last == number and buffer.kind is Kind.PLANNED:
                    tape.give(buffer.name)
        return tape

    def _share(self) -> list[_Buffer]:
        needed = {
            name: number
            for number, node in enumerate(self._nodes)
            for name in (*node.outputs, *node.inputs)
        }
        buffers: list[_Buffer] = []
        holds: dict[str, _Buffer] = {}
        free: list[_Buffer] = []  # last freed first
        for number, node in enumerate(self._nodes):
            for name in node.outputs:
                same = (each for each in free if each.shape == node.shape)
                buffer = next(same, None) if node.kind is Kind.PLANNED else None
                if buffer is None:
                    buffer = _Buffer(name, node.shape, node.size, node.kind, number, number)
                    buffers.append(buffer)
                else:
                    free.remove(buffer)
                holds[name] = buffer
            for name in (*node.inputs, *node.outputs):
                holds[name].last = number
                if needed[name] == number and holds[name].kind is Kind.PLANNED:
                    free.insert(0, holds[name])
        return buffers
