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
ALIGNMENT = 64
"""Of output arrays, in bytes: a vector."""

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
        self._gate = Gate()
        weakref.finalize(self, functions.tilewright_close, handle)

    @classmethod
    def open(cls, artifact: Path, level: str, threads: int) -> Runtime:
        """Open the artifact directory at `artifact`, checking every file; raises what `tilewright.load` does."""
        handle = ctypes.c_void_p()
        options = Options(threads=threads, level=level.encode("utf-8", "backslashreplace"))
        check(library().tilewright_open(bytes(artifact), ctypes.byref(options), ctypes.byref(handle)))
        return cls(handle)

    def run(self, ids: _Int64, mask: _Int64 | None, types: _Int64 | None, widths: Sequence[tuple[bool, int]]) -> list[_Float32]:
        """Run contiguous arrays [batch, seq].

        widths: of each output whether it is per token, and its width. Returns f32[batch, seq, width] and f32[batch, width].
        """
        batch, seq = ids.shape
        outputs = [_empty((batch, seq, width) if per_token else (batch, width)) for per_token, width in widths]
        pointers = (ctypes.c_void_p * len(outputs))(*(output.ctypes.data for output in outputs))
        arguments = (None if array is None else array.ctypes.data for array in (ids, mask, types))
        with self._gate:
            check(self._run(self._handle, *arguments, batch, seq, pointers))
        return outputs

    @contextmanager
    def timed(self, record: Callable[[str, float], None]) -> Iterator[None]:
        """Within the block, which other threads' calls wait for, `record(kernel, seconds)` is called after each kernel."""

        def observe(_context: int, kernel: bytes, nanoseconds: int) -> None:
            record(kernel.decode(), nanoseconds * 1e-9)

        functions, observer = library(), _Observer(observe)
        with self._gate:
            functions.tilewright_observe(self._handle, observer, None)
            try:
                yield
            finally:
                functions.tilewright_observe(self._handle, _Observer(), None)


def _empty(shape: tuple[int, ...]) -> _Float32:
    """An array that begins at a multiple of ALIGNMENT."""
    size = int(np.prod(shape)) * 4
    memory = np.empty(size + ALIGNMENT, np.uint8)
    skip = -memory.ctypes.data % ALIGNMENT
    return memory[skip : skip + size].view(np.float32).reshape(shape)
