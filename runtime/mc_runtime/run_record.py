"""The JSON beside an output: everything from which the run can be repeated.

Neighbours: `mc-generate` writes a record and reads one back for `--repeat`.
"""

__all__ = ["read_options", "record_run", "write_record"]

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from mc_engines.bundle import Bundle
from mc_runtime.options import Chunk, GenerationOptions

SCHEMA = "motioncache.run/v1"
_PACKAGES = ("motioncache", "numpy", "onnxruntime", "onnxruntime-gpu", "av")


def record_run(
    bundle: Bundle,
    options: GenerationOptions,
    inputs: Mapping[str, Any],
    files: Mapping[str, Path],
    threads: int | None,
    policy: str,
    chunks: Sequence[Chunk],
    interrupted: bool,
) -> dict[str, Any]:
    """Describe a run.

    Args:
        bundle: What was run.
        options: Every setting.
        inputs: Prompts, as given.
        files: Input files by option name; their hashes are recorded.
        threads: Threads of one operator, or None.
        policy: Name of the cache policy.
        chunks: Those that were finished; their times are recorded.
        interrupted: Whether the run was stopped before its end.

    Returns:
        JSON-ready values.
    """
    return {
        "schema": SCHEMA,
        "options": asdict(options),
        "inputs": dict(inputs),
        "files": {name: {"path": str(path), "sha256": _hash(path)} for name, path in files.items()},
        "policy": policy,
        "threads": threads,
        "bundle": {"path": str(bundle.path), "hash": bundle.hash},
        "versions": _versions(),
        "interrupted": interrupted,
        "chunks": [
            {
                "index": chunk.index,
                "of": chunk.of,
                "seconds": chunk.seconds,
                "decode_seconds": chunk.decode_seconds,
                "computed": chunk.computed,
            }
            for chunk in chunks
        ],
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, under a hidden name first."""
    hidden = path.absolute().with_name(f".{path.name}.partial-{os.getpid()}")
    hidden.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    hidden.replace(path)


def read_options(path: Path, bundle: Bundle) -> dict[str, Any]:
    """Read the settings of a recorded run.

    Args:
        path: The JSON file.
        bundle: On which the run is to be repeated.

    Returns:
        Fields of `GenerationOptions`, `threads`, and prompts and files by parameter name of
        `mc-generate`.

    Raises:
        ValueError: It is no record of this version, or of another bundle, or an input has changed.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record.get("schema")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected the JSON of a run, got: {error}.") from error
    if found != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {found}.")
    if record["bundle"]["hash"] != bundle.hash:
        raise ValueError(
            f"{path}: expected the bundle {record['bundle']['hash'][:12]}, "
            f"got {bundle.path} with {bundle.hash[:12]}. Repeat the run on the bundle it used."
        )
    files = {name: Path(entry["path"]) for name, entry in record["files"].items()}
    for name, file in files.items():
        if not file.is_file() or _hash(file) != record["files"][name]["sha256"]:
            raise ValueError(
                f"{file}: expected the file of the recorded run, got another or none. "
                "Restore it, or run without --repeat."
            )
    return {**record["options"], **record["inputs"], **files, "threads": record["threads"]}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": sys.platform}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
