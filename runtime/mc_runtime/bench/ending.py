"""How a measurement ended, so that what it had measured by then is told before its error.

Neighbours: `mc-bench run` measures within an `Ending`, writes the report, and lets the error go on.
"""

__all__ = ["Ending"]


class Ending:
    """Holds back what ends a `with` block: Ctrl-C, or an error.

    Attributes:
        error: What ended it; None where it came to its end.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __enter__(self) -> "Ending":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self.error = error
        return isinstance(error, KeyboardInterrupt | Exception)

    @property
    def reason(self) -> str | None:
        """What ended it, in words; None where it came to its end."""
        if self.error is None:
            return None
        if isinstance(self.error, KeyboardInterrupt):
            return "an interrupt"
        return str(self.error) or type(self.error).__name__

    def raise_again(self) -> None:
        """Raise what was held back; nothing where there is nothing."""
        if self.error is not None:
            raise self.error
