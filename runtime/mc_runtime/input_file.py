"""JSON that a command wrote earlier and another reads back, and arrays.

Neighbours: `run_record` and `bench.compare` say what they read; `output_file` is the way out.
"""

__all__ = ["read_array", "read_json"]

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

# What numpy raises for a text, a lone array, an empty, cut or damaged file.
_NOT_NPZ = (
    OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error
)  # fmt: skip


def read_json(path: Path, schema: str, what: str, remedy: str) -> dict[str, Any]:
    """Read an object whose `schema` names the version that the caller knows.

    Args:
        path: The file.
        schema: Name and version.
        what: The file is expected to be, for messages.
        remedy: What to do about another one, a sentence.

    Returns:
        The object; beyond its `schema` nothing of it is checked.

    Raises:
        ValueError: It is no JSON, no object, or of another schema.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except ValueError as error:
        raise ValueError(f"{path}: expected {what}, got: {error}. {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected {what}, got: no object. {remedy}")
    if value.get("schema") != schema:
        raise ValueError(f"{path}: expected schema {schema}, got {value.get('schema')}. {remedy}")
    return value


def read_array(path: Path, name: str) -> NDArray[Any]:
    """Read one array of an npz; its shape is for the caller to check.

    Args:
        path: The file.
        name: Of the array.

    Returns:
        The array.

    Raises:
        ValueError: It is no npz, or has no such array.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if name in arrays:
                array: NDArray[Any] = arrays[name]
                return array
            found = ", ".join(arrays)
    except _NOT_NPZ as error:
        raise ValueError(
            f"{path}: expected an npz file, got: {error}. Write it with numpy.savez."
        ) from error
    raise ValueError(f"{path}: expected an array '{name}', got {found}. Add it to the file.")


def _refuse_constant(name: str) -> NoReturn:
    """NaN and infinities: Python writes and reads them, JSON has none."""
    raise ValueError(f"number: expected one that JSON has, got {name}")
