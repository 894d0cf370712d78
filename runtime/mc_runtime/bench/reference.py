"""What this machine does at its best: the yardstick beside every measurement.

Neighbours: `policies` and `sweep` time the kernel between their turns, so that another program on
the machine shows; `predict` takes the rates as the roofline of `this-cpu`.
"""

__all__ = [
    "BUSY_SPREAD",
    "KERNEL_SIZE",
    "LEAST_QUIET",
    "QUIET_SPREAD",
    "find_quiet_rounds",
    "is_busy",
    "kernel_by_round",
    "measure_rates",
    "time_kernel",
]

import time
from collections.abc import Collection, Sequence

import numpy as np

BUSY_SPREAD = 1.3  # of the kernel's times: beyond, something else runs on the machine
# A round is quiet where the kernel's median is at most so many times that of the fastest round. On
# shared machines it goes to and fro between two rates, 1.25 to 1.4 apart, and a long engine slows
# down less or more than the short kernel.
QUIET_SPREAD = 1.2
LEAST_QUIET = 0.5  # of the rounds: with fewer, which rate is the machine's own is not known
KERNEL_SIZE, _KERNEL_PRODUCTS = 1024, 5
_COPIED = 2**26  # bytes: beyond any cache
_ROUNDS = 5


def time_kernel(size: int = KERNEL_SIZE) -> float:
    """Time some matrix products that are always the same.

    Args:
        size: Of the square matrices; 256 takes some milliseconds, 1024 a tenth of a second.

    Returns:
        Milliseconds.
    """
    product = np.ones((size, size), np.float32)
    factor = np.full_like(product, 1 / size)
    start = time.perf_counter()
    for _ in range(_KERNEL_PRODUCTS):
        product = product @ factor
    return 1e3 * (time.perf_counter() - start)


def kernel_by_round(kernels: Collection[Sequence[float | None] | None]) -> list[float]:
    """Median of the kernel in each round, over everything that it was timed beside.

    Args:
        kernels: Milliseconds, one per round, of each thing that was timed; None, or None among
            them, where the kernel was not.

    Returns:
        Milliseconds, as many as the longest has.
    """
    timed = [times for times in kernels if times and None not in times]
    return [
        float(np.median([times[number] for times in timed if number < len(times)]))
        for number in range(max(map(len, timed), default=0))
    ]


def find_quiet_rounds(by_round: Sequence[float]) -> list[int]:
    """Find the rounds in which nothing else seems to run on the machine.

    Args:
        by_round: Milliseconds, of `kernel_by_round`.

    Returns:
        Their numbers: where the kernel took at most `QUIET_SPREAD` times as long as in the fastest.
    """
    limit = QUIET_SPREAD * min(by_round, default=0.0)
    return [number for number, kernel in enumerate(by_round) if kernel <= limit]


def is_busy(by_round: Sequence[float]) -> bool:
    """Say whether a machine was busy with something else while rounds were timed.

    Args:
        by_round: Milliseconds, of `kernel_by_round`; none where the kernel was not timed.

    Returns:
        Whether fewer than `LEAST_QUIET` of the rounds were quiet.
    """
    return len(find_quiet_rounds(by_round)) < LEAST_QUIET * len(by_round)


def measure_rates() -> tuple[float, float]:
    """Measure this CPU in half a second, in float32 and with the threads that numpy takes.

    Returns:
        Operations per second of a matrix product, and bytes per second read and written by a copy:
        the best of five rounds of each.
    """
    operations = 2 * KERNEL_SIZE**3 * _KERNEL_PRODUCTS
    source = np.zeros(_COPIED, np.uint8)
    target = np.ones_like(source)
    flops, bandwidth = 0.0, 0.0
    for _ in range(_ROUNDS):
        flops = max(flops, operations / time_kernel() * 1e3)
        start = time.perf_counter()
        np.copyto(target, source)
        bandwidth = max(bandwidth, 2 * _COPIED / (time.perf_counter() - start))
    return flops, bandwidth
