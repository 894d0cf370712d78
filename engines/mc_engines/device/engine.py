"""Engines of TensorRT and TensorRT-RTX, ready to be put on a stream.

Neighbours: `library` makes them of their bytes, `DeviceRunner` runs one with arrays of the host.
An engine is shared by any number of contexts. A context has addresses and shapes, which are set
when they change and not before; its scratch memory is one block for all contexts, as they run one
after the other.
"""

__all__ = ["Context", "DeviceEngine"]

from collections.abc import Mapping
from typing import Any

from mc_engines.building.bounds import Shape, fits
from mc_engines.building.compile import make_log
from mc_engines.building.library import Library
from mc_engines.device.arrays import DeviceArray
from mc_engines.device.cuda import Memory, Stream
from mc_engines.errors import EngineError
from mc_engines.runner import check_inputs
from mc_engines.specs import GraphSpec, TensorSpec

Arrays = Mapping[str, DeviceArray]
Profile = dict[str, tuple[Shape, Shape]]


class DeviceEngine:
    """One engine on the GPU.

    Args:
        library: That made it, in the same version.
        graph: The tensors it takes and gives.
        plan: Its bytes.
        file: Where they lie, for messages.
        cache: What the library compiled for this GPU in an earlier run.

    Attributes:
        graph: The tensors it takes and gives.
        file: Where its bytes lie.
        scratch: Bytes that a context needs while it runs.

    Raises:
        EngineError: The bytes are damaged, of another version or for other GPUs, or the engine has
            other tensors.
    """

    def __init__(
        self,
        library: Library,
        graph: GraphSpec,
        plan: bytes,
        file: str,
        cache: bytes | None = None,
    ) -> None:
        self.graph, self.file, self.library = graph, file, library
        self.log = make_log(library)
        self._runtime, self._engine = library.load_engine(plan, self.log)
        if self._engine is None:
            raise EngineError(
                f"{file}: expected an engine of {library.backend} {library.version} for this GPU, "
                f"got: {self.reason()}. Build it again with mc-build; if memory is what it lacks, "
                "close what else uses the GPU."
            )
        self._check_tensors()
        self._config = library.create_runtime_config(self._engine, cache)
        self.scratch = int(self._engine.device_memory_size_v2)
        self._profiles = [
            self._read_profile(number) for number in range(self._engine.num_optimization_profiles)
        ]

    def _check_tensors(self) -> None:
        engine = self._engine
        found = {engine.get_tensor_name(number) for number in range(engine.num_io_tensors)}
        specs = (*self.graph.inputs, *self.graph.weights, *self.graph.outputs)
        expected = {spec.name for spec in specs}
        if found != expected:
            raise EngineError(
                f"{self.file}: expected the tensors {sorted(expected)}, got {sorted(found)}. "
                "Build it again with mc-build."
            )

    def _read_profile(self, number: int) -> Profile:
        shapes = {}
        for spec in (*self.graph.inputs, *self.graph.weights):
            least, _, most = self._engine.get_tensor_profile_shape(spec.name, number)
            shapes[spec.name] = tuple(least), tuple(most)
        return shapes

    def choose_profile(self, arrays: Arrays) -> int:
        """Return the first profile that the shapes of inputs and weights fit.

        Raises:
            EngineError: There is none; the message names what is too large, or too small.
        """
        misfits = []
        for number, profile in enumerate(self._profiles):
            unfit = (
                name for name, bounds in profile.items() if not fits(arrays[name].shape, *bounds)
            )
            misfit = next(unfit, None)
            if misfit is None:
                return number
            misfits.append(misfit)
        name = misfits[-1]
        least, most = self._profiles[-1][name]
        raise EngineError(
            f"{self.file}: '{name}': expected a shape from {least} to {most}, got "
            f"{arrays[name].shape}. Build it for this size: mc-build with --height, --width and "
            "--max-frames."
        )

    def spec(self, name: str) -> TensorSpec:
        """Return the spec of an input or output."""
        specs = (*self.graph.inputs, *self.graph.outputs)
        return next(spec for spec in specs if spec.name == name)

    def open_context(self, profile: int, stream: Stream, scratch: Memory) -> "Context":
        """Open a context of a profile.

        Args:
            profile: Its number.
            stream: That it will run on.
            scratch: At least `self.scratch` bytes that only contexts of this stream use.

        Returns:
            The context.

        Raises:
            EngineError: It cannot be opened; most often for want of memory.
        """
        raw = self.library.open_context(self._engine, self._config)
        if raw is None or not raw.set_optimization_profile_async(profile, int(stream.handle)):
            raise EngineError(
                f"{self.file}: expected a context of profile {profile}, got: {self.reason()}. "
                "Free memory of the GPU, or pass --max-vram."
            )
        if self.scratch:
            raw.set_device_memory(scratch.address, scratch.size)
        return Context(self, raw, scratch)

    def reason(self) -> str:
        """The last errors in the library's words."""
        return "; ".join(self.log.errors[-2:]) or "no reason"

    def read_cache(self) -> bytes | None:
        """Return what the library compiled for this GPU so far; None where it keeps nothing."""
        return self.library.read_runtime_cache(self._config)


class Context:
    """An engine with the arrays that it works on; it keeps them alive.

    Attributes:
        shapes: Of inputs and weights, as they were set; empty before the first `bind`.
    """

    def __init__(self, engine: DeviceEngine, raw: Any, scratch: Memory) -> None:
        self._engine, self._raw, self._scratch = engine, raw, scratch
        self._bound: dict[str, DeviceArray] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def bind(self, inputs: Arrays, weights: Arrays, outputs: Arrays) -> None:
        """Say what the next `enqueue` reads and writes.

        Args:
            inputs: One array per spec of the graph's inputs.
            weights: One array per spec of the graph's weights.
            outputs: One array per spec of the graph's outputs, of the shapes that follow.

        Raises:
            ValueError: A name, dtype or shape is not the one of the spec.
            EngineError: A shape is outside the profile.
        """
        arrays = {**inputs, **weights}
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self.shapes:
            check_inputs(self._engine.graph, inputs, weights)
            self._set_shapes(arrays)
            self.shapes = shapes
        for spec in self._engine.graph.outputs:
            self._check_output(spec, outputs[spec.name])
        for name, array in {**arrays, **outputs}.items():
            held = self._bound.get(name)
            if held is None or held.address != array.address:
                self._raw.set_tensor_address(name, array.address)
            self._bound[name] = array

    def _set_shapes(self, arrays: Arrays) -> None:
        for name, array in arrays.items():
            if self.shapes.get(name) != array.shape and not self._raw.set_input_shape(
                name, array.shape
            ):
                raise EngineError(
                    f"{self._engine.file}: '{name}': expected a shape within its profile, got "
                    f"{array.shape}: {self._engine.reason()}. Build it for this size."
                )

    def _check_output(self, spec: TensorSpec, array: DeviceArray) -> None:
        shape = tuple(self._raw.get_tensor_shape(spec.name))
        if array.dtype != spec.numpy_dtype or array.shape != shape:
            raise ValueError(
                f"{self._engine.file}: output '{spec.name}': expected {spec.dtype} {shape}, "
                f"got {array.dtype} {array.shape}."
            )

    def enqueue(self, stream: Stream) -> None:
        """Put the engine's work on a stream.

        Raises:
            ValueError: Nothing is bound.
            EngineError: The library refuses; the message has its words.
        """
        if not self._bound:
            raise ValueError(f"{self._engine.file}: expected bound arrays, got none. Call bind.")
        if not self._raw.execute_async_v3(int(stream.handle)):
            raise EngineError(
                f"{self._engine.file}: expected work that can be enqueued, got: "
                f"{self._engine.reason()}. Build it again with mc-build."
            )

    def unbind(self) -> None:
        """Forget the arrays; they have to be bound again before the next `enqueue`.

        The shapes stay set, so that they need not be set while work is recorded.
        """
        self._bound.clear()

    def can_be_captured(self, stream: Stream) -> bool:
        """Whether the work can become part of a graph, as it is bound now."""
        return self._engine.library.can_be_captured(self._raw, int(stream.handle))
