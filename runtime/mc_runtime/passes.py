"""What the loop asks of a transformer: passes over a chunk, each for some of its tokens.

Neighbours: `denoise` decides chunk, step and tokens; `Transformer` computes in ONNX Runtime,
`mc_runtime.device_passes` on a GPU. What a pass leaves behind for later ones (keys, values,
residuals) belongs to a branch, which lives where the engines run; the loop only hands it on.

Axes: L tokens of a chunk, K recomputed tokens, P tokens of a frame, C channels, D head size.
"""

__all__ = ["WINDOW", "HostBranch", "HostPasses", "Passes", "Reading", "View", "list_slots"]

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mc_engines.runner import Array, Arrays, Runner
from mc_engines.timed_runner import Clock
from mc_runtime.rope import Tables
from mc_runtime.transformer import Conditions, KeyCache, Transformer, TransformerConfig

Values: TypeAlias = Any  # an array of the host or of a GPU


@dataclass(frozen=True)
class View:
    """What the tokens of a pass see, themselves apart.

    Attributes:
        chunks: Whose keys, in the order of time; None for those of their own chunk and all before.
        context: Of `encode_context`; None for the branch's.
    """

    chunks: Sequence[int] | None = None
    context: Any = None


WINDOW = View()


@dataclass(frozen=True)
class Reading:
    """What of a pass reaches the host.

    Attributes:
        patches: Of velocity, shape (1, L, ph*pw*c).
        motion: Of each frame's block output against the frame before, shape (F, P); None where it
            was not asked for.
        last_frame: The chunk's last frame of block output, from which the motion of the next chunk
            starts; stays where the engines run.
    """

    patches: NDArray[np.float32]
    motion: NDArray[np.float32] | None = None
    last_frame: Values = None

    @property
    def by_component(self) -> Arrays:
        """What reached the host, under the name of what computed it."""
        return {"head": self.patches} | ({} if self.motion is None else {"motion": self.motion})


class Passes(Protocol):
    """A transformer as the loop sees it; shared by every generation, never changed by one.

    Attributes:
        config: Sizes.
        timestep: Computes the modulation, on the host whatever runs the blocks.
    """

    @property
    def config(self) -> TransformerConfig:
        """Sizes."""
        ...

    @property
    def timestep(self) -> Runner:
        """Computes the modulation, on the host whatever runs the blocks."""
        ...

    def timed(self, clock: Clock) -> "Passes":
        """Return the same transformer, whose time in engines is added to a clock."""
        ...

    def bucket(self, recomputed: int, tokens: int) -> int:
        """Return how many tokens go through the blocks for K recomputed ones of L."""
        ...

    def encode_timesteps(self, timesteps: NDArray[np.int64], fps: int) -> Conditions:
        """Compute the modulation of every timestep, once per run."""
        ...

    def encode_context(self, embedding: NDArray[np.float32]) -> Any:
        """Compute the keys and values of a prompt, shape (1, T, text_dim), once per prompt."""
        ...

    def open_branch(
        self, context: Any, angles: Sequence[Tables], capacity: int | None = None
    ) -> Any:
        """Open what a guidance branch remembers within a window.

        Args:
            context: Of `encode_context`.
            angles: cos and sin of every token of each chunk, each (L, pairs).
            capacity: Chunks whose keys are kept at once, of consecutive ones; None for all.

        Returns:
            The branch.
        """
        ...

    def embed(self, patches: NDArray[np.float32]) -> Values:
        """Embed a chunk's patches (1, L, c*ph*pw) as tokens (1, L, C); good for its passes."""
        ...

    def evaluate(
        self, branch: Any, chunk: int, x: Values, rows: NDArray[np.intp], modulation: Array
    ) -> Values:
        """Compute the block output of a chunk: some tokens anew, the others by their residual.

        Args:
            branch: Whose keys and residuals are read, and written for these tokens.
            chunk: Position in the window.
            x: Of `embed`.
            rows: The tokens to recompute, ascending, shape (K,); all of them the first time.
            modulation: Of the chunk's timestep, shape (1, 6, C).

        Returns:
            Block output of every token, shape (1, L, C).
        """
        ...

    def recompute(
        self,
        branch: Any,
        chunk: int,
        x: Values,
        rows: NDArray[np.intp],
        modulation: Array,
        view: View = WINDOW,
    ) -> Values:
        """Run the blocks for some tokens of a chunk, and keep their keys.

        Args:
            branch: Whose keys are read, and written for these tokens.
            chunk: Position in the window.
            x: Of `embed`.
            rows: The tokens, ascending, shape (K,), at least one.
            modulation: Of the chunk's timestep, one row of `Conditions.modulation`.
            view: What they see.

        Returns:
            Block output of these tokens, shape (1, K, C).
        """
        ...

    def copy_keys(self, source: Any, target: Any, chunk: int) -> None:
        """Give a branch the keys and values of a chunk that another one has."""
        ...

    def read(
        self,
        out: Values,
        head_modulation: Array,
        motion_frames: int = 0,
        previous: Values = None,
    ) -> Reading:
        """Compute what the host wants of a pass.

        Args:
            out: Of `evaluate` or `recompute`.
            head_modulation: Of the chunk's timestep, shape (1, C), where the head is told.
            motion_frames: Frames of the chunk, to have its motion measured as well; 0 for not.
            previous: `last_frame` of the chunk before; None where there is none.

        Returns:
            Patches, and motion.
        """
        ...

    def to_host(self, values: Values) -> Array:
        """Return values as an array of the host, to look at them after a failure."""
        ...


def list_slots(chunks: Sequence[int], capacity: int, tokens: int) -> NDArray[np.intp]:
    """List the slots of the tokens of some chunks, one chunk after the other.

    Args:
        chunks: Positions in the window.
        capacity: Chunks that there are slots for; they are taken in turn.
        tokens: L.

    Returns:
        shape (len(chunks) * L,).

    Example:
        >>> list_slots([1, 2], capacity=2, tokens=3).tolist()
        [3, 4, 5, 0, 1, 2]
    """
    firsts = np.array([chunk % capacity * tokens for chunk in chunks])
    return (firsts[:, None] + np.arange(tokens)).reshape(-1)


@dataclass
class HostBranch:
    """What a branch remembers, in memory of the host.

    Attributes:
        context: Keys and values of the prompt by layer.
        angles: By chunk.
        cache: Keys and values of the window.
        capacity: Chunks that the cache has room for.
        residuals: By chunk, block output minus input of every token, each as last computed.
    """

    context: Sequence[Arrays]
    angles: Sequence[Tables]
    cache: KeyCache
    capacity: int
    residuals: dict[int, NDArray[np.float32]] = field(default_factory=dict)

    def slots(self, *chunks: int) -> NDArray[np.intp]:
        """Slots of the tokens of some chunks, one chunk after the other."""
        return list_slots(chunks, self.capacity, self.cache.slots // self.capacity)


@dataclass(frozen=True)
class HostPasses:
    """Passes in ONNX Runtime, and numpy around it.

    Attributes:
        transformer: Engines and weights.
    """

    transformer: Transformer

    @property
    def config(self) -> TransformerConfig:
        """Sizes."""
        return self.transformer.config

    @property
    def timestep(self) -> Runner:
        """Of the modulation."""
        return self.transformer.runners["timestep"]

    def timed(self, clock: Clock) -> "HostPasses":
        """Return the same transformer, whose time in engines is added to a clock."""
        return replace(self, transformer=self.transformer.timed(clock))

    def bucket(self, recomputed: int, tokens: int) -> int:
        """Return how many tokens go through the blocks; see `Transformer.bucket`."""
        return self.transformer.bucket(recomputed, tokens)

    def encode_timesteps(self, timesteps: NDArray[np.int64], fps: int) -> Conditions:
        """Compute the modulation of every timestep; see `Transformer.encode_timesteps`."""
        return self.transformer.encode_timesteps(timesteps, fps)

    def encode_context(self, embedding: NDArray[np.float32]) -> list[dict[str, Array]]:
        """Compute the keys and values of a prompt; see `Transformer.encode_context`."""
        return self.transformer.encode_context(embedding)

    def open_branch(
        self, context: Sequence[Arrays], angles: Sequence[Tables], capacity: int | None = None
    ) -> HostBranch:
        """Open a branch; see `Passes.open_branch`."""
        room = len(angles) if capacity is None else capacity
        cache = KeyCache(self.config, room * len(angles[0][0]))
        return HostBranch(context, angles, cache, room)

    def embed(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed a chunk's patches; see `Passes.embed`."""
        return self.transformer.embed(patches)

    def evaluate(
        self,
        branch: HostBranch,
        chunk: int,
        x: NDArray[np.float32],
        rows: NDArray[np.intp],
        modulation: Array,
    ) -> NDArray[np.float32]:
        """Compute the block output of a chunk; see `Passes.evaluate`."""
        if len(rows) == x.shape[1]:
            out = self.recompute(branch, chunk, x, rows, modulation)
            branch.residuals[chunk] = out - x
            return out
        residual = branch.residuals[chunk]
        out = x + residual
        if len(rows):
            y = self.recompute(branch, chunk, x, rows, modulation)
            out[:, rows] = y
            residual[:, rows] = y - x[:, rows]
        return out

    def recompute(
        self,
        branch: HostBranch,
        chunk: int,
        x: NDArray[np.float32],
        rows: NDArray[np.intp],
        modulation: Array,
        view: View = WINDOW,
    ) -> NDArray[np.float32]:
        """Run the blocks for some tokens; see `Passes.recompute`."""
        seen = range(chunk + 1) if view.chunks is None else view.chunks
        return self.transformer.recompute(
            x,
            rows,
            modulation,
            branch.angles[chunk],
            branch.context if view.context is None else view.context,
            branch.cache,
            int(branch.slots(chunk)[0]),
            branch.slots(*seen),
        )

    def copy_keys(self, source: HostBranch, target: HostBranch, chunk: int) -> None:
        """Give a branch the keys that another one has; see `Passes.copy_keys`."""
        taken, given = source.slots(chunk), target.slots(chunk)
        for layer in range(self.config.layers):
            keys, values = source.cache.keys[layer], source.cache.values[layer]
            target.cache.write(layer, given, keys[:, :, taken], values[:, :, taken])

    def read(
        self,
        out: NDArray[np.float32],
        head_modulation: Array,
        motion_frames: int = 0,
        previous: NDArray[np.float32] | None = None,
    ) -> Reading:
        """Compute what the loop wants of a pass; see `Passes.read`."""
        patches = self.transformer.head(out, head_modulation)
        if not motion_frames:
            return Reading(patches)
        motion = self.transformer.motion(out, motion_frames, previous)
        return Reading(patches, motion, out[:, -motion.shape[1] :].copy())

    def to_host(self, values: Array) -> Array:
        """Return the values."""
        return values
