"""What a schedule decided in a run, step by step: recorded, saved, loaded.

`mc_runtime.denoise` fills a `DecisionTrace` while it runs, `replay` turns one into a policy, and
`mc-inspect` draws it. A trace file is an npz with the masks packed to bits; beside it lie the same
numbers as lines of JSON.
"""

__all__ = ["DecisionTrace", "Mode"]

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from motioncache.policy import RunShape

SCHEMA = "motioncache.trace/v1"
# What numpy raises for a text, a lone array, an empty, cut or damaged file.
_NOT_NPZ = (
    *(OSError, ValueError, AttributeError, TypeError, KeyError, EOFError),
    *(zipfile.BadZipFile, zlib.error),
)


class Mode(IntEnum):
    """What happened to a chunk in a row."""

    IDLE = -1
    REUSE = 0
    PARTIAL = 1
    FULL = 2
    CLEAN = 3

    @classmethod
    def of(cls, recomputed: int, tokens: int) -> "Mode":
        """Name a step that recomputes some of a chunk's tokens."""
        return cls.FULL if recomputed == tokens else cls.PARTIAL if recomputed else cls.REUSE


@dataclass(frozen=True)
class DecisionTrace:
    """Everything that was decided in a run. The arrays are filled in place while it runs.

    Axes: rows of all windows, one window after the other; branches cond, uncond; chunks of the
    largest window; L tokens of a chunk.

    Attributes:
        recompute: 1 where the blocks ran for the token, 0 where it was reused, -1 where the chunk
            took no step in the row; shape (rows, branches, chunks, L), int8.
        mode: A `Mode`; CLEAN is the clean pass of a finished chunk or of the prefix, in the row
            before which it ran; shape (rows, branches, chunks), int8.
        bucket: Tokens that went through the blocks, padding included; like mode, int32.
        distance: Rescaled distance, NaN where none; like mode.
        accumulated: Least, mean and greatest accumulated distance that was compared with the
            threshold, NaN where none; shape (rows, branches, chunks, 3).
        weights: Motion weights after the step, NaN where none; like recompute, float16.
        engine_ms: Milliseconds in engines; like mode.
        host_ms: Milliseconds elsewhere; like mode.
        policy_ms: The part of `host_ms` that the policy took; like mode.
        step: The step that a chunk takes, 1 to N, 0 where none; shape (rows, chunks), int16.
        window_start: First row of each window.
        run: What was run, ready for JSON: `frames`, `positions`, `clean_pass` and more;
            `branches`, their names, where they are not cond and uncond.
    """

    recompute: NDArray[np.int8]
    mode: NDArray[np.int8]
    bucket: NDArray[np.int32]
    distance: NDArray[np.float32]
    accumulated: NDArray[np.float32]
    weights: NDArray[np.float16]
    engine_ms: NDArray[np.float32]
    host_ms: NDArray[np.float32]
    policy_ms: NDArray[np.float32]
    step: NDArray[np.int16]
    window_start: tuple[int, ...]
    run: dict[str, Any]

    @classmethod
    def empty(cls, shape: RunShape, run: Mapping[str, Any]) -> "DecisionTrace":
        """Return the trace of a run that has not begun.

        Args:
            shape: Of the run.
            run: What is to be known of it; `frames` and `positions` are added.
        """
        size = (len(shape.active), shape.branches, shape.active.shape[1])
        return cls(
            recompute=np.full((*size, shape.tokens), -1, np.int8),
            mode=np.full(size, Mode.IDLE, np.int8),
            bucket=np.zeros(size, np.int32),
            distance=np.full(size, np.nan, np.float32),
            accumulated=np.full((*size, 3), np.nan, np.float32),
            weights=np.full((*size, shape.tokens), np.nan, np.float16),
            engine_ms=np.zeros(size, np.float32),
            host_ms=np.zeros(size, np.float32),
            policy_ms=np.zeros(size, np.float32),
            step=np.zeros((size[0], size[2]), np.int16),
            window_start=shape.window_start,
            run={"frames": shape.frames, "positions": shape.positions, **run},
        )

    @classmethod
    def from_masks(
        cls,
        recompute: NDArray[np.int8],
        frames: int,
        clean_pass: bool,
        window_start: tuple[int, ...] = (0,),
        switches: Mapping[str, bool] | None = None,
    ) -> "DecisionTrace":
        """Make a trace of decisions that come from elsewhere, to replay them.

        Args:
            recompute: As in a trace, shape (rows, branches, chunks, L).
            frames: Latent frames F of a chunk.
            clean_pass: Whether finished chunks are evaluated at timestep 0.
            window_start: First row of each window.
            switches: Where the run departs from the family's own way, by name.

        Returns:
            The trace, without distances and times.

        Raises:
            ValueError: The array is not of that kind.
        """
        if recompute.ndim != 4 or recompute.dtype != np.int8 or recompute.shape[3] % frames:
            raise ValueError(
                f"recompute: expected int8 (rows, branches, chunks, L) with L a multiple of "
                f"{frames} frames, got {recompute.dtype} {recompute.shape}. "
                "Pass 1, 0 and -1 as DecisionTrace.recompute has them."
            )
        active = recompute[:, 0, :, 0] >= 0
        positions = recompute.shape[3] // frames
        steps = int(active[slice(*window_start[:2])].sum(axis=0).max())
        shape = RunShape(active, window_start, recompute.shape[1], frames, positions, steps)
        trace = cls.empty(shape, {"clean_pass": clean_pass, "switches": switches})
        trace.recompute[:] = recompute
        count = (recompute == 1).sum(axis=3)
        trace.mode[:] = np.select(
            [recompute[..., 0] < 0, count == 0, count < shape.tokens],
            [Mode.IDLE, Mode.REUSE, Mode.PARTIAL],
            Mode.FULL,
        )
        trace.bucket[:] = count
        return trace

    def save(self, path: Path) -> None:
        """Write the trace to exactly this file, and its lines to `<path>.jsonl`.

        Raises:
            OSError: A file cannot be written.
        """
        with path.open("wb") as file:
            self.write(file)
        with Path(f"{path}.jsonl").open("wb") as file:
            self.write_lines(file)

    def write(self, file: BinaryIO) -> None:
        """Write the npz to an opened file."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays["recompute"] = np.packbits(self.recompute == 1, axis=3)
        header = {"schema": SCHEMA, "window_start": self.window_start, "run": self.run}
        np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)

    def write_lines(self, file: BinaryIO) -> None:
        """Write the lines to an opened file."""
        file.writelines(json.dumps(line).encode() + b"\n" for line in self.lines())

    @property
    def branch_names(self) -> tuple[str, ...]:
        """Names of the guidance branches, in their order."""
        names = self.run.get("branches", ("cond", "uncond"))
        return tuple(names[: self.mode.shape[1]])

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield one record per row, branch and chunk that did anything, ready for JSON."""
        for row, branch, chunk in np.argwhere(self.mode != Mode.IDLE).tolist():
            at = row, branch, chunk
            low, mean, high = (_number(value) for value in self.accumulated[at])
            yield {
                "row": row,
                "window": int(np.searchsorted(self.window_start, row, side="right")) - 1,
                "branch": self.branch_names[branch],
                "chunk": chunk,
                "step": int(self.step[row, chunk]),
                "mode": Mode(self.mode[at]).name.lower(),
                "tokens": self._computed(at),
                "bucket": int(self.bucket[at]),
                "distance": _number(self.distance[at]),
                "accumulated": {"min": low, "mean": mean, "max": high},
                "engine_ms": _number(self.engine_ms[at]),
                "host_ms": _number(self.host_ms[at]),
                "policy_ms": _number(self.policy_ms[at]),
            }

    def _computed(self, at: tuple[int, int, int]) -> int:
        """Tokens for which the blocks ran."""
        if self.mode[at] == Mode.CLEAN:
            return int(self.bucket[at])
        return int((self.recompute[at] == 1).sum())

    def shares(self) -> NDArray[np.float64]:
        """Return the share of the tokens that was recomputed, NaN where a chunk took no step.

        Returns:
            Shape (rows, branches, chunks).
        """
        shares = (self.recompute == 1).mean(axis=3)
        return np.where(self.recompute[..., 0] < 0, np.nan, shares)

    def free(self) -> NDArray[np.bool_]:
        """Return where the policy had a choice: where a distance was compared with a threshold.

        Returns:
            shape (rows, branches, chunks), bool; False in the warm-up and in forced steps.
        """
        return ~np.isnan(self.distance)

    def reused(self) -> float | None:
        """Return the share of tokens reused where the policy had a choice, 0 to 1.

        Returns:
            None where it never had one.
        """
        free = self.free()
        return float(1 - self.shares()[free].mean()) if free.any() else None

    def rows_of(self, window: int) -> slice:
        """Return the rows of a window."""
        bounds = (*self.window_start, len(self.step))
        return slice(bounds[window], bounds[window + 1])

    def count(self, rows: slice = slice(None)) -> dict[str, int]:
        """Count what was done in some rows.

        Args:
            rows: Of the run.

        Returns:
            Passes by mode in lower case, and `tokens` for which the blocks ran; nothing that is 0.
        """
        mode = self.mode[rows]
        counts = {kind.name.lower(): int((mode == kind).sum()) for kind in Mode if kind >= 0}
        computed = (self.recompute[rows] == 1).sum() + self.bucket[rows][mode == Mode.CLEAN].sum()
        return {name: n for name, n in (counts | {"tokens": int(computed)}).items() if n}

    @classmethod
    def load(cls, path: str | Path) -> "DecisionTrace":
        """Read a trace that `save` wrote.

        Args:
            path: The npz file, whatever its name.

        Returns:
            The trace.

        Raises:
            ValueError: It is no trace of this version, or damaged.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as stored:
                header = json.loads(str(stored["header"]))
                arrays = {name: stored[name] for name in _ARRAYS}
            if header["schema"] != SCHEMA:
                raise ValueError(f"schema: expected {SCHEMA}, got {header['schema']}")
            run, mode = header["run"], arrays["mode"]
            tokens = run["frames"] * run["positions"]
            bits = np.unpackbits(arrays["recompute"], axis=3, count=tokens).astype(np.int8)
            idle = (mode == Mode.IDLE) | (mode == Mode.CLEAN)
            arrays["recompute"] = np.where(idle[..., None], np.int8(-1), bits)
            return cls(**arrays, window_start=tuple(header["window_start"]), run=run)
        except _NOT_NPZ as error:
            raise ValueError(
                f"{path}: expected a trace of a run, got: {error}. "
                "Pass a file that mc-generate --trace wrote."
            ) from error


_ARRAYS = tuple(
    entry.name for entry in fields(DecisionTrace) if entry.name not in ("window_start", "run")
)


def _number(value: Any) -> float | None:
    """A float that JSON has; None for NaN."""
    return None if np.isnan(value) else round(float(value), 6)
