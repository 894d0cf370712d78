"""The manifest of a bundle: what the bundle holds, and the size and hash of every file.

`manifest.sha256` holds the hash of `manifest.json`. While files are being added it holds two
lines, the old hash and the new one, so that the pair is valid at every instant; a reader accepts
the manifest if its hash is on one of them. Neighbours: `verify` compares a folder with its
manifest, `Bundle` reads through it, `BundleWriter` and `add_files` write it.
"""

__all__ = [
    "CACHE_SUFFIX",
    "ENGINES_FOLDER",
    "HASH_FILE",
    "LOCK_FILE",
    "MANIFEST_FILE",
    "SCHEMA_VERSION",
    "FileEntry",
    "Manifest",
    "hash_file",
    "hash_lines",
    "is_inside",
    "read_manifest",
]

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Any

from mc_engines.errors import BundleError
from mc_engines.specs import ComponentSpec

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
HASH_FILE = "manifest.sha256"
LOCK_FILE = ".lock"
ENGINES_FOLDER = "engines"  # what mc-build makes, and makes again
CACHE_SUFFIX = ".cache"  # beside an engine: what its library compiled for the GPU of this machine
_HASH_LINES = re.compile(rf"(?:[0-9a-f]{{64}}  {re.escape(MANIFEST_FILE)}\n){{1,2}}")
_TYPES: dict[str, type | UnionType] = {
    "a number": int,
    "a string": str,
    "a string or null": str | None,
    "a list": list,
    "an object": dict,
}
_FIELDS = {
    "schema_version": "a number",
    "tool_version": "a string",
    "family": "a string",
    "model": "a string or null",
    "weights_dtype": "a string",
    "missing": "a list",
    "config": "an object",
    "components": "an object",
    "presets": "an object",
    "files": "an object",
}


@dataclass(frozen=True)
class FileEntry:
    """What a file of the bundle must be.

    Attributes:
        size: In bytes.
        sha256: In lower-case hexadecimal digits.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything a bundle says about itself; docs/bundle.md describes each field.

    Attributes:
        family: Such as `skyreels`; decides schedule, guidance and key range.
        model: Name of the published configuration, or None.
        weights_dtype: `float32`, `float16` or `bfloat16`: how the weights are stored.
        missing: Parts that the checkpoint lacked: `text_encoder`, `tokenizer`, `vae`.
        config: Sizes and constants by part.
        components: Specs by name.
        presets: Cache presets by name; plain data that is not interpreted here.
        files: Every file but the manifest, its hash and the lock, by relative POSIX path.
        tool_version: Version of this package that wrote the bundle.
        schema_version: Of the manifest.
    """

    family: str
    model: str | None
    weights_dtype: str
    missing: tuple[str, ...]
    config: Mapping[str, Any]
    components: Mapping[str, ComponentSpec]
    presets: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    tool_version: str = field(default_factory=partial(metadata.version, "motioncache"))
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """The manifest as it stands in the file; files are sorted by path."""
        return {
            "schema_version": self.schema_version,
            "tool_version": self.tool_version,
            "family": self.family,
            "model": self.model,
            "weights_dtype": self.weights_dtype,
            "missing": list(self.missing),
            "config": dict(self.config),
            "components": {name: spec.to_json() for name, spec in self.components.items()},
            "presets": dict(self.presets),
            "files": {path: vars(entry) for path, entry in sorted(self.files.items())},
        }

    def to_bytes(self) -> bytes:
        """The content of `manifest.json`: the bytes that are hashed."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Read the content of `manifest.json`.

        Args:
            data: What `to_bytes` or a program in another language wrote.

        Returns:
            The manifest. Its paths are as they stand in the file: `verify` checks them.

        Raises:
            BundleError: It is of another schema, or a field is missing, unknown or of another type.
        """
        try:
            value = json.loads(data)
        except ValueError as error:
            raise BundleError(f"{MANIFEST_FILE}: expected JSON, got {error}.") from error
        _check_fields(value)
        try:
            return cls(
                components={
                    name: ComponentSpec.from_json(name, spec)
                    for name, spec in value.pop("components").items()
                },
                files={path: FileEntry(**entry) for path, entry in value.pop("files").items()},
                missing=tuple(value.pop("missing")),
                **value,
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise BundleError(
                f"{MANIFEST_FILE}: expected components and files as docs/bundle.md describes, "
                f"got {error!r}."
            ) from error


def _check_fields(value: Any) -> None:
    if not isinstance(value, dict):
        raise BundleError(f"{MANIFEST_FILE}: expected an object, got {type(value).__name__}.")
    version = value.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{MANIFEST_FILE}: expected schema_version {SCHEMA_VERSION}, got {version!r}. "
            f"Export again, or read it with motioncache {value.get('tool_version')}."
        )
    if set(value) != set(_FIELDS):
        raise BundleError(
            f"{MANIFEST_FILE}: expected the fields {sorted(_FIELDS)}, got {sorted(value)}."
        )
    for name, expected in _FIELDS.items():
        if not isinstance(value[name], _TYPES[expected]):
            raise BundleError(
                f"{MANIFEST_FILE}: field '{name}': expected {expected}, got {value[name]!r}."
            )


def hash_lines(*digests: str) -> bytes:
    """Return the content of `manifest.sha256`, in the format of the sha256sum command."""
    return "".join(f"{digest}  {MANIFEST_FILE}\n" for digest in digests).encode()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file of any size in lower-case hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_inside(relative: str) -> bool:
    """Say whether a path may stand in a manifest.

    Args:
        relative: POSIX path, relative to the bundle.

    Returns:
        False for what is absolute, leads outside, has a second spelling (`a//b`, `a/./b`), could
        mean something else on another system (backslash, colon, unprintable characters), or is
        the manifest, its hash or the lock.
    """
    parts = relative.split("/")
    return (
        relative.isprintable()
        and not any(character in relative for character in "\\:")
        and not any(part in ("", ".", "..") for part in parts)
        and relative not in (MANIFEST_FILE, HASH_FILE, LOCK_FILE)
    )


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Read a manifest whose hash is right.

    Args:
        folder: The bundle.

    Returns:
        The manifest, and its sha256: the identity of the bundle.

    Raises:
        BundleError: There is none, it does not match its hash, or it is of another schema.
    """
    before: tuple[bytes, bytes] | None = None
    while True:
        pair = _read(folder, MANIFEST_FILE), _read(folder, HASH_FILE)
        lines = pair[1].decode("ascii", "replace")
        digest = hashlib.sha256(pair[0]).hexdigest()
        if _HASH_LINES.fullmatch(lines) and digest in lines:
            return Manifest.from_bytes(pair[0]), digest
        # A process that adds files may have replaced one file between the two reads.
        if pair == before:
            raise BundleError(
                f"{folder}: {HASH_FILE}: expected '{digest}  {MANIFEST_FILE}', got "
                f"{lines.rstrip()[:80]!r}. One of the two was changed or damaged: "
                "copy the bundle again, or export it again."
            )
        before = pair


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing at this path"
        raise BundleError(f"{folder}: expected the folder of a bundle, got {got}.")
    if path.is_symlink():
        raise BundleError(f"{path}: expected a regular file, got a link. Put the file itself here.")
    if not path.is_file():
        raise BundleError(
            f"{folder}: expected {name}, got a folder without it. "
            "It is not a bundle, or the copy did not finish: copy or export it again."
        )
    return path.read_bytes()
