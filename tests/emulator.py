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
from numpy.typing import NDArray

from tests.emulated_cpu import EmulationError, Machine
from tests.native import HARNESS, Any_, Arguments, Library, Pool, Tensor, aligned, harness_path
from tilewright.artifact import read_manifest
from tilewright.cpu import choose_level
from tilewright.engine import Engine
from tilewright.manifest import MANIFEST, WEIGHTS
from tilewright.runtime import Options, Runtime, check, library

Array = NDArray[Any]
MODEL_OF_LEVEL = {
    "avx2": "haswell",
    "avxvnni": "arrow_lake",
    "avx512": "skylake_x",
    "avx512vnni": "icelake_u",
    "amx": "sapphire_rapids",
}
"""ISA level to an emulated CPU that has it and nothing newer."""

_ANY_CPU = 2  # TILEWRIGHT_ANY_CPU
_Kernel = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Any_), ctypes.c_int32, ctypes.c_void_p)
_Symbol = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)


class Task(Protocol):
    """What `emulate` runs; picklable, and so is its result."""

    def run(self, machine: Machine) -> Any:
        """Do the task with the functions of compiled modules running on `machine`."""


def emulate(model: str, task: Task, timeout: float = 60.0) -> Any:
    """`task.run` on CPU `model` of `emulated_cpu.MODELS`, in a new process; raises EmulationError if that fails."""
    environment = os.environ | {
        HARNESS: str(harness_path()),
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
    """Calls of kernels of one library, each with its arrays.

    The result has, for each call, the arrays as it left them, or the text of the EmulationError that ended it.
    """

    library: Path
    calls: Sequence[tuple[str, Sequence[Array]]]

    def run(self, machine: Machine) -> list[list[Array] | str]:
        kernels, _pool = Library(self.library), _enter(machine)
        results: list[list[Array] | str] = []
        for name, values in self.calls:
            arrays = [aligned(value) for value in values]
            try:
                arguments = Arguments(arrays)
                _call(machine, name, kernels.kernel(name), arguments.address, len(arrays))
                results.append(arrays)
            except EmulationError as error:
                results.append(str(error))
        return results


def _enter(machine: Machine) -> Pool:
    """A pool of one thread, the machine's: the emulated CPU is one core.

    Its kernels must not allocate: a page that malloc touches for the first time, holding a lock, has Bochs wait for that lock.
    """
    pool = Pool(1)
    pool.reserve()
    machine.call(*pool.entering, 0, 0, 0)
    return pool


def _call(machine: Machine, name: str, kernel: int | None, arguments: int, count: int) -> None:
    """Run a kernel, by TVM's packed calling convention."""
    assert kernel is not None
    result = Any_()
    status = machine.call(kernel, 0, arguments, count, ctypes.addressof(result))
    if status & 0xFFFFFFFF:
        raise EmulationError(f"{name} returned an error: its arguments do not fit")


@dataclass(frozen=True)
class Trace:
    """One call of an artifact: its ISA level, outputs, and for each kernel call its name and stored activations after it."""

    isa: str
    outputs: Mapping[str, Array]
    kernels: Sequence[tuple[str, Sequence[Array]]]


class _Model(ctypes.Structure):
    """tilewright_model."""

    _fields_ = (
        ("manifest", ctypes.c_char_p),
        ("manifest_size", ctypes.c_size_t),
        ("weights", ctypes.c_void_p),
        ("weights_size", ctypes.c_size_t),
        ("symbol", _Symbol),
        ("context", ctypes.c_void_p),
        ("wordpiece", ctypes.c_void_p),
        ("wordpiece_size", ctypes.c_size_t),
    )


@dataclass(frozen=True)
class Encoder:
    """A call of an artifact with `inputs`: the engine runs natively, every kernel on the machine. -> Trace.

    features: what the CPU is said to have when the level is chosen, by default all that the artifact's levels need.
    """

    artifact: Path
    inputs: Mapping[str, Array]
    features: frozenset[str] | None = None

    def run(self, machine: Machine | None) -> Trace:
        """With no machine, kernels run natively too."""
        manifest = read_manifest(self.artifact)
        needed = frozenset(feature for level in manifest.levels for feature in level.features)
        level = choose_level(manifest.levels, needed if self.features is None else self.features)
        weights = aligned(np.fromfile(self.artifact / WEIGHTS, np.uint8))
        kernels = _TracedKernels(Library(self.artifact.resolve() / level.library), machine, weights)
        text = (self.artifact / MANIFEST).read_bytes()
        model = _Model(text, len(text), weights.ctypes.data, weights.nbytes, kernels.symbol, None)
        options, handle = Options(threads=1, flags=_ANY_CPU, level=level.name.encode()), ctypes.c_void_p()
        check(library().tilewright_open_model(ctypes.byref(model), ctypes.byref(options), ctypes.byref(handle)))
        loaded = Engine(manifest, level, Runtime(handle, kernels), None, num_threads=1)
        try:
            outputs = loaded(**self.inputs)
        finally:
            if kernels.failure is not None:
                raise kernels.failure
        return Trace(level.name, outputs, kernels.calls)


class _TracedKernels:
    """What finds the symbols of a library for the runtime, with every kernel replaced by one that leaves a trace."""

    def __init__(self, kernels: Library, machine: Machine | None, weights: Array) -> None:
        self.calls: list[tuple[str, list[Array]]] = []
        self.failure: Exception | None = None
        self.symbol = _Symbol(lambda _context, _level, name: self._find(name.decode()))
        self._kernels, self._machine = kernels, machine
        self._weights = range(weights.ctypes.data, weights.ctypes.data + weights.nbytes)
        self._replaced: dict[str, Any] = {}
        self._pool = None if machine is None else _enter(machine)

    def _find(self, symbol: str) -> int | None:
        address, name = self._kernels.address(symbol), symbol.removeprefix("__tvm_ffi_")
        if address is None or name == symbol:
            return address if self._machine is None else None  # kernels on the machine are connected to its own pool
        if name not in self._replaced:  # the runtime asks once for each call
            self._replaced[name] = self._traced(name, address)
        return ctypes.cast(self._replaced[name], ctypes.c_void_p).value

    def _traced(self, name: str, address: int) -> Any:
        native = ctypes.cast(address, _Kernel)

        def run(itself: int, arguments: Any, count: int, result: int) -> int:
            try:
                if self._machine is None:
                    native(itself, arguments, count, result)
                else:
                    _call(self._machine, name, address, ctypes.addressof(arguments.contents), count)
                arrays = [Tensor.from_address(arguments[place].value).array() for place in range(count)]
                own = [array.copy() for array in arrays if array.ctypes.data not in self._weights]
                self.calls.append((name, own))
            except Exception as error:  # nothing may leave a callback
                self.failure = error
                return -1
            return 0

        return _Kernel(run)
