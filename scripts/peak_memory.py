"""The most memory that this process holds while something runs, for scripts that print it."""

import threading
import time
from types import TracebackType

from mc_runtime.bench.machine import read_resident


class PeakMemory:
    """Samples what this process holds, while the body of a `with` runs.

    Args:
        interval: Seconds between samples.

    Attributes:
        anonymous: Largest anonymous memory, in bytes.
        mapped: The most of mapped files, in bytes.
        seconds: Wall time.
    """

    def __init__(self, interval: float) -> None:
        self.anonymous = self.mapped = 0
        self.seconds = 0.0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self._start
        self._sample()

    def __str__(self) -> str:
        return f"{self.seconds:8.1f} s, peak anonymous {self.anonymous / 1e9:6.2f} GB"

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        now = read_resident()
        self.anonymous = max(self.anonymous, now["anonymous"])
        self.mapped = max(self.mapped, now["mapped"])
