"""The C runtime (`runtime/tilewright.h`), by ctypes: opens artifacts and runs them. Nothing here is specific to a model.

Calls run behind a gate, so that a process can fork and its children go on with the engine (`tilewright/forking.py`). While the
library computes, other Python threads run.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.errors import ArtifactTargetMismatch, InvalidArtifact, InvalidInput, TilewrightError
from tilewright.forking import Gate

LIBRARY = Path(__file__).parent / "lib" / "libtilewright.so"
_ERRORS: dict[int, type[TilewrightError]] = {1: InvalidInput, 2: InvalidArtifact, 3: ArtifactTargetMismatch}
"""tilewright_status to what is raised; for others, such as memory that is out, TilewrightError itself."""

_Int64 = NDArray[np.int64]
_Float32 = NDArray[np.float32]
_Observer = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64)


class Options(ctypes.Structure):
    """tilewright_options."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("level", ctypes.c_char_p),
        ("cores", ctypes.c_void_p),
        ("spin_us", ctypes.c_int32),
    )


class _Output(ctypes.Structure):
    """tilewright_output."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("width", ctypes.c_int64),
        ("per_token", ctypes.c_int32),
        ("squeeze", ctypes.c_int32),
    )


class _Info(ctypes.Structure):
    """tilewright_info."""

    _fields_ = (
        ("level", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("takes_token_types", ctypes.c_int32),
        ("vocab_size", ctypes.c_int64),
        ("token_types", ctypes.c_int64),
        ("max_positions", ctypes.c_int64),
        ("max_tokens", ctypes.c_int64),
        ("outputs", ctypes.c_size_t),
        ("output", ctypes.POINTER(_Output)),
    )


@cache
def library() -> ctypes.CDLL:
    """The runtime's functions, with the types of their arguments."""
    if not LIBRARY.exists():
        raise TilewrightError(f"{LIBRARY} is missing; install tilewright again, or run: python setup.py build_ext --inplace")
    try:
        functions = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise TilewrightError(
            f"the runtime cannot be loaded ({error}); install tilewright again, from source with pip"
        ) from None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    types: dict[str, tuple[Any, Sequence[Any]]] = {
        "open": (ctypes.c_int, (ctypes.c_char_p, ctypes.POINTER(Options), ctypes.POINTER(pointer))),
        "open_model": (ctypes.c_int, (pointer, ctypes.POINTER(Options), ctypes.POINTER(pointer))),
        "run": (ctypes.c_int, (pointer, pointer, pointer, pointer, size, size, pointer)),
        "run_ragged": (ctypes.c_int, (pointer, pointer, pointer, pointer, size, pointer)),
        "describe": (ctypes.POINTER(_Info), (pointer,)),
        "observe": (None, (pointer, _Observer, pointer)),
        "close": (None, (pointer,)),
        "error": (ctypes.c_char_p, ()),
    }
    for name, (result, arguments) in types.items():
        function = getattr(functions, f"tilewright_{name}")
        function.restype, function.argtypes = result, arguments
    return functions


def check(status: int) -> None:
    """Raise what a function of the library says."""
    if status:
        raise _ERRORS.get(status, TilewrightError)(library().tilewright_error().decode("utf-8", "replace"))


class Runtime:
    """An open engine of the library. Calls from several threads are safe and run one after the other."""

    def __init__(self, handle: ctypes.c_void_p, kept: object = None) -> None:
        """Take over the engine `handle`, which needs `kept` to live."""
        functions = library()
        self._handle, self._kept = handle, kept
        self._run = functions.tilewright_run
        info = functions.tilewright_describe(handle).contents
        self._outputs = [(bool(info.output[i].per_token), int(info.output[i].width)) for i in range(info.outputs)]
        self._gate = Gate()
        weakref.finalize(self, functions.tilewright_close, handle)

    @classmethod
    def open(cls, artifact: Path, level: str, threads: int) -> Runtime:
        """Open the artifact directory at `artifact`, checking every file; raises what `tilewright.load` does."""
        handle = ctypes.c_void_p()
        options = Options(threads=threads, level=level.encode("utf-8", "backslashreplace"))
        check(library().tilewright_open(bytes(artifact), ctypes.byref(options), ctypes.byref(handle)))
        return cls(handle)

    def run(self, ids: _Int64, mask: _Int64 | None, types: _Int64 | None) -> list[_Float32]:
        """Run contiguous arrays [batch, seq]; outputs are f32[batch, seq, width] per token, f32[batch, width] per sequence."""
        batch, seq = ids.shape
        outputs = [
            np.empty((batch, seq, width) if per_token else (batch, width), np.float32) for per_token, width in self._outputs
        ]
        pointers = (ctypes.c_void_p * len(outputs))(*map(_writable_address, outputs))
        with self._gate:
            check(self._run(self._handle, _address(ids), _address(mask), _address(types), batch, seq, pointers))
        return outputs

    @contextmanager
    def timed(self, record: Callable[[str, float], None]) -> Iterator[None]:
        """Within the block, which other threads' calls wait for, `record(kernel, seconds)` is called after each kernel."""

        def observe(_context: int, kernel: bytes, nanoseconds: int) -> None:
            record(kernel.decode("utf-8", "surrogatepass"), nanoseconds * 1e-9)

        functions, observer = library(), _Observer(observe)
        with self._gate:
            functions.tilewright_observe(self._handle, observer, None)
            try:
                yield
            finally:
                functions.tilewright_observe(self._handle, _Observer(), None)


def _writable_address(array: _Float32) -> int:
    """Where the data of `array` lies, in a third of the time that `array.ctypes.data` takes."""
    return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]  # which typing learns in 3.12


def _address(array: NDArray[Any] | None) -> int | None:
    """Where the data of `array` lies, which may be read-only, unlike what `from_buffer` takes."""
    return None if array is None else array.ctypes.data
