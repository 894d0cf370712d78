"""What ONNX Runtime's CPU allocator keeps, replayed from what a graph takes and gives back.

Every session has an arena. It asks the system for regions, each as a rule twice as large as the
last, and never returns one; a page of a region is in memory once something has lain there. The
first run of a graph takes its tensors one by one; ONNX Runtime notes when each lived, and every
later run of the same shapes takes one block that holds them all. The block seldom fits between what
the first run left, so that an arena grows to about twice what is alive at a time.

Neighbours: `block_tape` and `decoder_tape` say what the graphs take, `host_sizes` adds up what a
run holds.

Source: microsoft/onnxruntime 009aae1, core/framework/bfc_arena.cc (regions, best fit, splitting,
joining). That the block of later runs is packed by best fit was found by measuring 1.31.
"""

__all__ = ["Arena", "Kind", "Tape"]

from dataclasses import dataclass, field
from enum import Enum, auto

_ROUND = 256  # bytes that every piece is rounded up to
_FIRST_REGION, _LARGEST_REGION = 1 << 20, 1 << 30
_DEAD = 128 << 20  # a piece that is larger by this is split, as one that is twice as large is
_SETTLED = 3  # later runs after which nothing is new
_BINS = 20  # free pieces are sorted by powers of two of 256 bytes


class Kind(Enum):
    """What a tensor is: one that lies in the block of later runs, or one that never does."""

    PLANNED = auto()
    OUTPUT = auto()
    SCRATCH = auto()


@dataclass
class Tape:
    """What a run of a graph takes and gives back, in order.

    Attributes:
        events: Name, bytes where it is taken and None where it is given back, kind.
    """

    events: list[tuple[str, int | None, Kind]] = field(default_factory=list)
    _kinds: dict[str, Kind] = field(default_factory=dict)

    def take(self, name: str, size: int, kind: Kind = Kind.PLANNED) -> None:
        """Take so many bytes under a name."""
        self.events.append((name, size, kind))
        self._kinds[name] = kind

    def give(self, *names: str) -> None:
        """Give back what was taken."""
        self.events += [(name, None, self._kinds[name]) for name in names]

    @property
    def live(self) -> int:
        """The most bytes that are taken at a time."""
        held: dict[str, int] = {}
        most = 0
        for name, size, _ in self.events:
            if size is None:
                del held[name]
            else:
                held[name] = size
                most = max(most, sum(held.values()))
        return most

    @property
    def block(self) -> int:
        """Bytes of a block with room for all that is planned, each where it fits best."""
        placed: dict[str, tuple[int, int]] = {}
        top = 0
        for name, size, kind in self.events:
            if kind is not Kind.PLANNED:
                continue
            if size is None:
                del placed[name]
                continue
            start = _find_gap(sorted(placed.values()), size)
            placed[name] = start, start + size
            top = max(top, start + size)
        return top


def _find_gap(taken: list[tuple[int, int]], size: int) -> int:
    """Where the smallest gap that is large enough begins, or the free end."""
    best, least, end = -1, 0, 0
    for start, stop in taken:
        if start - end >= size and (best < 0 or start - end < least):
            best, least = end, start - end
        end = max(end, stop)
    return end if best < 0 else best


@dataclass
class _Piece:
    region: int
    start: int
    size: int
    free: bool = True


class Arena:
    """The allocator of a session.

    Example:
        >>> arena, tape = Arena(), Tape()
        >>> tape.take("x", 3 << 20)
        >>> tape.give("x")
        >>> arena.run(tape)
        >>> arena.resident == 3 << 20
        True
    """

    def __init__(self) -> None:
        self._next = _FIRST_REGION
        self._regions = 0
        self._pieces: list[_Piece] = []
        self._touched: dict[int, list[tuple[int, int]]] = {}

    @property
    def resident(self) -> int:
        """Bytes in which something has lain so far."""
        return sum(stop - start for spans in self._touched.values() for start, stop in spans)

    @property
    def regions(self) -> list[int]:
        """Bytes of every region, in the order in which they were asked for."""
        sizes = [0] * self._regions
        for piece in self._pieces:
            sizes[piece.region] += piece.size
        return sizes

    def run(self, tape: Tape, runs: int = 1) -> None:
        """Run a graph some times with the same shapes, new to it.

        The outputs of a run, which the next one takes, are given back after that.
        """
        outputs = self._replay(tape, frozenset(Kind))
        for _ in range(min(runs - 1, _SETTLED)):
            block = [self._take(size)] if (size := tape.block) else []
            later = self._replay(tape, frozenset({Kind.OUTPUT, Kind.SCRATCH}))
            for piece in (*block, *outputs):
                self._give(piece)
            outputs = later
        for piece in outputs:
            self._give(piece)

    def _replay(self, tape: Tape, kinds: frozenset[Kind]) -> list[_Piece]:
        held: dict[str, _Piece] = {}
        for name, size, kind in tape.events:
            if kind not in kinds:
                continue
            if size is None:
                self._give(held.pop(name))
            else:
                held[name] = self._take(size)
        return [*held.values()]

    def _take(self, size: int) -> _Piece:
        size = max(1, -(-size // _ROUND)) * _ROUND
        piece = self._find(size) or self._extend(size)
        if piece.size >= 2 * size or piece.size - size >= _DEAD:
            rest = _Piece(piece.region, piece.start + size, piece.size - size)
            self._pieces.insert(self._pieces.index(piece) + 1, rest)
            piece.size = size
        piece.free = False
        self._touch(piece.region, piece.start, piece.start + size)
        return piece

    def _find(self, size: int) -> _Piece | None:
        fitting = [piece for piece in self._pieces if piece.free and piece.size >= size]
        # Of pieces of one size that at the lowest address: regions come from the system downwards.
        return min(
            fitting,
            key=lambda piece: (_bin(piece.size), piece.size, -piece.region, piece.start),
            default=None,
        )

    def _extend(self, size: int) -> _Piece:
        fits = size <= self._next
        while self._next < size:
            self._next *= 2
        piece = _Piece(self._regions, 0, self._next)
        if fits:
            self._next = min(2 * self._next, _LARGEST_REGION)
        self._regions += 1
        self._pieces.append(piece)
        return piece

    def _give(self, piece: _Piece) -> None:
        piece.free = True
        index = self._pieces.index(piece)
        for first in (index, index - 1):
            pair = self._pieces[max(first, 0) : first + 2]
            if len(pair) == 2 and pair[0].region == pair[1].region and pair[0].free & pair[1].free:
                pair[0].size += pair[1].size
                del self._pieces[first + 1]

    def _touch(self, region: int, start: int, stop: int) -> None:
        spans = sorted([*self._touched.get(region, ()), (start, stop)])
        merged = [spans[0]]
        for first, last in spans[1:]:
            if first <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], last)
            else:
                merged.append((first, last))
        self._touched[region] = merged


def _bin(size: int) -> int:
    return min(_BINS, (size // _ROUND).bit_length() - 1)
