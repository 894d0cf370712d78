"""The JSON Schemas of what `mc-bench` writes; they lie beside this module.

Neighbours: `compare` reads a report back and holds it against its schema, without the library for
that, which is no dependency.
"""

__all__ = ["find_fault", "read_schema"]

import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

Schema = Mapping[str, Any]

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


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
    """Say where a report does not follow its schema, by the keywords that our schemas use.

    Args:
        kind: As for `read_schema`.
        report: As JSON has it.

    Returns:
        The first fault, such as `engines[0].cost is missing`; None where there is none.
    """
    schema = read_schema(kind)
    return next(_find_faults(report, schema, schema.get("$defs", {}), ""), None)


def _find_faults(value: Any, schema: Schema, kinds: Schema, at: str) -> Iterator[str]:
    if "$ref" in schema:
        yield from _find_faults(value, kinds[schema["$ref"].rpartition("/")[2]], kinds, at)
    choices = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    if choices and all(any(_find_faults(value, each, kinds, at)) for each in choices):
        yield f"{at} is none of what it can be"
    if "type" in schema and not _is_of_type(value, schema["type"]):
        yield f"{at or 'all'} is a {type(value).__name__}, not {schema['type']}"
    elif "const" in schema and value != schema["const"]:
        yield f"{at} is {value!r}, not {schema['const']!r}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{at} is {value!r}, not one of {schema['enum']}"
    elif isinstance(value, dict):
        yield from _find_faults_of_object(value, schema, kinds, f"{at}." if at else "")
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{at} has too few entries"
        for number, each in enumerate(value):
            yield from _find_faults(each, schema.get("items", {}), kinds, f"{at}[{number}]")
    elif isinstance(value, str):
        if not re.search(schema.get("pattern", ""), value):
            yield f"{at} is {value!r}, not of the form {schema['pattern']}"
    elif value is not None and not _is_within(value, schema):
        yield f"{at} is {value}, out of bounds"


def _find_faults_of_object(
    value: Mapping[str, Any], schema: Schema, kinds: Schema, before: str
) -> Iterator[str]:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{before}{name} is missing"
    for name, each in value.items():
        if name in known:
            yield from _find_faults(each, known[name], kinds, f"{before}{name}")
        elif others is False:
            yield f"{before}{name} is unknown"
        elif isinstance(others, dict):
            yield from _find_faults(each, others, kinds, f"{before}{name}")


def _is_of_type(value: Any, names: str | list[str]) -> bool:
    names = [names] if isinstance(names, str) else names
    # To Python a bool is an int.
    return any(
        isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
        for name in names
    )


def _is_within(value: float, schema: Schema) -> bool:
    """Whether a number keeps its bounds; NaN keeps none."""
    return (
        ("minimum" not in schema or value >= schema["minimum"])
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        and ("maximum" not in schema or value <= schema["maximum"])
    )
