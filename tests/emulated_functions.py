"""Runs C functions on an emulated CPU, as `emulator.Kernels` runs kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.emulated_cpu import EmulationError, Machine
from tests.emulator import Array


@dataclass(frozen=True)
class Functions:
    """Calls of functions of a shared library, each with pointers to arrays.

    The result has, for each call, the last array as it left it, or the text of the EmulationError that ended it.
    """

    library: Path
    calls: Sequence[tuple[str, Sequence[Array]]]

    def run(self, machine: Machine) -> list[Array | str]:
        library = ctypes.CDLL(str(self.library))
        results: list[Array | str] = []
        for name, arrays in self.calls:
            function = ctypes.cast(library[name], ctypes.c_void_p).value
            assert function is not None
            try:
                machine.call(function, *(array.ctypes.data for array in arrays))
                results.append(arrays[-1])
            except EmulationError as error:
                results.append(str(error))
        return results
