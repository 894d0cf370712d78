"""A GPU with the engines of a bundle on it, one stream, and what all of them share.

Neighbours: `DeviceRunner` runs one engine for the host; `mc_runtime.device_passes` drives the
transformer's. Everything is put on one stream, so that one scratch block serves all engines.
"""

__all__ = ["Device", "Plan"]

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mc_engines.building.library import Library
from mc_engines.bundle import Bundle
from mc_engines.bundle_files import replace_file
from mc_engines.device.arrays import DeviceArray, Transfers
from mc_engines.device.cuda import Gpu
from mc_engines.device.engine import Context, DeviceEngine
from mc_engines.device.kernels import RowMover
from mc_engines.device.weights import (
    LayerWeights,
    ResidentWeights,
    StreamedWeights,
    count_bytes,
)
from mc_engines.runner import Arrays
from mc_engines.specs import GraphSpec

Shapes = tuple[tuple[int, ...], ...]
_REMEDY = "Build engines for a smaller video, or close what else uses the GPU."


@dataclass(frozen=True)
class Plan:
    """An engine's bytes.

    Attributes:
        graph: The tensors it takes and gives.
        data: The bytes.
        file: Where they lie, for messages.
        cache: File for what the library compiles for this GPU, so that the next run need not; None:
            it is not kept.
    """

    graph: GraphSpec
    data: bytes
    file: str
    cache: Path | None = None


class Device:
    """A GPU with engines on it.

    Args:
        gpu: It.
        library: That made the engines.
        bundle: Has the weights.
        form: Precision of the engines.
        plans: By component.
        kernels: Of `compile_kernels` for this GPU.
        max_vram: Bytes that weights and caches may take together; None: what is free.

    Attributes:
        stream: For all work.
        transfers: Of that stream.
        mover: Of rows.
        lock: Held while the GPU is used.
        engines: By component.

    Raises:
        EngineError: An engine cannot run here, or something does not fit.
        BundleError: A weight is missing.
    """

    def __init__(
        self,
        gpu: Gpu,
        library: Library,
        bundle: Bundle,
        form: str,
        plans: Mapping[str, Plan],
        kernels: bytes,
        max_vram: int | None = None,
    ) -> None:
        gpu.use()
        self.gpu, self._bundle, self._form = gpu, bundle, form
        self.stream = gpu.open_stream()
        self.transfers = Transfers(self.stream)
        self.mover = RowMover(gpu, kernels)
        self.lock = threading.RLock()
        self.engines = {
            name: DeviceEngine(library, plan.graph, plan.data, plan.file, _read_cache(plan.cache))
            for name, plan in plans.items()
        }
        self._caches = {name: plan.cache for name, plan in plans.items() if plan.cache}
        size = max((engine.scratch for engine in self.engines.values()), default=0)
        self._scratch = gpu.allocate(max(1, size), "what engines need while they run", _REMEDY)
        self._contexts: dict[tuple[str, int, Shapes], Context] = {}
        self._max_vram = max_vram

    def takes(self, component: str, tensor: str) -> bool:
        """Say whether there is an engine of a component that takes or gives a tensor."""
        engine = self.engines.get(component)
        if engine is None:
            return False
        return tensor in {spec.name for spec in (*engine.graph.inputs, *engine.graph.outputs)}

    def context_for(self, component: str, arrays: Mapping[str, DeviceArray]) -> Context:
        """Return the context for the shapes of inputs and weights, opened when they are new.

        A recorded graph is good for as long as its context sees no other shapes, so that each
        combination has a context of its own (TensorRT documentation, "CUDA graphs").

        Args:
            component: Such as `block`.
            arrays: Inputs and weights by name.

        Returns:
            The context; what it works on may be bound anew for every run.

        Raises:
            EngineError: No profile takes these shapes, or the context cannot be opened.
        """
        engine = self.engines[component]
        profile = engine.choose_profile(arrays)
        key = component, profile, tuple(array.shape for array in arrays.values())
        if key not in self._contexts:
            self._contexts[key] = engine.open_context(profile, self.stream, self._scratch)
        return self._contexts[key]

    def enqueue(
        self,
        component: str,
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray],
        weights: Mapping[str, DeviceArray] | None = None,
    ) -> None:
        """Put one run of an engine on the stream.

        Raises:
            ValueError: A name, dtype or shape is not the one of the spec.
            EngineError: A shape is outside the profiles, or the library refuses.
        """
        context = self.context_for(component, {**inputs, **(weights or {})})
        context.bind(inputs, weights or {}, outputs)
        context.enqueue(self.stream)

    def unbind(self) -> None:
        """Forget the arrays that contexts worked on, so that their memory can be given back."""
        for context in self._contexts.values():
            context.unbind()

    def close_contexts(
        self, component: str, unused: Callable[[Mapping[str, tuple[int, ...]]], bool]
    ) -> None:
        """Close contexts for shapes that nobody uses any more, neither now nor in recorded work.

        Args:
            component: Such as `block`.
            unused: Says so of the shapes of inputs and weights.

        Raises:
            EngineError: Earlier work of the stream failed.
        """
        chosen = [
            key
            for key, context in self._contexts.items()
            if key[0] == component and unused(context.shapes)
        ]
        if chosen:
            self.stream.synchronise()  # they may still be at work
        for key in chosen:
            del self._contexts[key]

    def keep_compiled(self) -> None:
        """Write what the library compiled for this GPU beside the engines, if one may write there.

        The files belong to the machine, so the manifest of a bundle does not name them.
        """
        for name, path in self._caches.items():
            compiled = self.engines[name].read_cache()
            if compiled is not None and compiled != _read_cache(path):
                with suppress(OSError):  # a read-only bundle compiles anew in every process
                    replace_file(path, compiled)

    def count_layers(self, component: str) -> int:
        """Return how many layers a component has."""
        return len(self._bundle.component(component).weight_files)

    def load_weights(self, component: str, layer: int) -> Arrays:
        """Return the weights of a layer as its engine takes them, on the host."""
        return self._bundle.layer_weights(component, layer, self._form)

    def open_weights(self, component: str, cache_bytes: int) -> LayerWeights:
        """Upload the weights of a component's layers, or stream them if memory is too small.

        Args:
            component: Such as `block`.
            cache_bytes: What has to fit beside them.

        Returns:
            The weights, layer by layer.

        Raises:
            EngineError: They do not fit.
        """
        graph = self._bundle.graph(component, self._form)
        layers, load = self.count_layers(component), partial(self.load_weights, component)
        with self.lock:
            self.gpu.use()
            budget = self.gpu.free_bytes()[0] if self._max_vram is None else self._max_vram
            if layers * count_bytes(graph.weights) + cache_bytes > budget:
                return StreamedWeights(self.stream, graph.weights, layers, load, component)
            return ResidentWeights(self.stream, graph.weights, layers, load, component)


def _read_cache(path: Path | None) -> bytes | None:
    return path.read_bytes() if path is not None and path.is_file() else None
