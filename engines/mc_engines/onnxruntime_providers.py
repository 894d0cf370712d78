"""Where ONNX Runtime runs a graph: the CPU, or a GPU by CUDA or by the plug-in of TensorRT-RTX.

ONNX Runtime falls back to the CPU without an error where a provider cannot be loaded; here that is
one. Neighbours: `OnnxRuntimeRunner` makes its sessions with this.
"""

__all__ = ["PROVIDERS", "Provider", "create_session"]

from pathlib import Path
from typing import Any, Literal, get_args

from mc_engines.errors import EngineError, require

Provider = Literal["cpu", "cuda", "nv-tensorrt-rtx"]
PROVIDERS: tuple[Provider, ...] = get_args(Provider)
_NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_registered: set[str] = set()  # by name; a library can be registered once per process


def create_session(path: Path, options: Any, provider: Provider) -> Any:
    """Load a graph on a provider, and on no other.

    Args:
        path: The ONNX file.
        options: SessionOptions of ONNX Runtime.
        provider: That runs it; operators that it lacks run on the CPU.

    Returns:
        The session.

    Raises:
        MissingExtraError: ONNX Runtime or the plug-in is not installed.
        EngineError: The provider is not there, or is not the one that became active.
    """
    onnxruntime, name = require("onnxruntime", "cpu"), _NAMES[provider]
    if provider == "nv-tensorrt-rtx":
        _add_plugin(onnxruntime, options)
        session = onnxruntime.InferenceSession(str(path), options)
    else:
        if name not in onnxruntime.get_available_providers():
            raise EngineError(
                f"onnxruntime: expected {name}, got {onnxruntime.get_available_providers()}. "
                "Run: pip uninstall onnxruntime; pip install 'motioncache[gpu]'"
            )
        providers = [name] if provider == "cpu" else [name, _NAMES["cpu"]]
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    active = session.get_providers()
    if active[0] != name:
        raise EngineError(
            f"{path.name}: expected {name}, got {active}: it could not be loaded. Run: "
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
