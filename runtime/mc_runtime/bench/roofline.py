"""A roofline of a generation: every call of an engine takes as long as its operations or its bytes.

`EngineCosts` says what a call costs, `Schedule` which calls a run makes row by row, `Limits` what a
device can do, and `predict_run` adds it up. It is a model: no call overlaps another, nothing waits,
and VAE, text encoder, sampler and copies to the host are not in it.

Neighbours: `flops` counts the operations; `devices` has the GPUs; `predict` tells.

Axes: L tokens of a chunk, T text tokens, C channels.
"""

__all__ = ["Call", "EngineCosts", "Limits", "RunTime", "Schedule", "find_steps", "predict_run"]

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_runtime.flops import ModelFlops, Sight
from mc_runtime.run_plan import RunPlan
from motioncache import DecisionTrace, Mode


@dataclass(frozen=True)
class Call:
    """What calls of engines cost.

    Attributes:
        flops: Operations of matrix products with weights.
        attention: Operations of products of activations: scores, and their use.
        weights: Bytes of weights that are read.
        keys: Bytes of keys and values, of the window and of the text, read or written.
        values: Bytes of activations that go in or out.
        copied: Bytes that the block graph moves beyond that: the cache is joined with the new rows,
            and gathered.
    """

    flops: int = 0
    attention: int = 0
    weights: int = 0
    keys: int = 0
    values: int = 0
    copied: int = 0

    @property
    def bytes(self) -> int:
        """What has to be moved whatever the graph is."""
        return self.weights + self.keys + self.values

    def __add__(self, other: "Call") -> "Call":
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Call(*(mine + theirs for mine, theirs in pairs))

    def times(self, count: int) -> "Call":
        """Return what so many of these calls cost."""
        return Call(*(count * part for part in astuple(self)))


@dataclass(frozen=True)
class EngineCosts:
    """What calls of a model's engines cost.

    Attributes:
        flops: Of the model.
        slots: Of the key cache: tokens whose keys a branch keeps.
        weight_bytes: Of a weight.
        value_bytes: Of an activation, a key or a value.
    """

    flops: ModelFlops
    slots: int
    weight_bytes: int
    value_bytes: int

    def held_weights(self, layers: int) -> int:
        """Count the bytes of all matrices that are in memory with so many layers of the blocks."""
        # The keys of a prompt are made layer by layer, each with weights that are gone when the
        # next is there. Those of the timesteps stay on the host.
        f = self.flops
        ends = (f.patch_in + f.patch_out) * f.dim + f.text_weights
        return (layers * f.block_weights + f.context_weights + ends) * self.weight_bytes

    def embed(self, tokens: int) -> Call:
        """Patches to tokens."""
        f = self.flops
        weights = f.patch_in * f.dim * self.weight_bytes
        values = tokens * (4 * f.patch_in + f.dim * self.value_bytes)
        return Call(f.embed(tokens), weights=weights, values=values)

    def block(self, tokens: int, keys: int, text: int) -> Call:
        """One block for some tokens that see `keys` keys, their own included, and T text ones."""
        f, row = self.flops, self.flops.key_width * self.value_bytes
        joined, gathered = 2 * (self.slots + tokens) * row, 2 * keys * row
        attention = 4 * tokens * f.query_width * (keys + text)
        return Call(
            f.blocks(tokens, keys, text) // f.layers - attention,
            attention,
            f.block_weights * self.weight_bytes,
            keys=2 * (keys + text) * row,
            values=2 * tokens * (f.dim * self.value_bytes + row),
            copied=2 * self.slots * row + joined + 2 * gathered,
        )

    def combine(self, tokens: int, computed: int) -> Call:
        """Block output from input and residual, and the residual's new rows."""
        row = self.flops.dim * self.value_bytes
        return Call(values=(3 * tokens + 2 * computed) * row)

    def head(self, tokens: int) -> Call:
        """Tokens to patches of velocity."""
        f = self.flops
        weights = f.patch_out * f.dim * self.weight_bytes
        values = tokens * (4 * f.patch_out + f.dim * self.value_bytes)
        return Call(f.head(tokens), weights=weights, values=values)

    def ends(self, chunk_tokens: int, tokens: int, partial_head: bool) -> list[Call]:
        """What comes behind the blocks of a pass: the head, behind renewed residuals if kept."""
        if partial_head:
            return [self.head(tokens)] if tokens else []
        return [self.combine(chunk_tokens, tokens), self.head(chunk_tokens)]

    def context(self, text: int) -> Call:
        """Projection of a prompt of T tokens, and its keys in one layer after the other."""
        f = self.flops
        matrices = f.text_weights + f.layers * f.context_weights
        return Call(
            f.text_projection(text) + f.text_keys(text),
            weights=matrices * self.weight_bytes,
            keys=2 * f.layers * text * f.key_width * self.value_bytes,
            values=text * (4 * f.text_dim + f.dim * self.value_bytes),
        )


@dataclass(frozen=True)
class Schedule:
    """Which passes a run makes.

    Attributes:
        mode: A `Mode` per row, branch and chunk of the largest window.
        tokens: That go through the blocks, padding included; like mode.
        chunk_tokens: L.
        sight: What the passes see, and the texts.
        slots: Chunks whose keys each branch keeps.
        first_chunk_row: Row after which the first chunk of the video is clean.
    """

    mode: NDArray[np.int8]
    tokens: NDArray[np.int32]
    chunk_tokens: int
    sight: Sight
    slots: tuple[int, ...]
    first_chunk_row: int

    @classmethod
    def of_trace(cls, trace: DecisionTrace, slots: Sequence[int]) -> "Schedule":
        """Take the passes of a recorded run.

        Args:
            trace: Of the run.
            slots: Chunks whose keys each of its branches keeps.

        Returns:
            The schedule.
        """
        return cls(
            trace.mode,
            trace.bucket,
            trace.recompute.shape[-1],
            Sight.of_run(trace.run, trace.mode),
            tuple(slots),
            _first_chunk_row(find_steps(trace), trace.window_start),
        )

    def resize(self, chunk_tokens: int) -> "Schedule":
        """Return the same decisions for chunks of another size: the shares of tokens stay."""
        scaled = self.tokens.astype(np.int64) * chunk_tokens
        tokens = -(-scaled // self.chunk_tokens).astype(np.int32)  # rounded up, exactly
        return replace(self, tokens=tokens, chunk_tokens=chunk_tokens)

    @classmethod
    def of_plan(
        cls,
        plan: RunPlan,
        mode: NDArray[np.int8],
        run: Mapping[str, Any],
        slots: Sequence[int],
        computed: float = 1.0,
    ) -> "Schedule":
        """Lay out the passes of a run that computes a share of the tokens in every step.

        Args:
            plan: Of the run.
            mode: Of every pass if nothing is skipped, as `Family.passes` gives it.
            run: What the passes see, as `Family.describe` gives it.
            slots: Chunks whose keys each branch keeps.
            computed: Share of a chunk's tokens that its steps compute; 1 is the policy `none`.

        Returns:
            The schedule; clean passes are whole.
        """
        shape = plan.shape
        tokens = round(computed * shape.tokens)
        kind = Mode.FULL if tokens == shape.tokens else Mode.PARTIAL if tokens else Mode.REUSE
        counts = np.where(mode == Mode.FULL, tokens, shape.tokens * (mode == Mode.CLEAN))
        return cls(
            np.where(mode == Mode.FULL, kind, mode).astype(np.int8),
            counts.astype(np.int32),
            shape.tokens,
            Sight.of_run(run, mode),
            tuple(slots),
            _first_chunk_row(shape.active, shape.window_start),
        )


def find_steps(trace: DecisionTrace) -> NDArray[np.bool_]:
    """Return where chunks took a step, in any branch; shape (rows, chunks)."""
    steps: NDArray[np.bool_] = np.any(trace.recompute[..., 0] >= 0, axis=1)
    return steps


def _first_chunk_row(active: NDArray[np.bool_], window_start: Sequence[int]) -> int:
    """Last row in which the first chunk of the first window that takes steps takes one."""
    rows = active[: window_start[1]] if len(window_start) > 1 else active
    return int(np.flatnonzero(rows[:, rows.any(axis=0).argmax()])[-1])


@dataclass(frozen=True)
class Limits:
    """What a device does at most, and what share of it a program gets.

    Attributes:
        flops: Operations per second in the dtype of the weights.
        attention: Operations per second in the dtype of the activations.
        bandwidth: Bytes per second.
        flops_efficiency: Share of both rates that the estimate counts on.
        bandwidth_efficiency: Share of `bandwidth` that the estimate counts on.
    """

    flops: float
    attention: float
    bandwidth: float
    flops_efficiency: float
    bandwidth_efficiency: float

    def bound(self, call: Call) -> float:
        """Seconds that a call takes at least, whatever the graph is."""
        return max(self._compute(call), call.bytes / self.bandwidth)

    def estimate(self, call: Call) -> float:
        """Seconds that a call of our graphs takes if the efficiencies are right."""
        moved = (call.bytes + call.copied) / self.bandwidth
        return max(self._compute(call) / self.flops_efficiency, moved / self.bandwidth_efficiency)

    def _compute(self, call: Call) -> float:
        return call.flops / self.flops + call.attention / self.attention


@dataclass(frozen=True)
class RunTime:
    """The time of a run.

    Attributes:
        prompt: Seconds for the keys of the prompts, once: bound and estimate, shape (2,).
        rows: Seconds of each row of the schedule: bound and estimate, shape (rows, 2).
        first_chunk_row: Row after which the first chunk is clean.
        total: What the whole run costs.
    """

    prompt: NDArray[np.float64]
    rows: NDArray[np.float64]
    first_chunk_row: int
    total: Call

    @cached_property
    def seconds(self) -> NDArray[np.float64]:
        """Of the whole run: bound and estimate."""
        seconds: NDArray[np.float64] = self.prompt + self.rows.sum(axis=0)
        return seconds

    @cached_property
    def first_chunk(self) -> NDArray[np.float64]:
        """Until the first chunk is clean: bound and estimate."""
        seconds: NDArray[np.float64] = self.prompt + self.rows[: self.first_chunk_row + 1].sum(
            axis=0
        )
        return seconds


def predict_run(costs: EngineCosts, schedule: Schedule, limits: Limits) -> RunTime:
    """Walk a schedule row by row, engine by engine.

    Args:
        costs: Of the model's engines; how many keys a branch keeps is the schedule's to say.
        schedule: Of the run.
        limits: Of the device.

    Returns:
        Times and costs.
    """
    chunk_tokens, layers = schedule.chunk_tokens, costs.flops.layers
    of_branch = [replace(costs, slots=chunks * chunk_tokens) for chunks in schedule.slots]
    sight = schedule.sight

    def time(call: Call, count: int = 1) -> tuple[NDArray[np.float64], Call]:
        return count * np.array([limits.bound(call), limits.estimate(call)]), call.times(count)

    @cache
    def cost_pass(branch: int, clean: bool, tokens: int, seen: int, text: int) -> _Timed:
        """What one pass of a branch costs."""
        engines, parts = of_branch[branch], []
        if tokens:
            parts.append(time(engines.block(tokens, seen * chunk_tokens, text), layers))
        if not clean:
            parts += map(time, engines.ends(chunk_tokens, tokens, sight.partial_head))
        return _add(parts)

    def cost_row(row: int) -> _Timed:
        busy = np.argwhere(schedule.mode[row] != Mode.IDLE).tolist()
        clean = schedule.mode[row] == Mode.CLEAN
        seen = schedule.tokens[row], sight.visible[row], sight.text[row]
        passes = [
            cost_pass(
                branch, bool(clean[branch, chunk]), *(int(each[branch, chunk]) for each in seen)
            )
            for branch, chunk in busy
        ]
        embedded = time(costs.embed(chunk_tokens), len({chunk for _, chunk in busy}))
        return _add([embedded, *passes])

    prompt = _add([time(costs.context(text)) for text in sight.encoded])
    rows = [cost_row(row) for row in range(len(schedule.mode))]
    return RunTime(
        prompt[0],
        np.array([seconds for seconds, _ in rows]),
        schedule.first_chunk_row,
        sum((call for _, call in rows), prompt[1]),
    )


_Timed = tuple[NDArray[np.float64], Call]


def _add(parts: Sequence[_Timed]) -> _Timed:
    return sum((seconds for seconds, _ in parts), np.zeros(2)), sum(
        (call for _, call in parts), Call()
    )
