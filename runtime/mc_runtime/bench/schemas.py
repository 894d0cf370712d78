"""The JSON Schemas of what `mc-bench` writes; they lie beside this module."""

__all__ = ["read_schema"]

import json
from importlib import resources
from typing import Any


def read_schema(kind: str) -> dict[str, Any]:
    """Return what a kind of report of `mc-bench` looks like, field by field.

    Args:
        kind: `policies` and `latency` of `mc-bench run`, `prediction` of `mc-bench predict`.

    Returns:
        The schema, draft 2020-12.
    """
    file = resources.files("mc_runtime.bench").joinpath(f"{kind}.schema.json")
    schema: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return schema
