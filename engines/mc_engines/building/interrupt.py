"""Ctrl-C while a library works that calls back: noted, and raised when the library has returned.

Python raises KeyboardInterrupt in whatever callback happens to run. The bindings of TensorRT print
what a callback raises and go on (tensorrt_rtx 1.7.1), so that an interrupt would be lost.

Neighbours: `build_plan` holds it; the monitor of a build ends the build when it is noted.
"""

__all__ = ["Interrupt", "hold_interrupt"]

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager


class Interrupt:
    """Whether Ctrl-C was pressed since it is held.

    Attributes:
        pressed: It was.
    """

    def __init__(self) -> None:
        self.pressed = False

    def note(self, *_: object) -> None:
        """Be the handler of the signal."""
        self.pressed = True


@contextmanager
def hold_interrupt() -> Generator[Interrupt]:
    """Hold Ctrl-C back until the block ends, and raise it then, whatever else the block raised.

    In another thread than the main one, and where the signal is ignored, nothing is changed.

    Yields:
        What says whether it was pressed.

    Raises:
        KeyboardInterrupt: It was.
    """
    interrupt, before = Interrupt(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield interrupt
        return
    signal.signal(signal.SIGINT, interrupt.note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupt.pressed:
            raise KeyboardInterrupt
