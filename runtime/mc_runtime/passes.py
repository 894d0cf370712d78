"""What the loop asks of a transformer: passes over a chunk, each for some of its tokens.

Neighbours: `denoise` decides chunk, step and tokens; `Transformer` computes in ONNX Runtime,
`mc_runtime.device_passes` on a GPU. What a pass leaves behind for later ones (keys, values,
residuals) belongs to a branch, which lives where the engines run; the loop only hands it on.

Axes: L tokens of a chunk, K recomputed tokens, P tokens of a frame, C channels, D head size.
"""

__all__ = ["Angles", "HostBranch", "HostPasses", "Passes", "Reading"]

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mc_engines.runner import Array, Arrays
from mc_engines.timed_runner import Clock
from mc_runtime.transformer import Conditions, KeyCache, Transformer, TransformerConfig

Angles: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]
Values: TypeAlias = Any  # an array of the host or of a GPU


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


class Passes(Protocol):
    """A transformer as the loop sees it; shared by every generation, never changed by one.

    Attributes:
        config: Sizes.
    """

    @property
    def config(self) -> TransformerConfig:
        """Sizes."""
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

    def open_branch(self, context: Any, angles: Sequence[Angles]) -> Any:
        """Open what a guidance branch remembers within a window.

        Args:
            context: Of `encode_context`.
            angles: cos and sin of every token of each chunk, each (L, D/2).

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

    def write_keys(self, branch: Any, chunk: int, x: Values, modulation: Array) -> None:
        """Run the blocks for every token of a chunk for the sake of its keys alone."""
        ...

    def read(
        self, out: Values, head_modulation: Array, motion_frames: int = 0, previous: Values = None
    ) -> Reading:
        """Compute what the host wants of a pass.

        Args:
            out: Of `evaluate`.
            head_modulation: Of the chunk's timestep, shape (1, C).
            motion_frames: Frames of the chunk, to have its motion measured as well; 0 for not.
            previous: `last_frame` of the chunk before; None where there is none.

        Returns:
            Patches, and motion.
        """
        ...

    def to_host(self, values: Values) -> Array:
        """Return values as an array of the host, to look at them after a failure."""
        ...


@dataclass
class HostBranch:
    """What a branch remembers, in memory of the host.

    Attributes:
        context: Keys and values of the prompt by layer.
        angles: By chunk.
        cache: Keys and values of the window.
        residuals: By chunk, block output minus input of every token, each as last computed.
    """

    context: Sequence[Arrays]
    angles: Sequence[Angles]
    cache: KeyCache
    residuals: dict[int, NDArray[np.float32]] = field(default_factory=dict)


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

    def open_branch(self, context: Sequence[Arrays], angles: Sequence[Angles]) -> HostBranch:
        """Open a branch; see `Passes.open_branch`."""
        slots = sum(len(cos) for cos, _ in angles)
        return HostBranch(context, angles, KeyCache(self.config, slots))

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
            out = self._recompute(branch, chunk, x, rows, modulation)
            branch.residuals[chunk] = out - x
            return out
        residual = branch.residuals[chunk]
        out = x + residual
        if len(rows):
            y = self._recompute(branch, chunk, x, rows, modulation)
            out[:, rows] = y
            residual[:, rows] = y - x[:, rows]
        return out

    def write_keys(
        self, branch: HostBranch, chunk: int, x: NDArray[np.float32], modulation: Array
    ) -> None:
        """Run the blocks for the keys alone; see `Passes.write_keys`."""
        self._recompute(branch, chunk, x, np.arange(x.shape[1]), modulation)

    def _recompute(
        self,
        branch: HostBranch,
        chunk: int,
        x: NDArray[np.float32],
        rows: NDArray[np.intp],
        modulation: Array,
    ) -> NDArray[np.float32]:
        first = chunk * x.shape[1]
        return self.transformer.recompute(
            x, rows, modulation, branch.angles[chunk], branch.context, branch.cache, first
        )

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
