"""The JSON Schemas of what `mc-bench` writes; they lie beside this module.

Neighbours: `compare` reads a report back and holds it against its schema.
"""

__all__ = ["find_fault", "read_schema"]

import json
from importlib import resources
from typing import Any

from mc_engines.errors import require


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


def find_fault(kind: str, report: Any) -> str | None:
    """Say where a report does not follow its schema.

    Args:
        kind: As for `read_schema`.
        report: As JSON has it.

    Returns:
        The fault that explains most, such as `$.engines[0]: 'cost' is a required property`; None
        where there is none.

    Raises:
        MissingExtraError: jsonschema is not installed.
    """
    jsonschema = require("jsonschema", "bench")
    faults = jsonschema.Draft202012Validator(read_schema(kind)).iter_errors(report)
    fault = jsonschema.exceptions.best_match(faults)
    return None if fault is None else f"{fault.json_path}: {fault.message}"
