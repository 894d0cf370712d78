"""What this machine does at its best: the yardstick beside every measurement.

Neighbours: `policies` and `sweep` time the kernel between their turns, so that another program on
the machine shows; `predict` takes the rates as the roofline of `this-cpu`.
"""

__all__ = ["BUSY_SPREAD", "KERNEL_SIZE", "measure_rates", "time_kernel"]

import time

import numpy as np

BUSY_SPREAD = 1.3  # of the kernel's times: beyond, something else runs on the machine
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
