"""Devices as their vendors describe them: what a roofline needs.

Neighbours: `roofline` turns operations and bytes into time, `reference` measures this machine.

Rates are those of dense matrix products with float32 accumulation; datasheets often print twice as
much, for sparse matrices. Bandwidth and capacity are decimal, 1 GB is 10^9 bytes.
"""

__all__ = ["DEVICES", "THIS_CPU", "Device", "find_device"]

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

THIS_CPU = "this-cpu"


@dataclass(frozen=True)
class Device:
    """What a GPU, a Jetson or a CPU can do at best.

    Attributes:
        title: What the vendor calls it.
        flops: Operations per second by dtype; what is missing has no unit of its own.
        bandwidth: Bytes per second of its memory.
        memory: Bytes of it.
        shared_memory: Whether the host lives in the same memory.
        source: Where the figures are from.
    """

    title: str
    flops: Mapping[str, float]
    bandwidth: float
    memory: int
    source: str
    shared_memory: bool = False


def _rates(half: float, fp8: float | None = None, tf32: float = 0.0) -> Mapping[str, float]:
    """Dense rates from TFLOP/s of 16-bit, 8-bit and TF32 products."""
    rates = {"bf16": half * 1e12, "fp16": half * 1e12, "fp32": tf32 * 1e12}
    return MappingProxyType(rates if fp8 is None else rates | {"fp8": fp8 * 1e12})


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "h100": Device(
            "NVIDIA H100 SXM5 80 GB",
            _rates(989.4, fp8=1978.9, tf32=494.7),
            3.35e12,
            80 * 10**9,
            "NVIDIA H100 Tensor Core GPU Architecture, whitepaper v1.04, tables 2 and 3 (dense)",
        ),
        "a800": Device(
            "NVIDIA A800 80 GB",
            _rates(311.9, tf32=155.9),
            2.039e12,
            80 * 10**9,
            "NVIDIA A100 Tensor Core GPU, datasheet of June 2021 (SXM, 80 GB, dense): the A800 is "
            "that GPU with a slower NVLink",
        ),
        "l40s": Device(
            "NVIDIA L40S",
            _rates(362.05, fp8=733.0, tf32=183.0),
            864e9,
            48 * 10**9,
            "NVIDIA L40S, datasheet of August 2023 (dense)",
        ),
        "rtx-4090": Device(
            "NVIDIA GeForce RTX 4090",
            _rates(165.2, fp8=330.3, tf32=82.6),
            1008e9,
            24 * 10**9,
            "NVIDIA Ada GPU Architecture, whitepaper v2.02, appendix A (dense, FP32 accumulate)",
        ),
        "rtx-5090": Device(
            "NVIDIA GeForce RTX 5090",
            _rates(209.5, fp8=419.0, tf32=104.8),
            1792e9,
            32 * 10**9,
            "NVIDIA RTX Blackwell GPU Architecture, whitepaper v1.1, appendix A (dense, FP32 "
            "accumulate)",
        ),
        "jetson-agx-orin": Device(
            "NVIDIA Jetson AGX Orin 64 GB",
            # 170 sparse INT8 TOPS of the GPU: half of that dense, and half of that in 16 bit.
            _rates(42.5, tf32=21.25),
            204.8e9,
            64 * 10**9,
            "NVIDIA Jetson AGX Orin Series, technical brief v1.2 (GPU alone; 16 bit derived from "
            "its INT8 rate)",
            shared_memory=True,
        ),
        "jetson-thor": Device(
            "NVIDIA Jetson T5000 (AGX Thor)",
            # 2070 sparse FP4 TFLOP/s: an eighth of that in dense 16 bit, a quarter in FP8.
            _rates(258.75, fp8=517.5, tf32=129.4),
            273e9,
            128 * 10**9,
            "NVIDIA Jetson Thor Series Modules, datasheet DS-11945-001 (dense rates derived from "
            "its sparse FP4 rate)",
            shared_memory=True,
        ),
    }
)


def find_device(name: str) -> Device:
    """Look up what the table says under a name.

    Args:
        name: A key of `DEVICES`.

    Returns:
        The device.

    Raises:
        ValueError: There is none of that name.
    """
    device = DEVICES.get(name)
    if device is None:
        near = difflib.get_close_matches(name, [*DEVICES, THIS_CPU], 1)
        raise ValueError(
            f"device: expected one of {', '.join([*DEVICES, THIS_CPU])}, got '{name}'. "
            + (f"Did you mean {near[0]}?" if near else "Pass one of them.")
        )
    return device
