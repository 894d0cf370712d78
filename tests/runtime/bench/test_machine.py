"""What is told of the machine: by a driver that lacks some of it, and of blocks however short."""

import mmap
import sys
import threading
import time
from types import SimpleNamespace

import jsonschema
import pytest

from mc_runtime.bench import machine
from mc_runtime.bench.ending import Ending
from mc_runtime.bench.machine import Monitor, describe_machine
from mc_runtime.bench.schemas import read_schema

TOLD = {
    "nvmlDeviceGetName": lambda gpu: f"GPU {gpu}",
    "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 300_000,
    "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=1000 + gpu, used=500 + gpu),
    "nvmlSystemGetDriverVersion": lambda: b"580.1",
    "nvmlDeviceGetClockInfo": lambda gpu, kind: 1500,
    "nvmlDeviceGetPowerUsage": lambda gpu: 150_000,
    "nvmlDeviceGetTemperature": lambda gpu, kind: 60,
    "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: 0x4 | 0x1,
}


class NvmlError(Exception):
    """Not supported."""


def refuse(*_):
    raise NvmlError


@pytest.fixture
def driver(monkeypatch):
    """NVML with two GPUs, that tells everything."""
    names = {"NVML_CLOCK_SM": 1, "NVML_TEMPERATURE_GPU": 0, "NVMLError": NvmlError}
    nvml = SimpleNamespace(**TOLD, **names, nvmlInit=lambda: None)
    nvml.nvmlDeviceGetHandleByIndex = lambda number: number if number < 2 else refuse()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def watch(device=0, seconds=0.0):
    with Monitor(device) as monitor:
        time.sleep(seconds)
    return monitor


def validate(part, report):
    schema = read_schema("latency")["properties"][part]
    definitions = {"$defs": read_schema("latency")["$defs"]}
    jsonschema.validate(report, schema | definitions, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("device", [0, 1])
def test_the_gpu_of_a_number_is_described_and_watched(driver, device):
    environment = describe_machine(None, device)
    assert environment["gpu"] == {
        "name": f"GPU {device}",
        "driver": "580.1",
        "power_limit_w": 300,
        "memory_bytes": 1000 + device,
    }
    monitor = watch(device)
    assert monitor.peaks["device"] == 500 + device
    assert monitor.series["gpu_power_w"] == [150] and monitor.throttling == {"power cap"}


def test_a_number_without_a_gpu_has_none(driver):
    assert describe_machine(None, 2)["gpu"] is None
    monitor = watch(2)
    assert "device" not in monitor.peaks and monitor.to_json()["throttling"] == []


@pytest.mark.parametrize("missing", [False, True], ids=["refused", "missing"])
@pytest.mark.parametrize("query", TOLD)
def test_what_a_driver_does_not_tell_is_null_and_the_rest_is_told(driver, query, missing):
    if missing:  # from an older binding
        delattr(driver, query)
    else:
        setattr(driver, query, refuse)
    environment, monitor = describe_machine(None), watch(seconds=0.15)
    gpu, series, told = environment["gpu"], monitor.series, monitor.to_json()
    validate("environment", environment)
    validate("telemetry", told)
    nulls = {name for name, value in gpu.items() if value is None}
    nulls |= {name for name, values in series.items() if None in values}
    if told["throttling"] is None:
        nulls.add("throttling")
    assert (
        nulls
        == {
            "nvmlDeviceGetName": {"name"},
            "nvmlDeviceGetEnforcedPowerLimit": {"power_limit_w"},
            "nvmlDeviceGetMemoryInfo": {"memory_bytes", "gpu_memory_bytes"},
            "nvmlSystemGetDriverVersion": {"driver"},
            "nvmlDeviceGetClockInfo": {"gpu_sm_clock_mhz"},
            "nvmlDeviceGetPowerUsage": {"gpu_power_w"},
            "nvmlDeviceGetTemperature": {"gpu_temperature_c"},
            "nvmlDeviceGetCurrentClocksEventReasons": {"throttling"},
        }[query]
    )
    assert monitor.peaks["anonymous"] > 0
    assert len({len(values) for values in series.values()}) == 1


def test_the_first_load_of_the_processor_is_none_that_psutil_makes_up(monkeypatch):
    asked = set()

    def load():
        first, thread = threading.get_ident() not in asked, threading.get_ident()
        asked.add(thread)
        return 0.0 if first else 50.0

    fake = SimpleNamespace(cpu_percent=load, cpu_freq=lambda: None)
    monkeypatch.setitem(sys.modules, "psutil", fake)
    monkeypatch.setattr(machine, "_SLOW_INTERVAL", 0.05)
    assert {*watch(seconds=0.3).series["cpu_percent"]} == {50}


def test_a_board_that_does_not_tell_its_clock_is_watched(monkeypatch):
    def refuse():
        raise NotImplementedError("can't find current frequency file")

    fake = SimpleNamespace(cpu_percent=lambda: 50.0, cpu_freq=refuse)
    monkeypatch.setitem(sys.modules, "psutil", fake)
    assert watch().series == {"cpu_percent": [50]}


def test_a_block_of_no_length_has_every_kind_of_peak(driver, monkeypatch):
    monkeypatch.setattr(machine, "_INTERVAL", 60)
    assert {"anonymous", "mapped", "total", "device"} <= {*watch().peaks}


def test_memory_is_that_of_the_block_and_its_peak_is_kept():
    before = watch()
    # Straight from the system: malloc may have as much left that is resident already.
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with Monitor() as during, mmap.mmap(-1, 2**26, flags=private) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        time.sleep(0.2)
    grown = during.peaks["anonymous"] - before.peaks["anonymous"]
    assert 0.9 * 2**26 < grown < 1.3 * 2**26
    assert during.series["cpu_percent"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyboardInterrupt(), "an interrupt"),
        (ValueError("x: expected 1, got 2."), "x: expected 1, got 2."),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_error_is_held_back_and_then_goes_on(error, reason):
    ending = Ending()
    with ending:
        raise error
    assert ending.reason == reason
    with pytest.raises(type(error)) as caught:
        ending.raise_again()
    assert caught.value is error


def test_what_came_to_its_end_has_nothing_to_raise():
    with Ending() as ending:
        pass
    assert ending.reason is None
    ending.raise_again()


def test_what_leaves_the_program_is_not_held_back():
    with pytest.raises(SystemExit), Ending():
        raise SystemExit
