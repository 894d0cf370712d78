"""Passes on a GPU: everything between the latents and the velocity stays there.

Neighbours: `HostPasses` computes the same in ONNX Runtime; `open_device` in mc_engines loads the
engines. A pass uploads indices and one row of modulation, puts its work on the stream, and waits
once, in `read`. The blocks of a pass are recorded as a CUDA graph when they are met for the second
time in the same shapes, and replayed from then on.

Axes: L tokens of a chunk, K recomputed tokens (padded up to a bucket), S cache slots, M visible
slots, T text tokens, C channels, H heads, D head size.
"""

__all__ = ["ON_DEVICE", "DevicePasses", "list_required", "open_device_passes"]

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from mc_engines.building.bounds import Bounds
from mc_engines.bundle import Bundle
from mc_engines.device.arrays import DeviceArray, allocate_array
from mc_engines.device.device import Device
from mc_engines.device.runner import DeviceRunner
from mc_engines.device.weights import LayerWeights
from mc_engines.run_sizes import Kept, WindowShape, plan_run_sizes
from mc_engines.runner import Array, Runner
from mc_engines.timed_runner import Clock
from mc_runtime.device_branch import Contexts, DeviceBranch, PassKind
from mc_runtime.device_room import MEMORY_REMEDY, Room, open_room
from mc_runtime.passes import WINDOW, Reading, View
from mc_runtime.rope import Tables
from mc_runtime.transformer import (
    Conditions,
    TransformerConfig,
    encode_timesteps,
    map_visible,
    pad_rows,
    round_up_to_bucket,
)

ON_DEVICE = "text_projection", "context", "embed", "block", "combine", "head", "motion"
_PADDING = -1  # slot of a copy that is not to be kept


@dataclass(frozen=True)
class DevicePasses:
    """Passes in engines on a GPU.

    Attributes:
        config: Sizes.
        device: The GPU with the engines.
        timestep: Runs once per run, on the host.
        weights: Of the blocks.
        clock: What the time in passes is added to.
        rooms: By L.
        branches: Those of all windows, until they are forgotten.
    """

    config: TransformerConfig
    device: Device
    timestep: Runner
    weights: LayerWeights
    clock: Clock = field(default_factory=Clock)
    rooms: dict[int, Room] = field(default_factory=dict)
    branches: WeakSet[DeviceBranch] = field(default_factory=WeakSet)

    @property
    def streams_weights(self) -> bool:
        """Whether the blocks' weights are brought layer by layer in every pass: they do not fit."""
        return not self.weights.stay

    def timed(self, clock: Clock) -> "DevicePasses":
        """Return the same transformer with activations and a clock of its own, for one window."""
        return replace(self, clock=clock, rooms={})

    @contextmanager
    def _use(self) -> Generator[None]:
        """Hold the GPU, and count the time."""
        with self.device.lock:
            start = time.perf_counter()
            self.device.gpu.use()
            try:
                yield
            finally:
                self.clock.seconds += time.perf_counter() - start

    def bucket(self, recomputed: int, tokens: int) -> int:
        """Return how many tokens go through the blocks; see `round_up_to_bucket`."""
        return round_up_to_bucket(self.config.token_buckets, recomputed, tokens)

    def encode_timesteps(self, timesteps: NDArray[np.int64], fps: int) -> Conditions:
        """Compute the modulation of every timestep, on the host."""
        return encode_timesteps(self.timestep, self.config, timesteps, fps)

    def encode_context(self, embedding: NDArray[np.float32]) -> list[dict[str, DeviceArray]]:
        """Compute the keys and values of a prompt; they stay on the GPU."""
        text = DeviceRunner(self.device, "text_projection").run({"embedding": embedding})
        context = DeviceRunner(self.device, "context", frozenset({"cross_k", "cross_v"}))
        layers = range(self.config.layers)
        return [context.run(text, self.device.load_weights("context", layer)) for layer in layers]

    def open_branch(
        self, context: Contexts, angles: Sequence[Tables], capacity: int | None = None
    ) -> DeviceBranch:
        """Open a branch; see `Passes.open_branch`."""
        with self._use():
            self.device.unbind()
            room = len(angles) if capacity is None else capacity
            slots = room * len(angles[0][0])
            shape = 1, self.config.key_heads, slots, self.config.head_dim
            used = {branch.keys[0].shape for branch in self.branches} | {shape}
            self.device.close_contexts("block", lambda shapes: shapes.get("k_cache") not in used)
            dtype = self.device.engines["block"].spec("k_cache").numpy_dtype
            keys, values = (
                [self._allocate(shape, dtype, f"the {kind}") for _ in range(self.config.layers)]
                for kind in ("keys", "values")
            )
            for array in (*keys, *values):
                self.device.stream.fill_zero(array.address, array.nbytes)
            placed = [(self._place(cos), self._place(sin)) for cos, sin in angles]
            branch = DeviceBranch(context, placed, keys, values, room)
            self.branches.add(branch)
            return branch

    def embed(self, patches: NDArray[np.float32]) -> DeviceArray:
        """Embed a chunk's patches; see `Passes.embed`."""
        with self._use():
            room = self._room(patches.shape[1])
            given = self.device.transfers.upload(patches, room["patches"])
            self.device.enqueue("embed", {"patches": given}, {"x": room["x"]})
            return room["x"]

    def evaluate(
        self,
        branch: DeviceBranch,
        chunk: int,
        x: DeviceArray,
        rows: NDArray[np.intp],
        modulation: Array,
    ) -> DeviceArray:
        """Compute the block output of a chunk; see `Passes.evaluate`."""
        with self._use():
            room, tokens = self._room(x.shape[1]), x.shape[1]
            row_map = np.arange(tokens, dtype=np.int32)
            row_map[rows] = tokens + np.arange(len(rows), dtype=np.int32)
            if len(rows):
                y = self._recompute(branch, chunk, x, rows, modulation, WINDOW)
            else:  # the graph wants as many rows as the smallest bucket has, and uses them nowhere
                size = self.bucket(1, tokens)
                y = room["y0"].reshape(1, size, self.config.dim)
                self.device.transfers.upload(np.zeros(size, np.int32), room["rows"])
            if chunk not in branch.residuals:
                dtype = self.device.engines["combine"].spec("residual").numpy_dtype
                branch.residuals[chunk] = self._allocate(x.shape, dtype, "a residual")
            inputs = {
                "x": x,
                "residual": branch.residuals[chunk],
                "y": y,
                "rows": room["rows"].reshape(y.shape[1]),
                "row_map": self.device.transfers.upload(row_map, room["row_map"]),
            }
            outputs = {"out": room["out"], "new_residual": room["spare"]}
            self.device.enqueue("combine", inputs, outputs)
            room.arrays["spare"] = branch.residuals[chunk]
            branch.residuals[chunk] = outputs["new_residual"]
            return outputs["out"]

    def recompute(
        self,
        branch: DeviceBranch,
        chunk: int,
        x: DeviceArray,
        rows: NDArray[np.intp],
        modulation: Array,
        view: View = WINDOW,
    ) -> DeviceArray:
        """Run the blocks for some tokens; see `Passes.recompute`.

        Returns:
            Block output, with copies of the last row up to the bucket.
        """
        with self._use():
            return self._recompute(branch, chunk, x, rows, modulation, view)

    def copy_keys(self, source: DeviceBranch, target: DeviceBranch, chunk: int) -> None:
        """Give a branch the keys that another one has; see `Passes.copy_keys`."""
        with self._use():
            tokens, upload = source.angles[chunk][0].shape[0], self.device.transfers.upload
            room = self._room(tokens)
            taken = upload(source.slots(chunk).astype(np.int32), room["rows"])
            given = upload(target.slots(chunk).astype(np.int32), room["slots"])
            theirs, ours = (*source.keys, *source.values), (*target.keys, *target.values)
            move = partial(self.device.mover.move, self.device.stream, count=tokens)
            for array, place in zip(theirs, ours, strict=True):
                move(array, place, sources=taken, targets=given)

    def _recompute(
        self,
        branch: DeviceBranch,
        chunk: int,
        x: DeviceArray,
        rows: NDArray[np.intp],
        modulation: Array,
        view: View,
    ) -> DeviceArray:
        """Run all blocks for some tokens; a pass that was met before is replayed.

        Returns:
            Output of the last block, shape (1, K, C), with copies of the last row up to the bucket.
        """
        room, tokens, count = self._room(x.shape[1]), x.shape[1], len(rows)
        padded = pad_rows(rows, self.bucket(count, tokens))
        slots = np.full(len(padded), _PADDING, np.int32)
        slots[:count] = renewed = branch.slots(chunk)[rows]
        seen = branch.slots(*(range(chunk + 1) if view.chunks is None else view.chunks))
        visible = map_visible(branch.keys[0].shape[2], renewed, seen)
        context = branch.context if view.context is None else view.context
        kind = branch.kind_of(chunk, len(padded), len(visible), context)
        upload = self.device.transfers.upload
        upload(padded.astype(np.int32), room["rows"])
        upload(slots, room["slots"])
        upload(modulation, room["modulation"])
        place = kind.chunk, kind.visible
        if place not in branch.kv_maps:
            branch.kv_maps[place] = self._allocate(visible.shape, visible.dtype, "a key map")
        upload(visible, branch.kv_maps[place])
        self._run_blocks(branch, kind, x)
        return room[f"y{self.config.layers % 2}"].reshape(1, len(padded), self.config.dim)

    def _run_blocks(self, branch: DeviceBranch, kind: PassKind, x: DeviceArray) -> None:
        """Enqueue the blocks; record them the second time, replay them from then on."""
        stream = self.device.stream
        graph = branch.graphs.get(kind)
        if graph is None and kind in branch.graphs:
            work = partial(self._enqueue_blocks, branch, kind, x)
            graph = stream.capture(work)
            branch.graphs[kind] = graph
        if graph is not None:
            stream.replay(graph)
        elif self._enqueue_blocks(branch, kind, x):
            branch.graphs[kind] = None

    def _enqueue_blocks(self, branch: DeviceBranch, kind: PassKind, x: DeviceArray) -> bool:
        """Put the blocks on the stream; return whether that can be recorded."""
        device, room, config = self.device, self._room(x.shape[1]), self.config
        size = kind.size
        rows, slots = room["rows"].reshape(size), room["slots"].reshape(size)
        move = partial(device.mover.move, device.stream, count=size)
        sides = dict(zip(("cos", "sin"), branch.angles[kind.chunk], strict=True))
        tables = {name: room[name].reshape(size, room[name].shape[1]) for name in sides}
        for name, table in sides.items():
            move(table, tables[name], sources=rows)
        ys = [room[name].reshape(1, size, config.dim) for name in ("y0", "y1")]
        move(x, ys[0], sources=rows)
        shape = 1, config.key_heads, size, config.head_dim
        new = {name: room[name].reshape(*shape) for name in ("k_new", "v_new")}
        fixed = {
            **tables,
            "frame_ids": room["zeros"].reshape(size),
            "modulation": room["modulation"],
            "kv_map": branch.kv_maps[kind.chunk, kind.visible],
        }
        fixed = {name: array for name, array in fixed.items() if device.takes("block", name)}
        text = branch.contexts[kind.context]
        for layer in range(config.layers):
            keys, values = branch.keys[layer], branch.values[layer]
            inputs = {
                "x": ys[layer % 2],
                **fixed,
                **text[layer],
                "k_cache": keys,
                "v_cache": values,
            }
            weights = self.weights.use(layer)
            if layer == 0:
                context = device.context_for("block", {**inputs, **weights})
            context.bind(inputs, weights, {"y": ys[(layer + 1) % 2], **new})
            context.enqueue(device.stream)
            self.weights.done(layer)
            move(new["k_new"], keys, targets=slots)
            move(new["v_new"], values, targets=slots)
        return self.weights.stay and context.can_be_captured(device.stream)

    def read(
        self,
        out: DeviceArray,
        head_modulation: Array,
        motion_frames: int = 0,
        previous: DeviceArray | None = None,
    ) -> Reading:
        """Compute what the host wants of a pass, and wait for it; see `Passes.read`."""
        with self._use():
            device, tokens = self.device, out.shape[1]
            room = self._room_for(tokens)
            inputs = {"out": out, "frame_ids": room["zeros"].reshape(tokens)}
            if device.takes("head", "head_modulation"):
                place = room["head_modulation"]
                inputs["head_modulation"] = device.transfers.upload(head_modulation, place)
            inputs = {name: array for name, array in inputs.items() if device.takes("head", name)}
            velocity = room["velocity"].reshape(1, tokens, room["velocity"].shape[2])
            device.enqueue("head", inputs, {"patches": velocity})
            if not motion_frames:
                (patches,) = device.transfers.fetch(velocity)
                return Reading(patches.astype(np.float32))
            change, last_frame = self._measure_motion(out, motion_frames, previous)
            patches, motion = device.transfers.fetch(velocity, change)
            if previous is None:
                motion[0] = motion[min(1, motion_frames - 1)]
            return Reading(patches.astype(np.float32), motion, last_frame)

    def _measure_motion(
        self, out: DeviceArray, frames: int, previous: DeviceArray | None
    ) -> tuple[DeviceArray, DeviceArray]:
        """Enqueue the motion of a chunk; return it, and a copy of the last frame."""
        positions, room = out.shape[1] // frames, self._room(out.shape[1])
        before = out.reshape(1, positions, out.shape[2]) if previous is None else previous
        framed = out.reshape(1, frames, positions, out.shape[2])
        change = room["motion"].reshape(frames, positions)
        self.device.enqueue("motion", {"out": framed, "previous": before}, {"change": change})
        return change, room.keep_frame(out.last_rows(positions))

    def to_host(self, values: DeviceArray) -> Array:
        """Return values as float32 of the host."""
        with self._use():
            (array,) = self.device.transfers.fetch(values)
            return array.astype(np.float32)

    def _room(self, tokens: int) -> Room:
        """Return the arrays for chunks of L tokens, allocated when they are first needed."""
        if tokens not in self.rooms:
            self.rooms[tokens] = open_room(self.device, tokens)
        return self.rooms[tokens]

    def _room_for(self, tokens: int) -> Room:
        """Return the arrays for as many tokens as a pass computed: those of the whole chunk."""
        return self._room(min(size for size in self.rooms if size >= tokens))

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any], what: str) -> DeviceArray:
        return allocate_array(self.device.gpu, shape, dtype, f"{what} {shape}", MEMORY_REMEDY)

    def _place(self, array: Array) -> DeviceArray:
        room = self._allocate(array.shape, array.dtype, "a rotary table")
        return self.device.transfers.upload(array, room)


def list_required(bundle: Bundle) -> list[str]:
    """Name the components of a bundle without whose engines no GPU runs it."""
    return [name for name in ON_DEVICE if name in bundle.manifest.components]


def open_device_passes(
    device: Device,
    config: TransformerConfig,
    timestep: Runner,
    symbols: Mapping[str, Bounds],
    kept: Kept | None = None,
) -> DevicePasses:
    """Bring the blocks' weights to a GPU, beside what a run keeps in it.

    Args:
        device: With the engines of `list_required`.
        config: Sizes.
        timestep: Runs the component of that name, on the host.
        symbols: Of `bound_symbols` for the largest window of the run, which may be smaller than the
            one that the engines are built for.
        kept: See `Family.kept`.

    Returns:
        The passes.

    Raises:
        EngineError: Memory is too small.
    """
    shape = WindowShape(
        layers=config.layers,
        heads=config.heads,
        dim=config.dim,
        ffn_dim=0,  # of a pass, whose memory the engines have already
        chunk_tokens=symbols["L"].most,
        window_tokens=symbols["S"].most,
        text_tokens=symbols["T"].most,
        key_dim=config.key_heads * config.head_dim,
        kept=kept,
    )
    itemsize = device.engines["block"].spec("k_cache").numpy_dtype.itemsize
    sizes = plan_run_sizes(shape, value_bytes=itemsize, weights=0, decode=0, fused=True)
    size = sizes.kv + sizes.context + sizes.residual
    return DevicePasses(config, device, timestep, device.open_weights("block", size))
