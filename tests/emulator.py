"""Runs compiled kernels and whole artifacts on an emulated CPU, each task in a process of its own.

    emulate("icelake_u", Kernels(library, [("main", [x, weight, out])]))  # -> [[x, weight, out]], as the CPU left them

The emulator says nothing about speed. A CPU without an instruction reports it as #UD, so a task that passes on a model
also proves that its code needs no newer CPU.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tvm_ffi
from numpy.typing import NDArray

from tests.emulated_cpu import EmulationError, Machine
from tilewright import engine
from tilewright.artifact import read_manifest
from tilewright.runtime import CallerThread

Array = NDArray[Any]
MODEL_OF_LEVEL = {
    "avx2": "haswell",
    "avxvnni": "arrow_lake",
    "avx512": "skylake_x",
    "avx512vnni": "icelake_u",
    "amx": "sapphire_rapids",
}
"""ISA level to an emulated CPU that has it and nothing newer."""

_DL_TENSOR = 7  # TVMFFITypeIndex.kTVMFFIDLTensorPtr
_KINDS = {"i": 0, "u": 1, "f": 2}  # DLDataTypeCode
_SKIP_RUN = 1  # VMInstrumentReturnKind: the VM does not make the call


class Task(Protocol):
    """What `emulate` runs; picklable, and so is its result."""

    def run(self, machine: Machine) -> Any:
        """Do the task with the functions of compiled modules running on `machine`."""


def emulate(model: str, task: Task, timeout: float = 60.0) -> Any:
    """`task.run` on CPU `model` of `emulated_cpu.MODELS`, in a new process; raises EmulationError if that fails."""
    environment = os.environ | {
        "TVM_NUM_THREADS": "1",  # parallel loops run inline: the emulated CPU is one core
        "LD_BIND_NOW": "1",  # ld.so saves registers with instructions of the real CPU when it binds a function on first call
        # the C library's memcpy and the like were chosen for the real CPU when it was loaded
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD,-AVX512ER",
    }
    with tempfile.TemporaryDirectory() as directory:
        message = Path(directory, "message")
        message.write_bytes(pickle.dumps((model, task)))
        command = [sys.executable, "-c", "from tests.emulator import serve; serve()", str(message)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise EmulationError(f"{type(task).__name__} on {model} took more than {timeout:g} s") from None
        if done.returncode:
            raise EmulationError(
                f"{type(task).__name__} on {model} ended with status {done.returncode}:\n{done.stderr[-4000:]}"
            )
        return pickle.loads(message.read_bytes())


def serve() -> None:
    """The other end of `emulate`."""
    status = 1
    try:
        message = Path(sys.argv[1])
        model, task = pickle.loads(message.read_bytes())
        message.write_bytes(pickle.dumps(task.run(Machine(model))))
        status = 0
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(status)  # an orderly end would wait for the thread that the emulated CPU borrows


@dataclass(frozen=True)
class Kernels:
    """Calls of functions of one TVM library, each with its arrays.

    The result has, for each call, the arrays as it left them, or the text of the EmulationError that ended it.
    """

    library: Path
    calls: Sequence[tuple[str, Sequence[Array]]]

    def run(self, machine: Machine) -> list[list[Array] | str]:
        library = _Library(self.library)
        results: list[list[Array] | str] = []
        for name, values in self.calls:
            arrays = [_aligned(value) for value in values]
            try:
                library.call(machine, name, arrays)
                results.append(arrays)
            except EmulationError as error:
                results.append(str(error))
        return results


@dataclass(frozen=True)
class Trace:
    """One call of an artifact: its ISA level, outputs, and for each kernel call its name and stored activations after it."""

    isa: str
    outputs: Mapping[str, Array]
    kernels: Sequence[tuple[str, Sequence[Array]]]


@dataclass(frozen=True)
class Encoder:
    """A call of an artifact with `inputs`: the engine and TVM's VM run natively, every kernel on the machine. -> Trace.

    features: what the engine is told that the CPU has, by default all that the artifact's levels need.
    """

    artifact: Path
    inputs: Mapping[str, Array]
    features: frozenset[str] | None = None

    def run(self, machine: Machine | None) -> Trace:
        """With no machine, kernels run natively too."""
        needed = frozenset(f for level in read_manifest(self.artifact).levels for f in level.features)
        told = needed if self.features is None else self.features
        known, engine.cpu_features = engine.cpu_features, lambda: told
        try:
            loaded = engine.load(self.artifact, num_threads=1)
        finally:
            engine.cpu_features = known
        executable = loaded._executable
        library = _Library(self.artifact.resolve() / loaded.level.library)
        weights = {np.from_dlpack(parameter).ctypes.data for parameter in executable._parameters}
        kernels: list[tuple[str, list[Array]]] = []

        def instrument(function: Any, symbol: str, before: bool, result: Any, *arguments: Any) -> int:
            if before == (machine is None) or not library.has(symbol):
                return 0
            arrays = [np.from_dlpack(argument) for argument in arguments]
            if machine is not None:
                library.call(machine, symbol, arrays)
            kernels.append((symbol, [array.copy() for array in arrays if array.ctypes.data not in weights]))
            return _SKIP_RUN

        executable._machine["set_instrument"](instrument)
        outputs = loaded(**self.inputs)
        executable._machine["set_instrument"](None)
        return Trace(loaded.level.name, outputs, kernels)


class _Library:
    """A TVM library whose functions run on a machine."""

    def __init__(self, path: Path) -> None:
        CallerThread()  # loads TVM's runtime
        self._module = tvm_ffi.load_module(path)  # which also sets the library's pointers to runtime functions
        self._library = ctypes.CDLL(str(path))

    def has(self, name: str) -> bool:
        return hasattr(self._library, f"__tvm_ffi_{name}")

    def call(self, machine: Machine, name: str, arrays: Sequence[Array]) -> None:
        """Call function `name`, by TVM's packed calling convention."""
        address = ctypes.cast(getattr(self._library, f"__tvm_ffi_{name}"), ctypes.c_void_p).value
        assert address is not None
        tensors = [_Tensor.of(array) for array in arrays]
        arguments = (_Any * len(arrays))(*(_Any(_DL_TENSOR, 0, ctypes.addressof(tensor)) for tensor in tensors))
        result = _Any()
        status = machine.call(address, 0, ctypes.addressof(arguments), len(arrays), ctypes.addressof(result))
        if status & 0xFFFFFFFF:
            raise EmulationError(f"{name} returned an error: its arguments do not fit")


class _Any(ctypes.Structure):
    """TVMFFIAny (tvm/ffi/c_api.h)."""

    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_int32), ("value", ctypes.c_uint64))


class _Tensor(ctypes.Structure):
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
    def of(cls, array: Array) -> _Tensor:
        shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        strides = (ctypes.c_int64 * array.ndim)(*(stride // array.itemsize for stride in array.strides))
        code, bits = _KINDS[array.dtype.kind], array.itemsize * 8
        return cls(array.ctypes.data, (1, 0), array.ndim, code, bits, 1, shape, strides, 0)


def _aligned(value: Array) -> Array:
    """A copy at a multiple of 64 bytes, where TVM's own arrays are."""
    memory = np.zeros(value.nbytes + 64, np.uint8)
    skip = -memory.ctypes.data % 64
    copy = memory[skip : skip + value.nbytes].view(value.dtype).reshape(value.shape)
    copy[...] = value
    return copy
