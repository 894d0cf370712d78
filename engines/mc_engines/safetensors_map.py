"""Tensors of a safetensors file as views of the mapped file, without the safetensors library.

Nothing is read until an array is used, and pages can be dropped again: a model larger than the
memory can be run layer by layer. Neighbours: `Bundle.map_tensors` names the file,
`Bundle.layer_weights` casts what it holds.

Source: the safetensors format: 8 bytes little-endian header size, a JSON header, the tensors.
"""

__all__ = ["map_safetensors"]

import json
import math
import mmap
import os
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from mc_engines.errors import BundleError
from mc_engines.runner import Array

_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "I16": np.int16,
        "I32": np.int32,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "BF16": ml_dtypes.bfloat16,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
    }.items()
}
_PREFIX_BYTES = 8


def map_safetensors(path: Path) -> dict[str, Array]:
    """Map a safetensors file and return a view of every tensor in it.

    Args:
        path: The file. It stays mapped for as long as one of the arrays lives.

    Returns:
        Read-only arrays by name, in the order of the file and in its dtypes; bfloat16 comes from
        ml_dtypes.

    Raises:
        BundleError: The file is truncated, or its header does not describe its content.
        OSError: The file cannot be opened.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _PREFIX_BYTES:
            _refuse(path, f"at least {_PREFIX_BYTES} bytes", f"{size}")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = _PREFIX_BYTES + int.from_bytes(data[:_PREFIX_BYTES], "little")
    if start > size:
        _refuse(path, f"a header of {start - _PREFIX_BYTES} bytes", f"a file of {size}")
    tensors: dict[str, Array] = {}
    for name, dtype, shape, offset in _layout(path, data[_PREFIX_BYTES:start], size - start):
        count = math.prod(shape)
        flat = np.frombuffer(data, dtype, count, start + offset) if count else np.empty(0, dtype)
        tensors[name] = flat.reshape(shape)
        tensors[name].flags.writeable = False
    return tensors


def _layout(
    path: Path, header: bytes, size: int
) -> list[tuple[str, np.dtype[Any], tuple[int, ...], int]]:
    """Read name, dtype, shape and offset of every tensor; they must fill `size` bytes exactly."""
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = sorted(
            (begin, end, name, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
            for name, entry in entries.items()
            for begin, end in [entry["data_offsets"]]
        )
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        _refuse(path, "a header of names, dtypes, shapes and offsets", f"{error!r}")
    position = 0
    for begin, end, name, dtype, shape in tensors:
        if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
            _refuse(path, f"whole numbers for '{name}'", f"{[begin, end]} and {list(shape)}")
        needed = math.prod(shape) * dtype.itemsize
        if begin != position or end - begin != needed:
            _refuse(path, f"'{name}' at bytes {[position, position + needed]}", f"{[begin, end]}")
        position = end
    if position != size:
        _refuse(path, f"{position} bytes of tensors", f"{size}")
    return [(name, dtype, shape, begin) for begin, _, name, dtype, shape in tensors]


def _refuse(path: Path, expected: str, got: str) -> NoReturn:
    raise BundleError(
        f"{path}: expected {expected}, got {got}. "
        "The file is truncated or damaged: copy or export it again."
    )
