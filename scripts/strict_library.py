"""A stand-in for a version of TensorRT that has its names, and no other.

A test gives it the behaviour that it needs, class by class. A name that this version does not have
is not there, whatever the behaviour says: a call to it fails as it would with the real library.
Names that are there but have no behaviour say so when they are used.

Neighbour: `record_surfaces` writes the table of names.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import wraps
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

MODULE = "module"  # stands for the class of what is not in one
OF_EVERY_CLASS = ("__dict__", "__weakref__", "__module__", "__doc__", "__qualname__")


@dataclass(frozen=True)
class Surface:
    """The names of one version of one library.

    Attributes:
        library: Import name.
        version: Of it.
        names: By class.
        enums: Members by enumeration.
        aliases: Names of the module for members of enumerations.
    """

    library: str
    version: str
    names: dict[str, list[str]]
    enums: dict[str, list[str]]
    aliases: dict[str, str]


def read_surfaces(path: Path) -> list[Surface]:
    """Read a table of `record_surfaces`."""
    table = json.loads(path.read_text())

    def choose(part: str, place: int) -> dict[str, list[str]]:
        found = {}
        for owner, groups in table[part].items():
            having = [group for places, group in groups.items() if str(place) in places.split()]
            found[owner] = [name for group in having for name in group]
        return {owner: names for owner, names in found.items() if names}

    surfaces = []
    for place, title in enumerate(table["libraries"]):
        library, version = title.split()
        names, enums = choose("names", place), choose("enums", place)
        surfaces.append(Surface(library, version, names, enums, table["aliases"]))
    return surfaces


@dataclass
class StrictLibrary:
    """A module to import in place of the library, and what was done with it.

    Attributes:
        module: The stand-in.
        calls: Name and arguments of every call of a behaviour, in order; without `self`.
    """

    module: ModuleType
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def count(self, name: str) -> int:
        """Count the calls of a name, such as `Builder.create_network`."""
        return sum(call[0] == name for call in self.calls)


class Missing:
    """A name that is there, without behaviour."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> Any:
        if instance is None:
            return self
        raise NotImplementedError(f"{self.name}: the stand-in has no behaviour for it")

    def __call__(self, *arguments: Any) -> Any:
        """Say so as well where it is called on the module."""
        raise NotImplementedError(f"{self.name}: the stand-in has no behaviour for it")


class Strict:
    """Base of all classes: no attribute can be set that the version does not have.

    Attributes that begin with an underscore are the behaviour's own; classes that a program derives
    may have what they like. `_library` is the module, for behaviour that makes objects.
    """

    _library: ModuleType

    def __setattr__(self, name: str, value: Any) -> None:
        made_here = "_library" in vars(type(self))
        if made_here and not name.startswith("_") and not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        super().__setattr__(name, value)


def make_library(surface: Surface, behaviour: Mapping[str, type]) -> StrictLibrary:
    """Make the stand-in of a version.

    Args:
        surface: Its names.
        behaviour: Plain classes by the name of the class that they stand for.

    Returns:
        The module, and the record of its calls.
    """
    made = StrictLibrary(ModuleType(surface.library))
    module = made.module
    vars(module).update(
        {name: Missing(name) for name in surface.names[MODULE]}, __version__=surface.version
    )
    for path, names in sorted(surface.names.items()):  # a class comes before those inside of it
        if path != MODULE:
            acts = behave(made, path, names, behaviour.get(path, object))
            place(module, path, type(path, (Strict,), {**acts, "_library": module}))
    for path, members in surface.enums.items():
        place(module, path, IntEnum(path.rpartition(".")[2], members, start=0))
    for name, target in surface.aliases.items():
        owner, _, member = target.partition(".")
        if name in surface.names[MODULE]:
            setattr(module, name, getattr(getattr(module, owner), member))
    return made


def behave(made: StrictLibrary, path: str, names: list[str], acts: type) -> dict[str, Any]:
    """Return the attributes of a class: its names, with behaviour where there is any."""
    chosen = {
        name: record(made, f"{path}.{name}", value)
        for name, value in vars(acts).items()
        if name in names or (name.startswith("_") and name not in OF_EVERY_CLASS)
    }
    return {name: Missing(f"{path}.{name}") for name in names} | chosen


def place(module: ModuleType, path: str, value: Any) -> None:
    """Put a class where its path says, if that is there."""
    owner: Any = module
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    if not isinstance(owner, Missing):
        setattr(owner, name, value)


def record(made: StrictLibrary, name: str, value: Any) -> Any:
    """Note calls of a function of the behaviour; leave everything else as it is."""
    if not isinstance(value, FunctionType) or name.rpartition(".")[2].startswith("_"):
        return value

    @wraps(value)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        made.calls.append((name, *arguments, *named.values()))
        return value(self, *arguments, **named)

    return call
