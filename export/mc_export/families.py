"""The families of models that are exported, by the name that `--model` and manifests give them."""

__all__ = ["FAMILIES", "find_family"]

from collections.abc import Mapping
from types import MappingProxyType

from mc_engines.published import PUBLISHED_BY_FAMILY
from mc_export.family import Family
from mc_export.magi_family import MAGI_FAMILY
from mc_export.skyreels_family import SKYREELS_FAMILY

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {"skyreels": SKYREELS_FAMILY, "magi": MAGI_FAMILY}
)


def find_family(model: str) -> tuple[str, Family]:
    """Find the family of a model.

    Args:
        model: A family, or a published configuration.

    Returns:
        The family's name and adapter.

    Raises:
        ValueError: There is no such model.
    """
    for name, family in FAMILIES.items():
        if model == name or model in PUBLISHED_BY_FAMILY[name]:
            return name, family
    known = [x for name in FAMILIES for x in (name, *PUBLISHED_BY_FAMILY[name])]
    raise ValueError(f"model: expected one of {', '.join(known)}, got {model!r}.")
