"""Where ONNX Runtime runs a graph: the CPU, or a GPU by CUDA or by the plug-in of TensorRT-RTX.

ONNX Runtime falls back to the CPU without an error where a provider cannot be loaded; here that is
one. Neighbours: `OnnxRuntimeRunner` makes its sessions with this; `mc-inspect --doctor` tries each.
"""

__all__ = ["PROVIDERS", "Provider", "create_session", "try_provider"]

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from mc_engines.errors import EngineError, McError, require

Provider = Literal["cpu", "cuda", "nv-tensorrt-rtx"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
_NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
# y = x + x, one float32 each: an ONNX file, as onnx is not installed where generation runs.
_ADDITION = (
    b'\x08\x08\x12\x00:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01'
    b"\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
_registered: set[str] = set()  # by name; a library can be registered once per process


def try_provider(provider: Provider) -> tuple[str, ...]:
    """Run an addition on a provider.

    Args:
        provider: To be tried.

    Returns:
        The providers that were active, it first; ONNX Runtime gives it no other behind than the
        CPU.

    Raises:
        McError: One of the following.
        MissingExtraError: ONNX Runtime or the plug-in is not installed.
        EngineError: It is not there, cannot be loaded, or does not compute.
    """
    options = require("onnxruntime", "cpu").SessionOptions()
    options.log_severity_level = 3  # errors only: they are raised as well
    try:
        session = create_session(_ADDITION, options, provider)
        (sum_,) = session.run(None, {"x": np.ones(1, np.float32)})
    except McError:
        raise
    except Exception as error:  # ONNX Runtime's errors have no base of their own
        raise EngineError(
            f"onnxruntime: expected {_NAMES[provider]} to run, got: {error}. Use --backend cpu."
        ) from error
    if sum_.tolist() != [2.0]:
        raise EngineError(
            f"onnxruntime: expected 2 of 1 + 1 on {_NAMES[provider]}, got {sum_.tolist()}. "
            "Use --backend cpu."
        )
    return tuple(session.get_providers())


def create_session(graph: Path | bytes, options: Any, provider: Provider) -> Any:
    """Load a graph on a provider, and on no other.

    Args:
        graph: The ONNX file, or its content.
        options: SessionOptions of ONNX Runtime.
        provider: That runs it; operators that it lacks run on the CPU.

    Returns:
        The session.

    Raises:
        MissingExtraError: ONNX Runtime or the plug-in is not installed.
        EngineError: The provider is not there, or is not the one that became active.
    """
    onnxruntime, name = require("onnxruntime", "cpu"), _NAMES[provider]
    model = graph if isinstance(graph, bytes) else str(graph)
    if provider == "nv-tensorrt-rtx":
        _add_plugin(onnxruntime, options)
        session = onnxruntime.InferenceSession(model, options)
    else:
        if name not in onnxruntime.get_available_providers():
            raise EngineError(
                f"onnxruntime: expected {name}, got {onnxruntime.get_available_providers()}. "
                "Run: pip uninstall onnxruntime; pip install 'motioncache[gpu]'"
            )
        providers = [name] if provider == "cpu" else [name, _NAMES["cpu"]]
        session = onnxruntime.InferenceSession(model, options, providers=providers)
    active = session.get_providers()
    if active[0] != name:
        raise EngineError(
            f"{'onnxruntime' if isinstance(graph, bytes) else graph.name}: expected {name}, got "
            f"{active}: it could not be loaded. Run: "
            "mc-inspect --doctor"
        )
    return session


def _add_plugin(onnxruntime: Any, options: Any) -> None:
    """Register the plug-in and let the session run on its devices."""
    plugin, name = require(_PLUGIN, "plugin"), _NAMES["nv-tensorrt-rtx"]
    if name not in _registered:
        try:
            onnxruntime.register_execution_provider_library(name, str(plugin.get_library_path()))
        except Exception as error:  # ONNX Runtime's errors have no base of their own
            raise EngineError(
                f"onnxruntime: expected the plug-in {_PLUGIN} to load, got: {error}. "
                "It needs an NVIDIA driver: mc-inspect --doctor"
            ) from error
        _registered.add(name)
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]
    if not devices:
        raise EngineError(f"onnxruntime: expected a GPU for {name}, got none. Use --backend cpu.")
    options.add_provider_for_devices(devices, {})
