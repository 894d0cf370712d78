"""What a result was computed with: a record and a report name it."""

__all__ = ["find_version", "list_versions"]

import platform
import sys
from importlib import metadata

_PACKAGES = ("motioncache", "numpy", "onnxruntime", "onnxruntime-gpu", "av", "scikit-image")


def list_versions() -> dict[str, str]:
    """Return the versions of Python, of the system, and of the packages that are installed."""
    versions = {"python": platform.python_version(), "platform": sys.platform}
    found = {package: find_version(package) for package in _PACKAGES}
    return versions | {package: version for package, version in found.items() if version}


def find_version(package: str) -> str | None:
    """Return the version of a distribution; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
