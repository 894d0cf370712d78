"""Memory, streams, kernel and runner of a GPU, with a stand-in for the driver; nothing executes."""

import ctypes
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from shutil import which
from threading import Thread

import numpy as np
import pytest
from stand_in_driver import CUresult, StandInDriver
from stand_in_tensorrt import StandInLibrary, make_plan

from mc_engines.building.bounds import VideoLimits, bound_symbols, bound_tensor
from mc_engines.building.library import Library
from mc_engines.bundle import Bundle
from mc_engines.device import arrays as device_arrays
from mc_engines.device.arrays import Transfers, allocate_array
from mc_engines.device.cuda import Gpu, open_gpu
from mc_engines.device.device import Device, Plan
from mc_engines.device.engine import DeviceEngine
from mc_engines.device.kernels import RowMover, compile_kernels
from mc_engines.device.runner import DeviceRunner
from mc_engines.device.weights import StreamedWeights
from mc_engines.errors import EngineError
from mc_engines.onnxruntime_runner import open_runner
from mc_engines.specs import TensorSpec

TARGETS = 75, 80, 86, 87, 89, 90, 110, 120, 121
FLOAT = np.dtype(np.float32)


@pytest.fixture
def driver() -> StandInDriver:
    return StandInDriver()


@pytest.fixture
def gpu(driver) -> Gpu:
    return Gpu(driver)


@pytest.fixture
def transfers(gpu) -> Transfers:
    return Transfers(gpu.open_stream(), size=1024)


@pytest.fixture(scope="module")
def move_rows_on_cpu(tmp_path_factory):
    """The kernel's own source as C++, one thread after the other."""
    compiler = which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler to run the kernel's source with")
    folder = tmp_path_factory.mktemp("kernel")
    source = files("mc_engines.device").joinpath("kernels.cu").read_text()
    (folder / "kernel.cpp").write_text(
        "struct Dim { unsigned x; };\n"
        "static Dim gridDim, blockDim, blockIdx, threadIdx;\n"
        "#define __global__\n#define __device__\n"
        f"{source}\n"
        'extern "C" void run(unsigned blocks, unsigned threads, const Unit* a, const int* b,\n'
        "                    long long c, Unit* d, const int* e, long long f, long long g,\n"
        "                    long long h, long long i) {\n"
        "  gridDim.x = blocks; blockDim.x = threads;\n"
        "  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)\n"
        "    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)\n"
        "      move_rows(a, b, c, d, e, f, g, h, i);\n"
        "}\n"
    )
    library = folder / "kernel.so"
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-o", library, folder / "kernel.cpp"]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library)).run


@pytest.mark.parametrize(("planes", "length", "blocks"), [(1, 4, 1), (3, 64, 2), (2, 20, 7)])
@pytest.mark.parametrize("chosen", ["sources", "targets", "both", "neither"])
def test_the_kernels_own_source_moves_rows(move_rows_on_cpu, planes, length, blocks, chosen):
    rng = np.random.default_rng(0)
    source = rng.standard_normal((planes, 30, length)).astype(np.float32)
    target = rng.standard_normal((planes, 40, length)).astype(np.float32)
    count = 11
    froms = rng.permutation(30)[:count].astype(np.int32)
    tos = rng.permutation(40)[:count].astype(np.int32)
    tos[[3, 10]] = -1
    froms[[1, 10]] = -1
    use_froms, use_tos = chosen in ("sources", "both"), chosen in ("targets", "both")
    expected = target.copy()
    for row in range(count):
        get, put = froms[row] if use_froms else row, tos[row] if use_tos else row
        if put >= 0 and get >= 0:
            expected[:, put] = source[:, get]
    move_rows_on_cpu(
        *(blocks, 8, source.ctypes.data_as(ctypes.c_void_p)),
        froms.ctypes.data_as(ctypes.c_void_p) if use_froms else None,
        *(ctypes.c_longlong(30), target.ctypes.data_as(ctypes.c_void_p)),
        tos.ctypes.data_as(ctypes.c_void_p) if use_tos else None,
        *(ctypes.c_longlong(number) for number in (40, planes, count, length // 4)),
    )
    np.testing.assert_array_equal(target, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_compiles_for_every_target(target):
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (extra rtx)")
    image = compile_kernels(target)
    assert image[:4] == b"\x7fELF" and b"move_rows" in image


def test_a_target_that_the_compiler_does_not_know_is_an_error():
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (extra rtx)")
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    programs = []

    class Watched:
        def __getattr__(self, name):
            return getattr(nvrtc, name)

        def nvrtcDestroyProgram(self, program):
            programs.append(program)
            return nvrtc.nvrtcDestroyProgram(program)

    message = r"capability 12, got .*invalid value for --gpu-architecture.* Install an nvidia-cuda"
    with pytest.raises(EngineError, match=message):
        compile_kernels(12, Watched())
    assert len(programs) == 1


def test_without_the_compiler_it_is_said_how_to_install_it():
    """cuda.bindings raises a RuntimeError when it does not find the library."""

    class Gone:
        def __getattr__(self, name):
            raise RuntimeError("Failure finding libnvrtc.so")

    with pytest.raises(EngineError) as error:
        compile_kernels(86, Gone())
    assert str(error.value) == (
        "kernels.cu: expected NVRTC, which compiles it, got none. "
        "Run: pip install 'nvidia-cuda-nvrtc>=13'"
    )


def test_rows_that_are_no_multiple_of_16_bytes_are_refused(gpu):
    mover = RowMover(gpu, b"cubin 86")
    array = allocate_array(gpu, (4, 3), FLOAT, "a", "")
    with pytest.raises(ValueError, match=r"rows: expected arrays of equal planes"):
        mover.move(gpu.open_stream(), array, array, 2)


def test_a_kernel_of_another_gpu_is_an_error(gpu):
    with pytest.raises(EngineError, match="expected success, got CUDA_ERROR_NO_BINARY_FOR_GPU"):
        RowMover(gpu, b"cubin 89")


def test_arrays_come_back_as_they_went(gpu, transfers):
    arrays = [np.arange(size, dtype=np.float32) for size in (0, 1, 100, 255, 3000)]
    placed = []
    for array in arrays:
        target = allocate_array(gpu, (3000,), FLOAT, "room", "")
        placed.append(transfers.upload(array, target))
        array += 0  # the caller's own from here on
    for array, back in zip(arrays, transfers.fetch(*placed), strict=True):
        np.testing.assert_array_equal(back, array)


def test_an_array_may_change_right_after_its_upload(gpu, transfers):
    array, target = np.ones(8, np.float32), allocate_array(gpu, (8,), FLOAT, "room", "")
    transfers.upload(array, target)
    array[:] = 2
    np.testing.assert_array_equal(transfers.fetch(target)[0], np.ones(8))


def test_what_a_pass_copies_fits_the_second_time(driver, gpu, transfers):
    arrays = [np.arange(100, dtype=np.float32) + number for number in range(6)]
    rooms = [allocate_array(gpu, (100,), FLOAT, "room", "") for _ in arrays]
    waits = []
    for _ in range(2):
        before = driver.waits
        for array, room in zip(arrays, rooms, strict=True):
            transfers.upload(array, room)
        np.testing.assert_array_equal(transfers.fetch(*rooms), arrays)
        waits.append(driver.waits - before)
    assert waits[0] > waits[1] == 1


def test_many_copies_do_not_pin_as_much_memory(gpu, transfers, monkeypatch):
    monkeypatch.setattr(device_arrays, "_MOST_PINNED", 4096)
    room = allocate_array(gpu, (3000,), FLOAT, "room", "")
    for size in (*[100] * 50, 3000):
        transfers.upload(np.ones(size, np.float32), room)
        assert len(transfers._pinned.bytes) <= max(4096, 4 * size)


def test_memory_is_given_back(driver, gpu):
    before = driver.cuMemGetInfo()
    array = allocate_array(gpu, (1000,), FLOAT, "room", "")
    assert driver.cuMemGetInfo() != before
    del array
    assert driver.cuMemGetInfo() == before


def test_another_gpu_stays_current_when_memory_is_given_back():
    driver = StandInDriver(devices=2)
    first, before = Gpu(driver), driver.cuMemGetInfo()
    memory = first.allocate(1000, "room", "")
    Gpu(driver, 1)
    del memory
    assert driver.contexts == ["context 1"]
    assert driver.cuMemGetInfo() == before


def test_memory_is_given_back_by_a_thread_that_never_used_the_gpu(driver, gpu):
    before, memory = driver.cuMemGetInfo(), [gpu.allocate(1000, "room", "")]
    thread = Thread(target=memory.clear)
    thread.start()
    thread.join()
    assert driver.cuMemGetInfo() == before


def test_nothing_is_raised_by_what_is_forgotten_after_a_failure(driver, gpu, monkeypatch):
    raised = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    memory = gpu.allocate(1000, "room", "")
    driver.sticky = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(EngineError, match="ILLEGAL_ADDRESS"):
        gpu.use()
    del memory  # an exception of a finalizer would go to the hook
    assert raised == []


def test_too_little_memory_names_the_buffer_what_is_free_and_what_helps():
    gpu = Gpu(StandInDriver(memory=2_000_000))
    message = (
        r"GPU memory: expected 4\.0 MB for the keys, got 2\.0 MB free of 2\. Pass --max-vram\."
    )
    with pytest.raises(EngineError, match=message):
        gpu.allocate(4_000_000, "the keys", "Pass --max-vram.")


def test_a_stream_is_not_recorded_any_more_after_a_failure(driver, gpu):
    stream = gpu.open_stream()

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        stream.capture(fail)
    stream.synchronise()
    assert driver.graphs == 0


def test_a_recording_that_cannot_be_launched_is_given_up(driver, gpu, monkeypatch):
    refused = CUresult.CUDA_ERROR_INVALID_VALUE, None
    monkeypatch.setattr(driver, "cuGraphInstantiate", lambda graph, flags: refused)
    stream = gpu.open_stream()
    with pytest.raises(EngineError, match=r"cuGraphInstantiate: expected success, got .*INVALID"):
        stream.capture(lambda: None)
    stream.synchronise()
    assert driver.graphs == 0


def test_a_layer_that_failed_on_its_way_is_fetched_again(monkeypatch):
    driver = StandInDriver(eager=True)
    specs, stream = [TensorSpec("w", "float32", (4,))], Gpu(driver).open_stream()
    load = [{"w": np.full(4, layer, np.float32)} for layer in range(3)].__getitem__
    weights = StreamedWeights(stream, specs, 3, load, "block")
    for layer in (0, 1):  # of which the second fetches layer 2 over layer 0
        weights.use(layer)
        weights.done(layer)
    with monkeypatch.context() as context:
        context.setattr(driver, "cuEventRecord", lambda *_: (CUresult.CUDA_ERROR_INVALID_VALUE,))
        with pytest.raises(EngineError, match="cuEventRecord"):
            weights.use(0)
    for layer in (2, 1):
        (value,) = Transfers(stream).fetch(weights.use(layer)["w"])
        np.testing.assert_array_equal(value, np.full(4, layer))
        weights.done(layer)


def test_what_is_forgotten_while_a_stream_is_recorded_is_given_back_afterwards(driver, gpu):
    stream, before = gpu.open_stream(), driver.cuMemGetInfo()
    forgotten = [gpu.allocate(1000, "room", ""), gpu.allocate(1000, "room", "")]

    def forget():
        forgotten.clear()
        assert driver.cuMemGetInfo() != before

    graph = stream.capture(forget)
    assert driver.cuMemGetInfo() == before
    stream.replay(graph)
    stream.synchronise()


def test_no_driver_is_an_error_that_says_what_to_do():
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (extra rtx)")
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver")
    with pytest.raises(EngineError, match=r"GPU: expected an NVIDIA driver, got none\. Install it"):
        open_gpu()


def test_a_gpu_that_is_not_there_is_an_error(driver):
    with pytest.raises(EngineError, match="GPU: expected number 1, got 1 in all"):
        Gpu(driver, 1)


class Engines:
    """Engines of the tiny bundle for the stand-in."""

    def __init__(self, driver: StandInDriver, folder: Path) -> None:
        self.bundle = Bundle.open(folder)
        self.library = Library("tensorrt-rtx", StandInLibrary(driver))
        self.gpu = Gpu(driver)

    def plan(self, name: str, **changes) -> bytes:
        graph = self.bundle.graph(name, "fp32")
        symbols = bound_symbols(self.bundle.manifest.config, VideoLimits(32, 32, 97, 5))
        specs = (*graph.inputs, *graph.weights)
        profile = {spec.name: bound_tensor(spec, symbols) for spec in specs}
        return make_plan(self.bundle.graph_path(name, "fp32"), [profile], **changes)

    def load(self, name: str, plan: bytes) -> DeviceEngine:
        return DeviceEngine(self.library, self.bundle.graph(name, "fp32"), plan, f"{name}.engine")

    def runner(self, name: str, *resident: str) -> DeviceRunner:
        plan = Plan(self.bundle.graph(name, "fp32"), self.plan(name), f"{name}.engine")
        device = Device(self.gpu, self.library, self.bundle, "fp32", {name: plan}, b"cubin 86")
        return DeviceRunner(device, name, frozenset(resident))


@pytest.fixture
def engines(driver, tiny_bundle) -> Engines:
    return Engines(driver, tiny_bundle)


def test_a_runner_gives_what_onnx_runtime_gives(engines):
    rng = np.random.default_rng(0)
    for rows in (5, 20, 1):
        patches = rng.standard_normal((1, rows, 64)).astype(np.float32)
        given = engines.runner("embed").run({"patches": patches})
        expected = open_runner(engines.bundle, "embed").run({"patches": patches})
        np.testing.assert_allclose(given["x"], expected["x"], atol=1e-6)


def test_states_of_the_vae_stay_on_the_gpu(engines):
    latents = np.random.default_rng(0).standard_normal((2, 1, 16, 1, 4, 4)).astype(np.float32)
    first, later = (f"vae_decoder_{part}" for part in ("first", "next"))
    names = [spec.name for spec in engines.bundle.graph(first, "fp32").outputs]
    states = [name for name in names if name.startswith("next_state")]

    def decode(runners):
        given = runners[0].run({"latents": latents[0]})
        kept = {name.removeprefix("next_"): given[name] for name in states}
        return runners[1].run({"latents": latents[1], **kept}), kept

    frames, kept = decode([engines.runner(name, *states) for name in (first, later)])
    expected, _ = decode([open_runner(engines.bundle, name) for name in (first, later)])
    assert all(not isinstance(state, np.ndarray) for state in kept.values())
    np.testing.assert_allclose(frames["frames"], expected["frames"], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capability": 89}, "the plan is of 1.7.1.116 for SM89"),
        ({"version": "1.6.0.1"}, "the plan is of 1.6.0.1 for SM86"),
    ],
)
def test_an_engine_of_another_gpu_or_version_is_refused(engines, changes, reason):
    plan = engines.plan("embed", **changes)
    with pytest.raises(EngineError, match=rf"embed\.engine: expected .* got: {reason}\. Build it"):
        engines.load("embed", plan)


def test_a_truncated_engine_is_refused(engines):
    with pytest.raises(EngineError, match="got: the plan is not one"):
        engines.load("embed", engines.plan("embed")[:-20])


def test_an_engine_of_another_component_is_refused(engines):
    with pytest.raises(EngineError, match=r"embed\.engine: expected the tensors .* got"):
        engines.load("embed", engines.plan("head"))


def test_a_shape_outside_the_profile_is_refused(engines):
    patches = np.zeros((1, 5000, 64), np.float32)
    message = r"'patches': expected a shape from \(1, 1, 64\) to .*, got \(1, 5000, 64\)"
    with pytest.raises(EngineError, match=message):
        engines.runner("embed").run({"patches": patches})


def test_a_wrong_name_or_dtype_is_refused(engines):
    runner = engines.runner("embed")
    with pytest.raises(ValueError, match=r"expected inputs \['patches'\], got \['x'\]"):
        runner.run({"x": np.zeros((1, 4, 64), np.float32)})
    with pytest.raises(ValueError, match="'patches': expected float32"):
        runner.run({"patches": np.zeros((1, 4, 64), np.int64)})


def test_what_was_compiled_for_a_gpu_is_kept(engines):
    graph, plan = engines.bundle.graph("embed", "fp32"), engines.plan("embed")
    assert engines.load("embed", plan).read_cache() == b"compiled"
    engine = DeviceEngine(engines.library, graph, plan, "embed.engine", b"from before")
    assert engine.read_cache() == b"from before"
