"""Errors for callers who recover; wrong arguments are ValueError or TypeError.

    McError
    ├── BundleError      a bundle that is damaged, incomplete, of another version, or in the way
    ├── EngineError      an engine that cannot be loaded, or refuses its inputs, or gives NaN
    ├── BuildError       a graph of which a library makes no engine for these GPUs
    ├── CheckpointError  a checkpoint with missing, unexpected or unusable tensors
    ├── ParityError      a graph that does not compute what the model computes
    └── MissingExtraError  an optional dependency that is not installed

Messages read `<subject>: expected <x>, got <y>. <what to do>.`
"""

__all__ = [
    "BuildError",
    "BundleError",
    "CheckpointError",
    "EngineError",
    "McError",
    "MissingExtraError",
    "ParityError",
    "not_installed",
    "require",
]

import importlib
from types import ModuleType


class McError(Exception):
    """Base of every error of this project that a caller may want to catch."""


class BundleError(McError):
    """A bundle is damaged, incomplete, of another version, or in the way."""


class EngineError(McError):
    """An engine cannot be loaded, refuses its inputs, or computes NaN."""


class BuildError(McError):
    """A library makes no engine of a graph for these GPUs; others may do, and ONNX Runtime does."""


class CheckpointError(McError):
    """A checkpoint has missing, unexpected or unusable tensors."""


class ParityError(McError):
    """An exported graph does not compute what the model computes."""


class MissingExtraError(McError):
    """An optional dependency is not installed; the message names the pip command."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency where it is used.

    Args:
        module: Import name, for example `onnxruntime`.
        extra: Extra of this distribution that installs it, for example `cpu`.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(not_installed(module, extra)) from error


def not_installed(module: str, extra: str) -> str:
    """Return the message of a missing optional dependency, with the command that installs it.

    Args:
        module: Import name.
        extra: Extra of this distribution that installs it.

    Returns:
        Text for a `MissingExtraError`.
    """
    return f"{module}: not installed. Run: pip install 'motioncache[{extra}]'"
