"""What a result was computed with: a record and a report name it."""

__all__ = ["list_versions"]

import platform
import sys
from importlib import metadata

_PACKAGES = ("motioncache", "numpy", "onnxruntime", "onnxruntime-gpu", "av", "scikit-image")


def list_versions() -> dict[str, str]:
    """Return the versions of Python, of the system, and of the packages that are installed."""
    versions = {"python": platform.python_version(), "platform": sys.platform}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
