"""TVM's runtime without its compiler: loads a compiled module, calls it, and keeps its threads apart.

TVM's thread settings and thread pools belong to the calling thread, and a pool is never freed or resized. So a
single-threaded engine runs in its caller's thread with parallelism off, where no pool is made; an engine of more
threads has one thread of its own that owns the pool, however many threads call it, and such threads are reused. Calls run
behind a gate, so that a process can fork and its children go on with the engine (`tilewright/forking.py`).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import tvm_ffi
from numpy.typing import NDArray

from tilewright.errors import InvalidArtifact
from tilewright.forking import Gate

T = TypeVar("T")
_CPU_DEVICE, _POOLED_ALLOCATOR = 1, 2
_SHARE_ALL_CORES = -3  # AffinityMode::kSpecifyThreadShareAllCore
_NO_INSTRUMENT_OP = 0
_POOL_LIMIT = 64 << 20  # bytes
_SPIN = "TVM_THREAD_POOL_SPIN_COUNT"
_SPINS = 5000
"""How often a pool's worker asks for work before it sleeps: 3 ms on Zen 4, longer than a call's serial stretches. TVM's own
300,000 would have every worker burn 160 ms of system time after each call."""


@cache
def _library() -> ctypes.CDLL:
    """libtvm_runtime, made visible to the modules loaded after it. `import tvm` would load the 250 MB compiler too."""
    files = importlib.metadata.files("apache-tvm") or []
    path = next(file for file in files if file.name == "libtvm_runtime.so")
    return ctypes.CDLL(str(Path(path.locate()).resolve()), ctypes.RTLD_GLOBAL)


_spellings: dict[Path, list[tuple[int, int]]] = {}


def _distinct(library: Path) -> str:
    """`library` spelled so that the dynamic linker looks at the file.

    It takes a path that it has loaded before for the same library, even where another file has taken that place since, as when
    an artifact is compiled anew; with another number of `./` it compares the files. Each spelling stands for one file.
    """
    status = library.stat()
    files = _spellings.setdefault(library, [])
    if (file := (status.st_dev, status.st_ino)) not in files:
        files.append(file)
    return f"{library.parent}/{'./' * files.index(file)}{library.name}"


class Executable:
    """The `main` function of a compiled module with its parameters bound; not safe for concurrent calls."""

    def __init__(self, library: Path, parameters: Sequence[NDArray[Any]]) -> None:
        """`parameters` are passed on without a copy and must be writable (DLPack) and aligned to 64 bytes."""
        _library()
        try:
            self._machine = tvm_ffi.load_module(_distinct(library))["vm_load_executable"]()
            self._machine["vm_initialization"](_CPU_DEVICE, 0, _POOLED_ALLOCATOR)
            self._main = self._machine["main"]
        except (OSError, RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise InvalidArtifact(f"{library} cannot be loaded ({reason}); compile the model again") from None
        self._parameters = tvm_ffi.convert(tuple(tvm_ffi.from_dlpack(array) for array in parameters))
        self._clear_pool = tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")
        self._pooled: set[int] = set()

    def __call__(self, *inputs: NDArray[np.int32]) -> list[NDArray[np.float32]]:
        """Run the module; `inputs` are contiguous and aligned to 64 bytes, the outputs are the caller's to keep."""
        try:
            results = self._main(*inputs, self._parameters)
        except (ValueError, TypeError, RuntimeError, AssertionError, IndexError) as error:
            # the VM counts the parameters and bounds its memory, kernels check their types
            raise InvalidArtifact(
                "the manifest lists other parameters than its module takes; compile the model again"
            ) from error
        outputs: list[Any] = [np.from_dlpack(result) for result in results]
        self._bound_pool(outputs)
        return outputs

    def _bound_pool(self, outputs: Sequence[NDArray[Any]]) -> None:
        """TVM keeps freed memory for requests of the very same size, so outputs of ever new lengths would pile up."""
        self._pooled.update(output.nbytes for output in outputs)
        if sum(self._pooled) > _POOL_LIMIT:
            self._clear_pool()  # frees only what nothing uses
            self._pooled.clear()

    @contextmanager
    def timed(self, record: Callable[[str, float], None]) -> Iterator[None]:
        """Within the block, `record(symbol, seconds)` is called after each function that the module calls."""
        started = 0.0

        def instrument(function: Any, symbol: str, before: bool, result: Any, *arguments: Any) -> int:
            nonlocal started
            if before:
                started = time.perf_counter()
            else:
                record(symbol, time.perf_counter() - started)
            return _NO_INSTRUMENT_OP

        self._machine["set_instrument"](instrument)
        try:
            yield
        finally:
            self._machine["set_instrument"](None)


class Threads(Protocol):
    """Where an engine's calls run, one at a time."""

    def run(self, job: Callable[[], T]) -> T:
        """Run `job` and return its result."""


class CallerThread:
    """Runs jobs in the calling thread, with TVM's parallelism off for their duration."""

    def __init__(self) -> None:
        # no registered function sets this without also making a thread pool
        library = _library()
        self._get = library["_ZN3tvm7runtime9threading14MaxConcurrencyEv"]
        self._set = library["_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"]
        self._gate = Gate()

    def run(self, job: Callable[[], T]) -> T:
        """Run `job`; the caller's own setting, which compiling and tuning use, is put back."""
        with self._gate:
            before = self._get()
            self._set(1)
            try:
                return job()
            finally:
                self._set(before)


class PoolThread:
    """Runs jobs in a thread that owns a TVM pool of `size` threads; in a forked child, in one of that process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._gate = Gate()
        self._process = 0
        self._executor: ThreadPoolExecutor

    def run(self, job: Callable[[], T]) -> T:
        """Run `job` after those already waiting."""
        with self._gate:
            if self._process != os.getpid():  # the thread of the parent did not survive the fork
                self._executor = ThreadPoolExecutor(1, "tilewright", initializer=self._make_pool)
                self._process = os.getpid()
            return self._executor.submit(job).result()

    def _make_pool(self) -> None:
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))]
        os.environ.setdefault(_SPIN, str(_SPINS))  # read when the process's first worker starts
        configure = tvm_ffi.get_global_func("runtime.config_threadpool")
        # the first call sizes the pool by its list of cores; the second lets every thread use every core, because TVM
        # would otherwise pin the pools of all engines and processes to the same first cores
        configure(_SHARE_ALL_CORES, self.size, (cores * self.size)[: self.size])
        configure(_SHARE_ALL_CORES, self.size, cores)


_idle: dict[int, list[PoolThread]] = {}


def acquire_threads(count: int) -> Threads:
    """Threads for one engine; give them back with `release_threads`."""
    if count == 1:
        return CallerThread()
    _library()
    try:
        return _idle[count].pop()
    except (KeyError, IndexError):
        return PoolThread(count)


def release_threads(threads: Threads) -> None:
    """Keep a pool for the next engine of its size, since TVM cannot free one."""
    if isinstance(threads, PoolThread):
        _idle.setdefault(threads.size, []).append(threads)
