"""JSON that a command wrote earlier and another reads back.

Neighbours: `run_record` and `bench.compare` say what they read; `output_file` is the way out.
"""

__all__ = ["read_json"]

import json
from pathlib import Path
from typing import Any, NoReturn


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


def _refuse_constant(name: str) -> NoReturn:
    """NaN and infinities: Python writes and reads them, JSON has none."""
    raise ValueError(f"{name}, which is no JSON")
