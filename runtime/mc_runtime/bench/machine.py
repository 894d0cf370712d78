"""The machine under a measurement: what it is, and what it did meanwhile.

Neighbours: `latency_report` and `policy_report` put `describe_machine` beside the numbers; a
`Monitor` samples while `sweep` and `generation` run. psutil and nvidia-ml-py belong to the extra
`bench`; without the latter, or without a GPU, nothing is said of one.
"""

__all__ = ["Monitor", "describe_machine"]

import importlib
import os
import platform
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mc_runtime.versions import list_versions

_INTERVAL = 0.05  # seconds between samples of memory
_SLOW_INTERVAL = 0.5  # of everything else
_STATUS = Path("/proc/self/status")
_RESIDENT = {"RssAnon": "anonymous", "RssFile": "mapped", "RssShmem": "shared"}
# Bits of nvmlDeviceGetCurrentClocksEventReasons that mean slower clocks than asked for.
# Source: nvml.h of NVIDIA's NVML API, nvmlClocksEventReason*.
_THROTTLING = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def describe_machine(threads: int | None) -> dict[str, Any]:
    """Describe processor, memory, GPU and versions.

    Args:
        threads: Of one operator; None where ONNX Runtime takes every physical core.

    Returns:
        JSON-ready values; `gpu` is None where there is none, or no driver.
    """
    return {
        "cpu": _cpu_name(),
        "logical_cores": os.cpu_count() or 1,
        "threads": threads,
        "platform": platform.platform(),
        "versions": list_versions(),
        "gpu": _Gpu.describe(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class _Gpu:
    """The first GPU as NVML sees it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle

    @classmethod
    def open(cls) -> "_Gpu | None":
        """Open it; None where the library, the driver or a GPU is missing."""
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None
        try:
            nvml.nvmlInit()
            return cls(nvml, nvml.nvmlDeviceGetHandleByIndex(0))
        except nvml.NVMLError:
            return None

    @classmethod
    def describe(cls) -> dict[str, Any] | None:
        """Its name, driver, power limit and memory."""
        gpu = cls.open()
        if gpu is None:
            return None
        nvml, handle = gpu.nvml, gpu.handle
        return {
            "name": _text(nvml.nvmlDeviceGetName(handle)),
            "driver": _text(nvml.nvmlSystemGetDriverVersion()),
            "power_limit_w": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
            "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(handle).total,
        }

    def sample(self) -> dict[str, float]:
        """Clocks, power, temperature and memory now."""
        nvml, handle = self.nvml, self.handle
        return {
            "gpu_sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "gpu_power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "gpu_temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "gpu_memory_bytes": nvml.nvmlDeviceGetMemoryInfo(handle).used,
        }

    def throttling(self) -> set[str]:
        """Why the clocks are lower now than asked for."""
        bits = self.nvml.nvmlDeviceGetCurrentClocksEventReasons(self.handle)
        return {reason for bit, reason in _THROTTLING.items() if bits & bit}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


class Monitor:
    """Samples the machine in a thread of its own while a `with` block runs.

    Attributes:
        peaks: Largest resident bytes of this process, by kind: anonymous, mapped, shared, and
            `total` of all three at one moment, where /proc tells; `device` is what is in use of a
            GPU's memory, by every program.
        series: Samples by name, every half second.
        throttling: Why a GPU's clocks were lower than asked for.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.series: dict[str, list[float]] = {}
        self.throttling: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._take_memory()

    def _watch(self) -> None:
        gpu, next_slow = _Gpu.open(), time.monotonic()
        while not self._stop.wait(_INTERVAL):
            self._take_memory()
            if time.monotonic() >= next_slow:
                next_slow += _SLOW_INTERVAL
                self._take_rest(gpu)

    def _take_memory(self) -> None:
        now = _read_resident()
        for kind, amount in (now | {"total": sum(now.values())}).items() if now else ():
            self.peaks[kind] = max(amount, self.peaks.get(kind, 0))

    def _take_rest(self, gpu: _Gpu | None) -> None:
        for name, value in (_sample_cpu() | (gpu.sample() if gpu else {})).items():
            self.series.setdefault(name, []).append(value)
        if gpu is not None:
            self.throttling |= gpu.throttling()
            self.peaks["device"] = int(max(self.series["gpu_memory_bytes"]))

    def to_json(self) -> dict[str, Any]:
        """What was seen, ready for JSON."""
        return {
            "interval_s": _SLOW_INTERVAL,
            "samples": self.series,
            "throttling": sorted(self.throttling),
        }


def _read_resident() -> dict[str, int]:
    """Resident bytes of this process by kind; of nothing where the system does not tell."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields: Mapping[str, str] = dict(line.split(":", 1) for line in lines if ":" in line)
    return {
        kind: 1024 * int(fields[field].split()[0])
        for field, kind in _RESIDENT.items()
        if field in fields
    }


def _sample_cpu() -> dict[str, float]:
    """Load and clock of the processor; nothing without psutil."""
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:
        return {}
    frequency = psutil.cpu_freq()
    clock = {"cpu_clock_mhz": frequency.current} if frequency else {}
    return {"cpu_percent": psutil.cpu_percent(), **clock}
