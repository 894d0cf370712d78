"""The one kernel of our own: rows that move between arrays, in and out of the key cache.

`kernels.cu` has the code; it is compiled for the GPU that is there when the first engine is loaded.
"""

__all__ = ["RowMover", "compile_kernels"]

import ctypes
import math
from importlib.resources import files
from typing import Any

from mc_engines.device.arrays import DeviceArray
from mc_engines.device.cuda import Gpu, Stream
from mc_engines.errors import EngineError, require

_SOURCE = "kernels.cu"
_NAME = "move_rows"
_UNIT = 16  # bytes that a thread moves at once, as in the source
_THREADS = 256
_MOST_BLOCKS = 4096  # beyond it each thread moves several units


def compile_kernels(capability: int, nvrtc: Any = None) -> bytes:
    """Compile the kernel for a compute capability.

    Args:
        capability: As 86 for 8.6.
        nvrtc: `cuda.bindings.nvrtc`, or what stands in for it; imported if None.

    Returns:
        A cubin.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        EngineError: The compiler has no such target, or is not there.
    """
    nvrtc = nvrtc or require("cuda.bindings.nvrtc", "rtx")
    code = files("mc_engines.device").joinpath(_SOURCE).read_bytes()

    def call(function: str, *arguments: Any) -> Any:
        try:
            status, *values = getattr(nvrtc, function)(*arguments)
        except RuntimeError as error:  # cuda.bindings finds no library of NVRTC
            raise EngineError(
                f"{_SOURCE}: expected NVRTC, which compiles it, got none. "
                "Run: pip install 'nvidia-cuda-nvrtc>=13'"
            ) from error
        if int(status) != 0:
            reason = nvrtc.nvrtcGetErrorString(status)[1].decode()
            if function == "nvrtcCompileProgram":
                log: bytes = b" " * call("nvrtcGetProgramLogSize", arguments[0])
                call("nvrtcGetProgramLog", arguments[0], log)
                reason += f": {log.rstrip(bytes(1)).decode().strip()}"
            raise EngineError(
                f"{_SOURCE}: expected code for compute capability {capability}, got {reason}. "
                "Install an nvidia-cuda-nvrtc that knows this GPU."
            )
        return values[0] if values else None

    program = call("nvrtcCreateProgram", code, _SOURCE.encode(), 0, [], [])
    options = [f"--gpu-architecture=sm_{capability}".encode()]
    try:
        call("nvrtcCompileProgram", program, len(options), options)
        image: bytes = b" " * call("nvrtcGetCUBINSize", program)
        call("nvrtcGetCUBIN", program, image)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return image


class RowMover:
    """Copies rows of arrays on a GPU."""

    def __init__(self, gpu: Gpu, image: bytes) -> None:
        self._kernel = gpu.load_kernels(image, [_NAME])[_NAME]

    def move(
        self,
        stream: Stream,
        source: DeviceArray,
        target: DeviceArray,
        count: int,
        *,
        sources: DeviceArray | None = None,
        targets: DeviceArray | None = None,
    ) -> None:
        """Copy rows: the second last axis counts them, the ones before are planes.

        Args:
            stream: That copies.
            source: shape (..., rows, n).
            target: shape (..., rows, n), with the planes, n and dtype of `source`.
            count: Rows to copy.
            sources: Which rows of `source`, shape (count,), int32; None: the first ones.
            targets: Which rows of `target` they become; a negative one is left out; None: the
                first ones.

        Raises:
            ValueError: The arrays do not match, or a row is no multiple of 16 bytes.
        """
        *planes, source_rows, length = source.shape
        row_bytes = length * source.dtype.itemsize
        alike = (*target.shape[:-2], target.shape[-1], target.dtype)
        if alike != (*planes, length, source.dtype) or row_bytes % _UNIT:
            raise ValueError(
                f"rows: expected arrays of equal planes, columns and dtype, with rows of a "
                f"multiple of {_UNIT} bytes, got {source.dtype} {source.shape} and "
                f"{target.dtype} {target.shape}."
            )
        flat, units = math.prod(planes), row_bytes // _UNIT
        blocks = -(-flat * count * units // _THREADS)
        numbers = (flat, count, units)
        stream.launch(
            self._kernel,
            max(1, min(_MOST_BLOCKS, blocks)),
            _THREADS,
            *_pass_rows(source, sources, source_rows),
            *_pass_rows(target, targets, target.shape[-2]),
            *(ctypes.c_longlong(number) for number in numbers),
        )


def _pass_rows(array: DeviceArray, rows: DeviceArray | None, total: int) -> tuple[Any, ...]:
    """The three arguments of one side: elements, chosen rows or null, rows of a plane."""
    chosen = None if rows is None else rows.address
    return ctypes.c_void_p(array.address), ctypes.c_void_p(chosen), ctypes.c_longlong(total)
