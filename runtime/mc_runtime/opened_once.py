"""Parts of an object that are opened when they are first needed, by whichever thread needs them.

Neighbour: `VideoPipeline`, which several threads may use.
"""

__all__ = ["opened_once"]

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

T = TypeVar("T")


class opened_once(Generic[T]):
    """A cached property that waits for a thread which is already opening it.

    functools.cached_property has no lock since Python 3.12. The object has one, `_opening`, which
    a thread may take again, as parts need other parts.

    Args:
        open_part: Opens the part of an object.
    """

    def __init__(self, open_part: Callable[[Any], T]) -> None:
        self._open_part, self.__doc__ = open_part, open_part.__doc__
        self._name = open_part.__name__

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: Any, owner: type) -> Self | T:
        if instance is None:
            return self
        with instance._opening:
            parts = vars(instance)
            if self._name not in parts:
                parts[self._name] = self._open_part(instance)
            part: T = parts[self._name]
            return part
