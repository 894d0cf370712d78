"""Build one engine: a graph, the GPUs it is for, the sizes of its tensors.

Neighbours: `parse_graph` comes before, `provide_engine` calls this for a component of a bundle.
"""

__all__ = [
    "Attention",
    "Request",
    "build_plan",
    "count_attention_kernels",
    "has_fused_attention",
    "make_log",
    "make_monitor",
    "name_targets",
]

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mc_engines.building.bounds import Bounds, Shape, bound_tensor
from mc_engines.building.interrupt import Interrupt, hold_interrupt
from mc_engines.building.library import Library
from mc_engines.building.network import join_reasons, parse_graph
from mc_engines.errors import BuildError, EngineError
from mc_engines.specs import GraphSpec, Precision

Advance = Callable[[str, int, int], None]
_TOKENS = 1, 64, 512  # of the network that is only attention
# A kernel that computes attention whole: TensorRT-RTX 1.7.1 keeps the names of kernels as text in a
# plan. Nowhere documented, so it is evidence where it is found, and none where it is not.
_ATTENTION_KERNEL = re.compile(rb"_gemm_mha_v2_0x[0-9a-f]+")


@dataclass(frozen=True)
class Request:
    """What an engine is built for.

    Attributes:
        targets: Compute capabilities, as 86 for 8.6; that of the GPU here, where the library builds
            for no other.
        profiles: Bounds by symbol, one mapping per optimization profile.
        workspace: Bytes of scratch memory; None for the library's own limit.
        timing_cache: File of measured times, read and extended; not part of what an engine is.
    """

    targets: tuple[int, ...]
    profiles: Sequence[Mapping[str, Bounds]]
    workspace: int | None = None
    timing_cache: Path | None = None

    def bound(self, graph: GraphSpec) -> list[dict[str, tuple[Shape, Shape, Shape]]]:
        """Bound the inputs of a graph, once per profile; profiles that do not differ are one."""
        bounds: list[dict[str, tuple[Shape, Shape, Shape]]] = []
        for symbols in self.profiles:
            shapes = {
                spec.name: bound_tensor(spec, symbols) for spec in (*graph.inputs, *graph.weights)
            }
            bounds += [shapes] if shapes not in bounds else []
        return bounds


def build_plan(
    library: Library,
    graph: GraphSpec,
    path: Path,
    request: Request,
    advance: Advance = lambda phase, step, steps: None,
) -> bytes:
    """Build the engine of a graph.

    Args:
        library: To build with.
        graph: Its specs.
        path: Its ONNX file.
        request: Targets, sizes and limits.
        advance: Called with a phase's name, its steps that are done, and all of them. An exception
            that it raises cancels the build and is raised again.

    Returns:
        The serialized engine.

    Raises:
        EngineError: The graph is refused.
        BuildError: It cannot be built for these targets; the message says why.
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    with hold_interrupt() as interrupt:
        monitor = make_monitor(library, advance, interrupt)
        plan = _build_plan(library, graph, path, request, monitor)
    return plan


def _build_plan(
    library: Library, graph: GraphSpec, path: Path, request: Request, monitor: Any
) -> bytes:
    """Parse and build; the monitor may end it."""
    log = make_log(library)
    parsed = parse_graph(library, log, graph, path)
    config = parsed.builder.create_builder_config()
    library.set_targets(config, request.targets)
    library.set_flags(config)
    if request.workspace is not None:
        library.set_workspace(config, request.workspace)
    if request.timing_cache is not None:
        library.load_timing_cache(config, request.timing_cache)
    for shapes in request.bound(graph):
        _add_profile(parsed.builder, config, graph, shapes)
    config.progress_monitor = monitor
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if monitor.stopped_by is not None:
        raise monitor.stopped_by
    if plan is None:
        remedy = "Leave out the target or the dtype that it names."
        if request.workspace is not None:
            remedy = f"Raise --workspace if memory is what it lacks. {remedy}"
        raise BuildError(
            f"{path.name}: expected an engine for {name_targets(request.targets)}, got: "
            f"{join_reasons(log.errors)}. {remedy}"
        )
    if request.timing_cache is not None:
        library.save_timing_cache(config, request.timing_cache)
    return bytes(plan)


def name_targets(targets: Sequence[int]) -> str:
    """Name targets in words, as in a message."""
    return ", ".join(f"SM{target}" for target in targets) or "the GPU here"


def _add_profile(
    builder: Any, config: Any, graph: GraphSpec, shapes: Mapping[str, Sequence[Shape]]
) -> None:
    profile = builder.create_optimization_profile()
    for name, bounds in shapes.items():
        profile.set_shape(name, *bounds)
    if config.add_optimization_profile(profile) < 0:  # says nothing else where a bound is wrong
        raise EngineError(
            f"{graph.file}: expected bounds from smallest to largest, got {dict(shapes)}. "
            "Give other sizes."
        )


@dataclass(frozen=True)
class Attention:
    """What decides whether attention is one kernel.

    Attributes:
        heads: H; a single head is never one kernel (TensorRT-RTX 1.7.1).
        head_dim: D.
        mask: Whether a bias is added to the scores.
    """

    heads: int
    head_dim: int
    mask: bool = False


def has_fused_attention(
    library: Library, attention: Attention, precision: Precision, targets: tuple[int, ...]
) -> bool:
    """Say whether attention is one kernel on all targets: a network of nothing else, built or not.

    Args:
        library: To build with; `library.can_check_attention` must hold.
        attention: Its heads.
        precision: Of queries, keys and values.
        targets: Compute capabilities.

    Returns:
        Whether the build succeeds where attention may not be taken apart.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    module, log = library.module, make_log(library)
    builder = module.Builder(log)
    network = library.create_network(builder)
    dtype = {"fp32": module.float32, "fp16": module.float16, "bf16": module.bfloat16}[precision]
    shape = (1, attention.heads, -1, attention.head_dim)
    inputs = {name: network.add_input(name, dtype, shape) for name in "qkv"}
    layer = network.add_attention(*inputs.values(), module.AttentionNormalizationOp.SOFTMAX, False)
    layer.decomposable = False
    if attention.mask:
        inputs["mask"] = network.add_input("mask", dtype, (1, attention.heads, -1, -1))
        layer.mask = inputs["mask"]
    network.mark_output(layer.get_output(0))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    library.set_targets(config, targets)
    for name, tensor in inputs.items():
        profile.set_shape(name, *(_fill(tensor.shape, size) for size in _TOKENS))
    config.add_optimization_profile(profile)
    with hold_interrupt() as interrupt:
        config.progress_monitor = make_monitor(library, lambda *_: None, interrupt)
        plan = builder.build_serialized_network(network, config)
    return plan is not None


def count_attention_kernels(plan: bytes) -> int | None:
    """Count the kernels in an engine that compute attention whole.

    Args:
        plan: Of TensorRT-RTX.

    Returns:
        Their number; None where there are none to be seen, which says nothing.
    """
    return len(set(_ATTENTION_KERNEL.findall(plan))) or None


def _fill(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """A shape with a size for its open axes."""
    return tuple(size if axis < 0 else axis for axis in shape)


def make_log(library: Library) -> Any:
    """Make a logger that keeps the errors, in `errors`."""
    base: Any = library.module.ILogger

    class Log(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= base.Severity.ERROR:
                self.errors.append(message)

    return Log()


def make_monitor(library: Library, advance: Advance, interrupt: Interrupt) -> Any:
    """Make a monitor that passes progress on, and cancels with Ctrl-C or what `advance` raises."""
    base: Any = library.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.stopped_by: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if self.stopped_by is None:
                try:
                    advance(phase, step + 1, self._steps.get(phase, 0))
                except BaseException as error:  # must not cross the library
                    self.stopped_by = error
            return self.stopped_by is None and not interrupt.pressed

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()
