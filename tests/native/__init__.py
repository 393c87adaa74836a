"""C programs of the tests, built with gcc from the runtime's sources; and kernels of a library called without an artifact."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
HERE, RUNTIME = Path(__file__).parent, Path(__file__).parents[2] / "runtime"
WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wshadow")
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
HARNESS = "TILEWRIGHT_TEST_HARNESS"
"""The environment variable that tells child processes where the harness is."""

_DL_TENSOR = 7  # TVMFFITypeIndex.kTVMFFIDLTensorPtr
_INTEGER = 1  # kTVMFFIInt
_KINDS = {"i": 0, "u": 1, "f": 2}  # DLDataTypeCode


def compile_c(output: Path, sources: Sequence[Path], *flags: str) -> Path:
    """Build `sources` with gcc, warnings being errors."""
    command = ["gcc", *WARNINGS, f"-I{RUNTIME}", *flags, "-o", str(output), *map(str, sources), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def runtime_sources() -> list[Path]:
    """Of all of the runtime."""
    return sorted(RUNTIME.glob("*.c"))


@cache
def harness_path() -> Path:
    """The harness, built on first use; removed at the end of the process that built it."""
    if HARNESS in os.environ:
        return Path(os.environ[HARNESS])
    directory = Path(tempfile.mkdtemp(prefix="tilewright-harness-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    sources = [HERE / "harness.c", *(RUNTIME / name for name in ("pool.c", "kernel.c", "error.c"))]
    return compile_c(directory / "harness.so", sources, "-O2", "-shared", "-fPIC")


@cache
def harness() -> ctypes.CDLL:
    """Its functions."""
    functions = ctypes.CDLL(str(harness_path()))
    for name, result, arguments in (
        ("connect", None, [ctypes.c_void_p]),
        ("pool", ctypes.c_void_p, [ctypes.c_int]),
        ("end", None, [ctypes.c_void_p]),
        ("reserve", None, [ctypes.c_void_p]),
        ("call", ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]),
    ):
        function = getattr(functions, f"harness_{name}")
        function.restype, function.argtypes = result, arguments
    return functions


class Library:
    """A library of compiled kernels."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        harness().harness_connect(self._library._handle)

    def address(self, symbol: str) -> int | None:
        """Of a function or variable, None if there is none."""
        try:
            return ctypes.addressof(ctypes.c_char.in_dll(self._library, symbol))
        except ValueError:
            return None

    def kernel(self, name: str) -> int | None:
        """The address of kernel `name`."""
        return self.address(f"__tvm_ffi_{name}")


class Pool:
    """A pool of the runtime of `size` threads."""

    def __init__(self, size: int) -> None:
        self._pool = harness().harness_pool(size)
        assert self._pool

    def reserve(self) -> None:
        """Allocate scratch memory for the first thread beforehand."""
        harness().harness_reserve(self._pool)

    @property
    def entering(self) -> tuple[int, int]:
        """The function and its argument by which a thread, such as an emulated one, begins to run kernels in this pool."""
        address = ctypes.cast(harness().harness_enter, ctypes.c_void_p).value
        assert address is not None
        return address, self._pool

    def call(self, library: Library, kernel: str, *arguments: Array | int) -> None:
        """Call a kernel with arrays, which it may write to, and integers."""
        packed = Arguments(arguments)
        assert harness().harness_call(self._pool, library.kernel(kernel), packed.address, len(arguments)) == 0

    def __del__(self) -> None:
        harness().harness_end(self._pool)


class Arguments:
    """Arrays and integers by TVM's packed calling convention."""

    def __init__(self, values: Sequence[Array | int]) -> None:
        self._tensors = [Tensor.of(value) for value in values if isinstance(value, np.ndarray)]
        tensors = iter(self._tensors)
        self._any = (Any_ * len(values))(
            *(
                Any_(_DL_TENSOR, 0, ctypes.addressof(next(tensors)))
                if isinstance(value, np.ndarray)
                else Any_(_INTEGER, 0, value)
                for value in values
            )
        )
        self.address = ctypes.addressof(self._any)


class Any_(ctypes.Structure):
    """TVMFFIAny (tvm/ffi/c_api.h)."""

    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_int32), ("value", ctypes.c_uint64))


class Tensor(ctypes.Structure):
    """DLTensor (dlpack.h)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )

    @classmethod
    def of(cls, array: Array) -> Tensor:
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        strides = (ctypes.c_int64 * array.ndim)(*(stride // array.itemsize for stride in array.strides))
        code, bits = _KINDS[array.dtype.kind], array.itemsize * 8
        return cls(array.ctypes.data, (1, 0), array.ndim, code, bits, 1, shape, strides, 0)

    def array(self) -> Array:
        """A view of the tensor, which must be contiguous."""
        kind = "iuf"[self.code]
        shape = tuple(self.shape[: self.ndim])
        memory = (ctypes.c_uint8 * (int(np.prod(shape)) * self.bits // 8)).from_address(self.data)
        return np.frombuffer(memory, f"{kind}{self.bits // 8}").reshape(shape)


def aligned(value: Array) -> Array:
    """A copy at a multiple of 64 bytes, where the runtime's own arrays are."""
    memory = np.zeros(value.nbytes + 64, np.uint8)
    skip = -memory.ctypes.data % 64
    copy = memory[skip : skip + value.nbytes].view(value.dtype).reshape(value.shape)
    copy[...] = value
    return copy
