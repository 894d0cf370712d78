"""What a generation on this CPU holds in memory: anonymous memory and mapped files apart.

The system can drop pages of a mapped file at any time and read them again; anonymous memory has to
stay. What a process holds before it generates is measured in one made for it; all else is reckoned
from shapes. Neighbours: `predict` reports it as `memory_plan` does that of a device; `host_sizes`
replays what ONNX Runtime's arenas keep, which is never given back, so that the parts add up.
"""

__all__ = ["SESSION_BYTES", "HostPlan", "measure_process", "plan_host"]

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from mc_engines.errors import EngineError
from mc_engines.host_sizes import hold_blocks, hold_decoder
from mc_engines.onnxruntime_runner import HELD_WEIGHTS_BYTES
from mc_engines.run_sizes import plan_run_sizes
from mc_runtime.bench.devices import Device
from mc_runtime.bench.memory_plan import USABLE
from mc_runtime.bench.predicted_model import Model
from mc_runtime.options import GenerationOptions

_BYTES = 4  # of a float32, in which everything is computed
# A session beyond the weights inside: measured with ONNX Runtime 1.31, where opening the twelve of
# skyreels-mini took 5.8 MB more than those, threads and graphs.
SESSION_BYTES, _SESSIONS = 480_000, 12
_EMBED_ROWS, _HEAD_ROWS, _LOOP_ROWS = 2, 4, 3  # of C channels per token of a chunk
_EMPTY_PROCESS = """
import json
import numpy
import tokenizers
import mc_runtime.pipeline
from mc_engines.onnxruntime_providers import try_provider
try_provider("cpu")
tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).encode("a")
numpy.random.default_rng(0).standard_normal(1)
lines = open("/proc/self/status", encoding="ascii").read().splitlines()
fields = dict(line.split(":", 1) for line in lines)
print(json.dumps([1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")]))
"""


@dataclass(frozen=True)
class HostPlan:
    """Bytes of a run on the CPU, by part.

    Attributes:
        anonymous: Held together once every graph has run.
        encoding: Of a layer of the text encoder, which is there before keys are; None where that
            is not told.
        mapped: Of files.
    """

    anonymous: Mapping[str, int]
    encoding: int | None
    mapped: Mapping[str, int]

    @property
    def decodes(self) -> bool:
        """Whether it has the sizes of a VAE."""
        return self.anonymous["decoder"] > 0

    @property
    def peak(self) -> int:
        """The most anonymous memory."""
        before = ("process", "sessions", "graph_weights", "weights")
        encoding = sum(self.anonymous[part] for part in before) + (self.encoding or 0)
        return max(sum(self.anonymous.values()), encoding)

    @property
    def peak_mapped(self) -> int:
        """The most of mapped files."""
        return sum(self.mapped.values())

    def fits(self, device: Device) -> bool:
        """Whether a machine has as much."""
        return self.peak <= USABLE * device.memory


@cache
def measure_process() -> tuple[int, int]:
    """Measure a process of this interpreter that has imported everything and run an addition.

    Returns:
        Its anonymous bytes, and those of mapped files: interpreter, numpy, ONNX Runtime.

    Raises:
        EngineError: It failed, or this system does not tell.
    """
    command = [sys.executable, "-c", _EMPTY_PROCESS]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        said = (result.stderr.splitlines() or ["nothing"])[-1]
        raise EngineError(
            f"memory: expected /proc to tell what a process holds, got: {said}. "
            "Predict for a device of the table."
        )
    anonymous, mapped = json.loads(result.stdout)
    return anonymous, mapped


def plan_host(model: Model, options: GenerationOptions, prefix: int = 0) -> HostPlan:
    """Plan the memory of a run in ONNX Runtime on the CPU, in float32, with nothing skipped.

    Args:
        model: That runs.
        options: Of the run.
        prefix: Latent frames of a video that is continued.

    Returns:
        The plan.

    Raises:
        ValueError: A setting that cannot be generated.
        EngineError: This system does not tell what a process holds.
    """
    window = model.describe_window(options, model.plan(options, prefix))
    process, libraries = measure_process()
    cast = model.stored_bytes != _BYTES
    block = model.flops.block_weights
    held = _BYTES * block * window.layers
    if held > HELD_WEIGHTS_BYTES:
        held = _BYTES * block
    sizes = plan_run_sizes(window, value_bytes=_BYTES, weights=0, decode=0)
    rows = (_EMBED_ROWS + _HEAD_ROWS + _LOOP_ROWS) * window.chunk_tokens * window.dim * _BYTES
    anonymous = {
        "process": process,
        "sessions": _SESSIONS * SESSION_BYTES,
        "graph_weights": _BYTES * model.graph_weights if cast else 0,
        "weights": held if cast else 0,
        "kv_cache": sizes.kv,
        "prompt_keys": sizes.context,
        "residuals": sizes.residual,
        "activations": sum(hold_blocks(window)) + rows,
        **_plan_decoding(model, options),
    }
    layer = model.stored_bytes * block
    stored = layer if cast else layer * window.layers + _BYTES * model.graph_weights
    encoding = None if model.text_layer is None else _BYTES * model.text_layer
    return HostPlan(anonymous, encoding, {"libraries": libraries, "weights": stored})


def _plan_decoding(model: Model, options: GenerationOptions) -> dict[str, int]:
    """Nothing without a VAE."""
    if model.decoder is None:
        return {"decoder": 0, "frames": 0}
    grid = model.grid
    height, width = (side // grid.spatial_factor for side in (options.height, options.width))
    frames = min(options.causal_block_size * grid.temporal_factor, options.num_frames)
    steps = grid.latent_frames(options.num_frames)
    sizes = hold_decoder(model.decoder, height, width, steps, frames)
    return {"decoder": sizes.arenas, "frames": sizes.frames}
