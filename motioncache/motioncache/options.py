"""Settings of a policy as text: `FIELD=VALUE`, with the field names of its configuration.

Neighbours: the command lines pass what `--policy-option` was given; `presets` reads it.
"""

__all__ = ["format_options", "parse_options"]

from collections.abc import Iterable
from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", NoneType: "none"}


def parse_options(config_type: type, pairs: Iterable[str]) -> dict[str, Any]:
    """Read settings of a policy.

    Args:
        config_type: The configuration of the policy, a dataclass.
        pairs: Such as `threshold=0.1` or `coefficients=2,-1,0`; the last of a name wins.

    Returns:
        Values by field.

    Raises:
        ValueError: A pair is no pair, its field is unknown, or its value is of another type.
    """
    hints = get_type_hints(config_type)
    values = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not hints:
            raise ValueError(
                f"policy option: expected none, as this policy has no settings, got '{pair}'. "
                "Name another policy."
            )
        if not equals or name not in hints:
            raise ValueError(
                f"policy option: expected FIELD=VALUE with a field of {', '.join(hints)}, "
                f"got '{pair}'. Write it like threshold=0.1."
            )
        values[name] = _parse(name, text, hints[name])
    return values


def format_options(config: Any) -> list[str]:
    """Write every setting of a configuration so that `parse_options` reads it back.

    Args:
        config: Of a policy, with `compat` by its name; None for one without settings.

    Returns:
        Pairs `FIELD=VALUE`, values in full.
    """
    if config is None:
        return []
    return [f"{entry.name}={_format(getattr(config, entry.name))}" for entry in fields(config)]


def _format(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_format, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)


def _parse(name: str, text: str, hint: Any) -> Any:
    """Read a value as the first of the field's types that it fits."""
    kinds = (hint,) if get_origin(hint) in (None, tuple, Literal) else get_args(hint)
    for kind in kinds:
        try:
            return _convert(text, kind)
        except (ValueError, TypeError, KeyError):
            continue
    wanted = " or ".join(filter(None, map(_describe, kinds)))
    raise ValueError(f"{name}: expected {wanted}, got '{text}'. Write {name}= with one.")


def _convert(text: str, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        return tuple(float(part) for part in text.split(","))
    if get_origin(kind) is Literal:
        return {choice: choice for choice in get_args(kind)}[text]
    if kind is NoneType:
        return {"none": None}[text]
    if kind is bool:
        return {"true": True, "false": False}[text]
    return kind(text)


def _describe(kind: Any) -> str:
    """A type in the words of an error; empty for one that has no text form."""
    if get_origin(kind) is tuple:
        return "numbers with commas between"
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    return _KINDS.get(kind, "")
