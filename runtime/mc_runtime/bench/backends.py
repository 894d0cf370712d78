"""What `mc-bench run` measures on: a pipeline of the bundle for every `--backend`.

Neighbours: `latency_cli` opens them, `sweep` and `generation` run on them.
"""

__all__ = ["Backend", "open_backend"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mc_engines.bundle import Bundle
from mc_engines.specs import Precision
from mc_runtime.flags import choose_device, choose_provider
from mc_runtime.options import GenerationOptions
from mc_runtime.pipeline import VideoPipeline

_CPU = "cpu"
_BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Backend:
    """A pipeline, and what its times have to be read with.

    Attributes:
        name: As `--backend` takes it.
        pipeline: Of the bundle.
        dtype: Of weights and activations of the transformer.
    """

    name: str
    pipeline: VideoPipeline
    dtype: Precision = "fp32"

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU, whose times a matrix product of the CPU says nothing about."""
        return self.name != _CPU

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return _BYTES[self.dtype]


def open_backend(
    bundle: Bundle,
    name: str,
    values: Mapping[str, Any],
    options: Callable[[VideoPipeline], GenerationOptions],
) -> Backend:
    """Make the pipeline of a backend; engines are loaded when they are first needed.

    Args:
        bundle: An opened bundle.
        name: Of the backend.
        values: Of the flags.
        options: Makes the settings of the flags.

    Returns:
        The backend.

    Raises:
        UsageError: A flag for engines beside a backend that has none.
    """
    flags = {**values, "backend": name, "engines": values["engine_folder"]}
    pipeline = VideoPipeline(bundle, values["threads"], choose_provider(flags))
    device = choose_device(flags, pipeline.limit_video(options(pipeline)))
    if device is None:
        return Backend(name, pipeline)
    pipeline.use_device(device)
    return Backend(name, pipeline, device.form)
