"""Devices as their vendors describe them: what a roofline needs.

Neighbours: `roofline` turns operations and bytes into time, `reference` measures this machine.

Rates are those of dense matrix products with float32 accumulation at the boost clock that the
vendor names; datasheets often print twice as much, for sparse matrices, and a card that clocks
higher beats them (an RTX 5090 was seen at 240 TFLOP/s in bf16). Bandwidth is decimal. The GB of a
memory are not: 80 GB are 80 times 2^30 bytes, of which the driver takes its share.

A source names the vendor's document, and after it what was read: where that is not the document
itself, a copy of its table.
"""

__all__ = ["DEVICES", "THIS_CPU", "Device", "find_device"]

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

THIS_CPU = "this-cpu"
_GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What a GPU, a Jetson or a CPU can do at best.

    Attributes:
        title: What the vendor calls it.
        flops: Operations per second by dtype; what is missing has no unit of its own.
        bandwidth: Bytes per second of its memory.
        memory: Bytes of it that a program can see, at most.
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
            80 * _GIB,
            "NVIDIA H100 Tensor Core GPU Architecture, whitepaper, dense rates (read in "
            "glennklockwood.com/garden/processors/h100); 3,350 GB/s: its datasheet (read in "
            "archive-lib.hpctech.co.jp); NVML reports 81,559 MiB",
        ),
        "a800": Device(
            "NVIDIA A800 80 GB",
            _rates(311.9, tf32=155.9),
            2.039e12,
            80 * _GIB,
            "NVIDIA A100 Tensor Core GPU, datasheet, SXM 80 GB, dense: 312 and 156 TFLOP/s, 2,039 "
            "GB/s (read in glennklockwood.com/garden/processors/A100); the A800 has its rates and "
            "a slower NVLink (311.87: hmc-tech.com); NVML reports 81,920 MiB",
        ),
        "l40s": Device(
            "NVIDIA L40S",
            _rates(362.05, fp8=733.0, tf32=183.0),
            864e9,
            45 * _GIB,  # 48 GB, less the sixteenth in which it keeps error-correcting codes
            "NVIDIA L40S, datasheet, dense (read in mullet.se); NVML reports 46,068 MiB of its 48 "
            "GB, the rest is ECC",
        ),
        "rtx-4090": Device(
            "NVIDIA GeForce RTX 4090",
            _rates(165.2, fp8=330.3, tf32=82.6),
            1008e9,
            24 * _GIB,
            "NVIDIA Ada GPU Architecture, whitepaper, appendix A, dense, FP32 accumulate (read in "
            "quotations: 165.2 of 330.4 sparse, and waredb.com: 330.30 and 82.58 TFLOP/s, 1008 "
            "GB/s)",
        ),
        "rtx-5090": Device(
            "NVIDIA GeForce RTX 5090",
            _rates(209.5, fp8=419.0, tf32=104.8),
            1792e9,
            32 * _GIB,
            "NVIDIA RTX Blackwell GPU Architecture, whitepaper, appendix A, dense, FP32 accumulate "
            "(read in quotations: 209.5 of 419 and 419 of 838 sparse, and in "
            "github.com/lamonoai/gpumap: 105 TFLOP/s in TF32, 1,792 GB/s)",
        ),
        "jetson-agx-orin": Device(
            "NVIDIA Jetson AGX Orin 64 GB",
            # 170 sparse INT8 TOPS of the GPU: half of that dense, and half of that in 16 bit.
            _rates(42.5, tf32=21.25),
            204.8e9,
            64 * _GIB,
            "NVIDIA Jetson AGX Orin Series, technical brief: 170 sparse INT8 TOPS of the GPU (read "
            "in mzph.cn), a quarter of it in dense 16 bit, as NVIDIA lists 17 beside 67 for the "
            "Orin Nano Super; datasheet DS-10662-001 v1.8: 204.8 GB/s (read in quotations)",
            shared_memory=True,
        ),
        "jetson-thor": Device(
            "NVIDIA Jetson T5000 (AGX Thor)",
            # 517 sparse FP16 TFLOP/s, half of it dense; FP8 twice that, TF32 half.
            _rates(258.75, fp8=517.5, tf32=129.4),
            273e9,
            128 * _GIB,
            "NVIDIA Jetson T5000 and AGX Orin migration, application note DA-11926-001 v1.2, table "
            "1: 517 sparse FP16 TFLOP/s, and the module's datasheet: 273 GB/s (both read in "
            "quotations); half of the 517 dense, which is an eighth of its 2070 sparse FP4",
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
