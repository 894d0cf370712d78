"""The JSON beside an output: everything from which the run can be repeated.

Neighbours: `mc-generate` writes a record and reads one back for `--repeat`.
"""

__all__ = ["hash_files", "read_options", "record_run", "write_record"]

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mc_engines.bundle import Bundle
from mc_runtime.input_file import read_json
from mc_runtime.options import Chunk
from mc_runtime.output_file import write_text
from mc_runtime.versions import list_versions
from motioncache import Policy
from motioncache.options import format_options

SCHEMA = "motioncache.run/v1"
_REMEDY = "Pass one that mc-generate wrote."


def hash_files(files: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """Note where input files are and what is in them, before the run: an output may replace one.

    Args:
        files: By parameter name of `mc-generate`.

    Returns:
        `path`, absolute so that the record is of use in any folder, and `sha256` by name.
    """
    return {
        name: {"path": str(path.absolute()), "sha256": _hash(path)} for name, path in files.items()
    }


def record_run(
    bundle: Bundle,
    options: Any,
    inputs: Mapping[str, Any],
    files: Mapping[str, Mapping[str, str]],
    threads: int | None,
    policy: Policy,
    chunks: Sequence[Chunk],
    interrupted: bool,
    ran_on: Mapping[str, Any],
) -> dict[str, Any]:
    """Gather what it takes to repeat a run, and what came out of it.

    Args:
        bundle: What was run.
        options: Every setting.
        inputs: Prompts, as given.
        files: Input files, from `hash_files`.
        threads: Threads of one operator, or None.
        policy: The cache policy; all its settings are recorded.
        chunks: Those that were finished; their times are recorded.
        interrupted: Whether the run was stopped before its end.
        ran_on: What ran the model: `backend`; of ONNX Runtime on a GPU the active `providers`; of
            engines `dtype`, the folder `engines`, `library` (version), `gpu` and `capability`.

    Returns:
        JSON-ready values.
    """
    return {
        "schema": SCHEMA,
        "options": asdict(options),
        "inputs": dict(inputs),
        "files": dict(files),
        "policy": policy.name,
        "preset": policy.preset,
        "policy_options": format_options(policy.config),
        "threads": threads,
        "bundle": {"path": str(bundle.path.absolute()), "hash": bundle.model_hash},
        "ran_on": dict(ran_on),
        "versions": list_versions(),
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
    """Write a record as JSON; the old one stays until the new one is whole."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_options(path: Path, bundle: Bundle, defaults: Any) -> dict[str, Any]:
    """Read the settings of a recorded run.

    Args:
        path: The JSON file.
        bundle: On which the run is to be repeated.
        defaults: Options of its family.

    Returns:
        Settings, `policy`, `policy_option`, `threads`, `backend`, `dtype`,
        `engines`, prompts and files, by parameter name of `mc-generate`; `preset`, the name of the
        policy's; and `ran_on` as it was recorded, empty in a record of before it was.

    Raises:
        ValueError: It is no record of this version, or of another bundle, or an input has changed.
    """
    record = _read_record(path, defaults)
    if record["bundle"] != bundle.model_hash:
        raise ValueError(
            f"{path}: expected the bundle {record['bundle'][:12]}, got {bundle.path} with "
            f"{bundle.model_hash[:12]}. Repeat the run on the bundle it used."
        )
    for file, digest in record["files"]:
        if not file.is_file() or _hash(file) != digest:
            raise ValueError(
                f"{file}: expected the file of the recorded run, got another or none. "
                "Restore it, or run without --repeat."
            )
    values: dict[str, Any] = record["values"]
    return values


def _read_record(path: Path, defaults: Any) -> dict[str, Any]:
    """Take from a record what a repetition needs: `bundle`, `files` and `values`."""
    record = read_json(path, SCHEMA, "the JSON of a run", _REMEDY)
    try:
        settings = asdict(replace(defaults, **record["options"]))
        files = {name: Path(entry["path"]) for name, entry in record["files"].items()}
        ran_on = dict(record.get("ran_on", {}))
        engines = ran_on.get("engines")
        return {
            "bundle": record["bundle"]["hash"],
            "files": [(files[name], entry["sha256"]) for name, entry in record["files"].items()],
            "values": {
                **settings,
                **record["inputs"],
                **files,
                "policy": record["policy"],
                "policy_option": tuple(record["policy_options"]),
                "preset": record["preset"],
                "threads": record["threads"],
                "backend": ran_on.get("backend", "cpu"),
                "dtype": ran_on.get("dtype"),
                "engines": None if engines is None else Path(engines),
                "ran_on": ran_on,
            },
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a whole record, got one without or with a wrong {error}. {_REMEDY}"
        ) from error


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
