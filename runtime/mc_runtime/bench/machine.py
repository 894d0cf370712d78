"""The machine under a measurement: what it is, and what it did meanwhile.

Neighbours: `latency_report` and `policy_report` put `describe_machine` beside the numbers; a
`Monitor` samples while `sweep` and `generation` run. psutil and nvidia-ml-py belong to the extra
`bench`; without the latter, or without a GPU, nothing is said of one.
"""

__all__ = ["Monitor", "describe_machine", "read_resident"]

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


def describe_machine(threads: int | None, device: int = 0) -> dict[str, Any]:
    """Describe processor, memory, GPU and versions.

    Args:
        threads: Of one operator; None where ONNX Runtime takes every physical core.
        device: Number of the GPU.

    Returns:
        JSON-ready values; `gpu` is None where there is none, or no driver, and so is what the
        driver does not tell of it.
    """
    gpu = _Gpu.open(device)
    return {
        "cpu": _cpu_name(),
        "logical_cores": os.cpu_count() or 1,
        "threads": threads,
        "platform": platform.platform(),
        "versions": list_versions(),
        "gpu": None if gpu is None else gpu.describe(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class _Gpu:
    """A GPU as NVML sees it. What a board cannot tell, as Jetson cannot much of it, is None."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, number: int) -> "_Gpu | None":
        """Open it by its number; None where the library, the driver or the GPU is missing."""
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None
        try:
            nvml.nvmlInit()
            return cls(nvml, nvml.nvmlDeviceGetHandleByIndex(number))
        except nvml.NVMLError:
            return None

    def describe(self) -> dict[str, Any]:
        """Its name, driver, power limit and memory."""
        return {
            "name": _text(self._ask("nvmlDeviceGetName")),
            "driver": _text(self._query("nvmlSystemGetDriverVersion")),
            "power_limit_w": _scale(self._ask("nvmlDeviceGetEnforcedPowerLimit")),
            "memory_bytes": getattr(self._ask("nvmlDeviceGetMemoryInfo"), "total", None),
        }

    def sample(self) -> dict[str, float | None]:
        """Clocks, power, temperature and memory now."""
        return {
            "gpu_sm_clock_mhz": self._ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            "gpu_power_w": _scale(self._ask("nvmlDeviceGetPowerUsage")),
            "gpu_temperature_c": self._ask("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
            "gpu_memory_bytes": self.memory(),
        }

    def memory(self) -> int | None:
        """Bytes in use now, by every program."""
        used: int | None = getattr(self._ask("nvmlDeviceGetMemoryInfo"), "used", None)
        return used

    def throttling(self) -> set[str] | None:
        """Why the clocks are lower now than asked for."""
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            return None
        return {reason for bit, reason in _THROTTLING.items() if bits & bit}

    def _ask(self, query: str, *constants: str) -> Any:
        """Query this GPU; None where this version of NVML or the board has no such thing."""
        return self._query(query, self._handle, *(getattr(self._nvml, name) for name in constants))

    def _query(self, query: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, query)(*arguments)
        except (self._nvml.NVMLError, AttributeError):
            return None


def _scale(value: float | None) -> float | None:
    """Thousandths as ones."""
    return None if value is None else value / 1e3


def _text(value: str | bytes | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


class Monitor:
    """Samples the machine in a thread of its own while a `with` block runs.

    Args:
        device: Number of the GPU.

    Attributes:
        peaks: Largest resident bytes of this process, by kind: anonymous, mapped, shared, and
            `total` of all three at one moment, where /proc tells; `device` is what is in use of a
            GPU's memory, by every program.
        series: Samples by name, every half second; None where the GPU did not tell.
        throttling: Why a GPU's clocks were lower than asked for; None where it never told.
    """

    def __init__(self, device: int = 0) -> None:
        self.peaks: dict[str, int] = {}
        self.series: dict[str, list[float | None]] = {}
        self.throttling: set[str] | None = set()
        self._device = device
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        gpu = _Gpu.open(self._device)
        if gpu is not None:
            self.throttling = None
        # psutil tells the load since the same thread asked before, and at first 0.
        _sample_cpu()
        due, asked = time.monotonic(), time.monotonic()
        while not self._stop.wait(_INTERVAL):
            self._take_memory(gpu)
            if time.monotonic() >= due:
                due, asked = due + _SLOW_INTERVAL, time.monotonic()
                self._take_rest(gpu)
        self._take_memory(gpu)
        if not self.series or time.monotonic() - asked >= _INTERVAL:
            self._take_rest(gpu)

    def _take_memory(self, gpu: _Gpu | None) -> None:
        now = read_resident()
        if now:
            now["total"] = sum(now.values())
        if gpu is not None and (used := gpu.memory()) is not None:
            now["device"] = used
        for kind, amount in now.items():
            self.peaks[kind] = max(amount, self.peaks.get(kind, 0))

    def _take_rest(self, gpu: _Gpu | None) -> None:
        for name, value in (_sample_cpu() | (gpu.sample() if gpu else {})).items():
            self.series.setdefault(name, []).append(value)
        if gpu is not None and (reasons := gpu.throttling()) is not None:
            self.throttling = reasons | (self.throttling or set())

    def to_json(self) -> dict[str, Any]:
        """What was seen, ready for JSON."""
        return {
            "interval_s": _SLOW_INTERVAL,
            "samples": self.series,
            "throttling": None if self.throttling is None else sorted(self.throttling),
        }


def read_resident() -> dict[str, int]:
    """Read what this process holds in memory now.

    Returns:
        Bytes by kind: anonymous, mapped and shared; nothing where the system does not tell.
    """
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


def _sample_cpu() -> dict[str, float | None]:
    """Load and clock of the processor; nothing without psutil."""
    try:
        psutil = importlib.import_module("psutil")
    except ImportError:
        return {}
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError):  # a board whose kernel does not tell
        frequency = None
    clock = {"cpu_clock_mhz": frequency.current} if frequency else {}
    return {"cpu_percent": psutil.cpu_percent(), **clock}
