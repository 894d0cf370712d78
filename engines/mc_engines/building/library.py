"""TensorRT and TensorRT-RTX behind one face: what differs between them and their versions.

This is the one place that knows it. What a library can do is found by the presence of a name, never
by a version number. Supported: `tensorrt` 10.13 to 11.4, `tensorrt_rtx` 1.7. Neighbours: `network`
parses with it, `compile` builds.

Differences, and where they are documented:

    strongly typed     a flag of create_network in 10.x; 11 and RTX are always so, and RTX 1.7 still
                       has the flag (NVIDIA/TensorRT release notes 11.0)
    targets            ComputeCapability and set_compute_capability: RTX alone; TensorRT builds for
                       the GPU that is there (TensorRT-RTX documentation, "Specifying GPU targets")
    timing cache       does nothing in RTX, whose engines are finished on the user's GPU: not used
                       (TensorRT-RTX documentation, "Porting from TensorRT")
    attention          add_attention: TensorRT 10.14 and later, RTX 1.2 and later (release notes)
    recording          REQUIRE_USER_ALLOCATION and is_stream_capturable: RTX alone, where work can
                       be recorded as a CUDA graph if the engine allocates nothing as it runs (RTX
                       release notes 1.2); TensorRT records what has run once in the same shapes
                       (TensorRT documentation, "CUDA graphs")
    runtime cache      create_runtime_cache: RTX alone; what it compiled on the user's GPU
    kernels            dynamic_shapes_kernel_specialization_strategy: RTX alone. EAGER compiles for
                       a shape when it is first seen; LAZY, the default, runs general kernels at
                       first, which a recorded graph would keep for good
"""

__all__ = ["BACKENDS", "Backend", "Library", "open_library"]

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mc_engines.errors import EngineError, require

Backend = Literal["tensorrt-rtx", "tensorrt"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
_MODULES: dict[Backend, tuple[str, str]] = {
    "tensorrt-rtx": ("tensorrt_rtx", "rtx"),
    "tensorrt": ("tensorrt", "trt"),
}
_BUILDER_FLAGS = ("REQUIRE_USER_ALLOCATION",)
_NO_TARGETS = ("NONE", "CURRENT")  # members of ComputeCapability that name no generation


@dataclass(frozen=True)
class RuntimeConfig:
    """How contexts of an engine are opened.

    Attributes:
        raw: Of the library.
        cache: What it compiles for this GPU; the binding of 1.7.1 keeps no reference to it.
    """

    raw: Any
    cache: Any


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT-RTX, imported, and what this version of it can do.

    Attributes:
        backend: Which of both.
        module: The binding.
    """

    backend: Backend
    module: Any

    @property
    def version(self) -> str:
        """Of the library; engines run on this one alone."""
        return str(self.module.__version__)

    @property
    def targets(self) -> tuple[int, ...]:
        """Compute capabilities to build for, as 86 for 8.6; empty: the GPU that is there."""
        capability = getattr(self.module, "ComputeCapability", None)
        names = [] if capability is None else capability.__members__
        return tuple(int(name.removeprefix("SM")) for name in names if name not in _NO_TARGETS)

    @property
    def can_check_attention(self) -> bool:
        """Whether a network can ask for attention by a kernel of its own, or fail."""
        return hasattr(self.module.INetworkDefinition, "add_attention")

    def create_network(self, builder: Any) -> Any:
        """Create an empty network whose types are those of its graph."""
        flags = self.module.NetworkDefinitionCreationFlag
        typed = getattr(flags, "STRONGLY_TYPED", None)
        return builder.create_network(0 if typed is None else 1 << int(typed))

    def set_targets(self, config: Any, targets: tuple[int, ...]) -> None:
        """Let a builder's configuration build for some of `targets`; else for the GPU here."""
        if not self.targets:
            return
        config.num_compute_capabilities = len(targets)
        for place, target in enumerate(targets):
            config.set_compute_capability(
                getattr(self.module.ComputeCapability, f"SM{target}"), place
            )

    @property
    def builder_flags(self) -> tuple[str, ...]:
        """Flags of every build: engines allocate nothing as they run, where that can be asked."""
        return tuple(name for name in _BUILDER_FLAGS if hasattr(self.module.BuilderFlag, name))

    def set_flags(self, config: Any) -> None:
        """Set `builder_flags` in a builder's configuration."""
        for name in self.builder_flags:
            config.set_flag(getattr(self.module.BuilderFlag, name))

    def set_workspace(self, config: Any, size: int) -> None:
        """Limit the scratch memory of a build and of its engine, in bytes."""
        config.set_memory_pool_limit(self.module.MemoryPoolType.WORKSPACE, size)

    def load_engine(self, plan: bytes, log: Any) -> tuple[Any, Any]:
        """Return a runtime, which must outlive the engine, and the engine; None where it fails."""
        runtime = self.module.Runtime(log)
        return runtime, runtime.deserialize_cuda_engine(plan)

    def create_runtime_config(self, engine: Any, cache: bytes | None) -> RuntimeConfig | None:
        """Return how contexts of an engine are opened; None for a library that has no such thing.

        Args:
            engine: Of `load_engine`.
            cache: Of `read_runtime_cache`, from an earlier run; what does not fit is ignored.
        """
        strategies = getattr(self.module, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            return None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        compiled = config.create_runtime_cache()
        if cache:
            compiled.deserialize(cache)
        config.set_runtime_cache(compiled)
        return RuntimeConfig(config, compiled)

    def open_context(self, engine: Any, config: RuntimeConfig | None) -> Any:
        """Return a context without memory of its own; None where it fails."""
        if config is not None:
            return engine.create_execution_context(config.raw)
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        return engine.create_execution_context(strategy)

    def can_be_captured(self, context: Any, stream: int) -> bool:
        """Whether a context's work can be recorded, after it has run once in the same shapes."""
        ask = getattr(context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(stream))

    def read_runtime_cache(self, config: RuntimeConfig | None) -> bytes | None:
        """Return what was compiled for this GPU so far.

        Args:
            config: Of `create_runtime_config`.

        Returns:
            The bytes; None where the library keeps nothing, or cannot give it.
        """
        data = None if config is None else config.cache.serialize()
        return None if data is None else bytes(data)

    def load_timing_cache(self, config: Any, path: Path) -> None:
        """Let a build reuse the times of earlier ones; without the file it starts with none.

        Args:
            config: Of the builder.
            path: Of the times, which hold for this library and GPU.

        Raises:
            EngineError: The file has none, or of another library or GPU.
            OSError: It cannot be read.
        """
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, False):
            raise EngineError(
                f"{path}: expected a timing cache of {self.backend} {self.version} on this GPU, "
                "got another. Name another file."
            )

    def save_timing_cache(self, config: Any, path: Path) -> None:
        """Write the times of a build and of those before it.

        Raises:
            OSError: The file cannot be written.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
        temporary.replace(path)


def open_library(backend: Backend) -> Library:
    """Import the binding of a backend, which must be installed.

    Args:
        backend: `tensorrt-rtx` or `tensorrt`.

    Returns:
        The library.

    Raises:
        MissingExtraError: It is not installed; the message names the pip command.
    """
    return Library(backend, require(*_MODULES[backend]))
