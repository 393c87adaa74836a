"""Weights on disk: a safetensors file in which every array starts at a multiple of 64 bytes.

The alignment lets the file be memory-mapped and its arrays passed to kernels without a copy, so that processes running
one model share its pages. The format forbids holes, so gaps are filled by `_pad.N` tensors; any safetensors reader can
open the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.errors import InvalidArtifact
from tilewright.files import open_regular, parse_json

ALIGNMENT = 64
_PAD = "_pad."
_DTYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_weights(path: Path, weights: Mapping[str, NDArray[Any]]) -> None:
    """Write `weights` (u8, i8, u16, i16, i32, i64 or f32) in order; raises ValueError for another dtype."""
    header: dict[str, Any] = {}
    gaps: list[int] = []
    position = 0
    for name, array in weights.items():
        if array.dtype not in _NAMES:
            raise ValueError(f"weight {name} has dtype {array.dtype}; artifacts hold {', '.join(_DTYPES)}")
        end = position + array.nbytes
        header[name] = {"dtype": _NAMES[array.dtype], "shape": array.shape, "data_offsets": (position, end)}
        gap = -end % ALIGNMENT
        if gap:
            header[f"{_PAD}{len(gaps)}"] = {"dtype": "U8", "shape": (gap,), "data_offsets": (end, end + gap)}
        gaps.append(gap)
        position = end + gap
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array, gap in zip(weights.values(), gaps, strict=True):
            file.write(_bytes(array))
            file.write(bytes(gap))


class WeightPool:
    """Weights of several modules, each content stored once: what modules pack alike they share."""

    def __init__(self) -> None:
        self.tensors: dict[str, NDArray[Any]] = {}
        self._names: dict[tuple[bytes, str, tuple[int, ...]], str] = {}

    def add(self, level: str, weights: Mapping[str, NDArray[Any]]) -> dict[str, str]:
        """Add the weights of `level`; returns for each, in order, the name of the tensor that holds it.

        That is its own name, with the level behind it where an earlier level has other content under that name.
        """
        parameters = {}
        for name, array in weights.items():
            key = hashlib.sha256(_bytes(array)).digest(), array.dtype.str, array.shape
            if key not in self._names:
                self._names[key] = name if name not in self.tensors else f"{name}@{level}"
                self.tensors[self._names[key]] = array
            parameters[name] = self._names[key]
        return parameters


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def map_weights(path: Path) -> dict[str, NDArray[Any]]:
    """Map the arrays of a file written by `write_weights`, read-only, sharing its pages; raises InvalidArtifact."""
    try:
        with open_regular(path) as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(memory[:8], "little")
        header = parse_json(memory[8:start].decode("utf-8"))
        return {
            name: _view(memory, start, entry)
            for name, entry in header.items()
            if name != "__metadata__" and not name.startswith(_PAD)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InvalidArtifact(f"{path} is not an artifact's weights file ({error}); compile the model again") from None


def _view(memory: mmap.mmap, start: int, entry: Any) -> NDArray[Any]:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if end - begin != dtype.itemsize * math.prod(shape):
        raise ValueError(f"shape {shape} does not fill bytes {begin} to {end}")
    if (start + begin) % ALIGNMENT:
        raise ValueError(f"array at byte {start + begin} is not aligned to {ALIGNMENT}")
    return np.ndarray(shape, dtype, memory, start + begin)
