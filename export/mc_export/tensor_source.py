"""Where tensors come from: files that are mapped, never read whole, one tensor at a time.

`load_checkpoint` opens these; the adapters load from them, layer by layer. A file's pages count as
cache of the operating system, so that reading a 28 GB checkpoint needs little memory of its own.
`RandomSource` is the neighbour that needs no file.
"""

__all__ = [
    "PickleSource",
    "RenamedSource",
    "SafetensorsSource",
    "Shape",
    "TensorSource",
    "open_weights",
]

import json
import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from mc_engines.errors import CheckpointError, require

Shape: TypeAlias = tuple[int, ...]

_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.(?P<kind>safetensors|bin)")
_FETCH_AGAIN = "Fetch the checkpoint again."


class TensorSource(Protocol):
    """Named tensors that are loaded one at a time."""

    def names(self) -> frozenset[str]:
        """Every tensor there is."""
        ...

    def shape(self, name: str) -> Shape:
        """The tensor's shape, without loading it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype as stored, without loading it."""
        ...

    def load(self, name: str) -> Tensor:
        """The tensor in its stored dtype; not to be written to, for it may be a mapped file."""
        ...


class SafetensorsSource:
    """The tensors of a folder's `*.safetensors`, one file or several shards.

    With a `*.safetensors.index.json` its files are read and held against it; without one, every
    file of the folder.

    Args:
        folder: Where the files lie.

    Raises:
        CheckpointError: There is no such file, one is missing or damaged, or two hold one tensor.
        MissingExtraError: safetensors is not installed.
    """

    def __init__(self, folder: Path) -> None:
        listed = _listed_tensors(folder)
        files = sorted(set(listed.values())) or sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder}: expected weights in *.safetensors, got none. {_FETCH_AGAIN}"
            )
        _check_shards(files)
        self._handles: dict[str, Any] = {}
        for file in files:
            self._add(file)
        for name, file in listed.items():
            if name not in self._handles:
                raise CheckpointError(
                    f"{file}: expected the tensor '{name}' that the index names, got none. "
                    f"{_FETCH_AGAIN}"
                )

    def _add(self, file: Path) -> None:
        handle = _open_safetensors(file)
        for name in handle.keys():
            if name in self._handles:
                raise CheckpointError(
                    f"{file}: expected tensors that no other file holds, got '{name}' twice. "
                    "Keep one variant of the weights in the folder."
                )
            self._handles[name] = handle

    def names(self) -> frozenset[str]:
        """Every tensor of every file."""
        return frozenset(self._handles)

    def shape(self, name: str) -> Shape:
        """The tensor's shape, from the header of its file."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype; its values are mapped for it, not read."""
        return self.load(name).dtype

    def load(self, name: str) -> Tensor:
        """A view of the mapped file."""
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor


class PickleSource:
    """The tensors of torch files (`.pth`, `.bin`), unpickled with weights only and mapped.

    Args:
        files: Written by `torch.save`: dictionaries of tensors, not nested. If two hold a tensor,
            which a tied one may be, it is that of the last.

    Raises:
        CheckpointError: A file is damaged, cannot be mapped, or holds anything but tensors; or one
            of several is missing.
    """

    def __init__(self, *files: Path) -> None:
        _check_shards(list(files))
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            self._tensors |= self._open(file)

    @staticmethod
    def _open(file: Path) -> dict[str, Tensor]:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{file}: expected nothing but tensors, got other objects, which could run code. "
                "Save the state dict alone."
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise CheckpointError(
                f"{file}: expected a whole file in torch's zip format, got one that cannot be "
                f"read. {_FETCH_AGAIN}"
            ) from error
        if not isinstance(tensors, dict) or not all(
            isinstance(tensor, Tensor) for tensor in tensors.values()
        ):
            raise CheckpointError(
                f"{file}: expected a dictionary of tensors, got something else. "
                "Save the state dict alone."
            )
        return tensors

    def names(self) -> frozenset[str]:
        """Every key of the dictionaries."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> Shape:
        """The tensor's shape."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype."""
        return self._tensors[name].dtype

    def load(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self._tensors[name]


class RenamedSource:
    """Another source under other names; its tensors are untouched.

    Args:
        source: Where the tensors come from.
        rename: From a name of `source` to the name here. It returns a name that it does not know
            unchanged, so that `check_tensors` can report it.

    Raises:
        CheckpointError: Two tensors would have one name.
    """

    def __init__(self, source: TensorSource, rename: Callable[[str], str]) -> None:
        self._source = source
        self._old = {rename(name): name for name in sorted(source.names())}
        if len(self._old) < len(source.names()):
            counts = Counter(map(rename, source.names()))
            twice = min(name for name, count in counts.items() if count > 1)
            raise CheckpointError(
                f"tensor '{twice}': expected one tensor of that name, got "
                f"{[name for name in sorted(source.names()) if rename(name) == twice]}. "
                "Use a checkpoint with either the original or diffusers' names."
            )

    def names(self) -> frozenset[str]:
        """The new names."""
        return frozenset(self._old)

    def shape(self, name: str) -> Shape:
        """The shape of the tensor behind the new name."""
        return self._source.shape(self._old[name])

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the tensor behind the new name."""
        return self._source.dtype(self._old[name])

    def load(self, name: str) -> Tensor:
        """The tensor behind the new name."""
        return self._source.load(self._old[name])


def open_weights(folder: Path) -> TensorSource:
    """Open a folder's `*.safetensors`, or where there are none its `*pytorch_model*.bin`.

    Args:
        folder: Where the files lie.

    Returns:
        The tensors of all of them.

    Raises:
        CheckpointError: There is no such file, one is missing or damaged.
        MissingExtraError: safetensors is not installed.
    """
    pickles = sorted(folder.glob("*pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        return PickleSource(*pickles)
    return SafetensorsSource(folder)


def _listed_tensors(folder: Path) -> dict[str, Path]:
    """The file of each tensor, as the folder's index says; empty without an index."""
    listed: dict[str, Path] = {}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            listed |= {name: folder / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{index}: expected JSON with a weight_map, got something else. {_FETCH_AGAIN}"
            ) from error
    return listed


def _check_shards(files: list[Path]) -> None:
    """Find a missing shard by the count in the names of the others."""
    for match in filter(None, (_SHARD.fullmatch(file.name) for file in files)):
        for number in range(1, int(match["count"]) + 1):
            shard = (
                files[0].parent
                / f"{match['stem']}-{number:05d}-of-{match['count']}.{match['kind']}"
            )
            if shard not in files:
                raise CheckpointError(
                    f"{shard}: expected {int(match['count'])} shards, got no such file. "
                    f"{_FETCH_AGAIN}"
                )


def _open_safetensors(file: Path) -> Any:
    safetensors = require("safetensors", "export")
    try:
        return safetensors.safe_open(file, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: expected a whole safetensors file, got one that cannot be read ({error}). "
            f"{_FETCH_AGAIN}"
        ) from error
