"""Tensors of safetensors files: read, checked, and counted until every one is used or declared unused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
from numpy.typing import NDArray

from tilewright.codegen.model import Float
from tilewright.errors import InvalidModel
from tilewright.files import open_regular

# a bfloat16 is the upper half of a float32, so it is read as u16 and widened
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1"}
_OTHERS = {"BOOL": "?", "I16": "<i2"}  # only ever in tensors declared unused
Integer = TypeVar("Integer", np.int8, np.uint8)
_FLOATS = ("F64", "F32", "F16", "BF16")


class Checkpoint:
    """Named tensors, each to be taken or declared unused once."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]], bfloat16: frozenset[str] = frozenset()) -> None:
        """Hold `tensors`; the u16 ones named in `bfloat16` are bfloat16."""
        self._tensors = tensors
        self._bfloat16 = bfloat16
        self._open = set(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def floats(self, name: str, *shape: int | None) -> Float:
        """Take tensor `name` as f32[shape], None for any extent.

        Raises InvalidModel if it is missing, has another shape or type, or holds NaN or infinity.
        """
        tensor = self._take(name, shape)
        if name in self._bfloat16:
            tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
        if tensor.dtype.kind != "f":
            raise InvalidModel(f"tensor {name} is {tensor.dtype}, expected floating point; export the model again")
        return finite(name, np.ascontiguousarray(tensor, np.float32))

    def integers(self, name: str, dtype: type[Integer], *shape: int | None) -> NDArray[Integer]:
        """Take tensor `name` as `dtype`[shape]; raises InvalidModel if it is missing or has another shape or type."""
        tensor = self._take(name, shape)
        if tensor.dtype != dtype:
            raise InvalidModel(f"tensor {name} is {tensor.dtype}, expected {dtype.__name__} as the quantization_config says")
        return np.ascontiguousarray(tensor)

    def int8(self, name: str, *shape: int | None) -> NDArray[np.int8]:
        """Take tensor `name` as s8[shape]; raises InvalidModel if it is missing or has another shape or type."""
        return self.integers(name, np.int8, *shape)

    def scalar(self, name: str) -> float:
        """Take the only element of tensor `name`; raises InvalidModel if it has another number or is not finite."""
        tensor = self.floats(name) if self._is_float(name) else self._take(name, ())
        if tensor.size != 1:
            raise InvalidModel(f"tensor {name} has shape {list(tensor.shape)}, expected one value: per-tensor scales only")
        return float(tensor.reshape(()))

    def ignore(self, patterns: Iterable[str]) -> tuple[str, ...]:
        """Declare the tensors that match one of `patterns` unused, and return their names."""
        ignored = tuple(sorted(n for n in self._open if any(fnmatchcase(n, pattern) for pattern in patterns)))
        self._open.difference_update(ignored)
        return ignored

    def finish(self) -> None:
        """Raise InvalidModel if a tensor was neither taken nor declared unused."""
        if self._open:
            left = sorted(self._open)
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise InvalidModel(
                f"unexpected tensors {', '.join(left[:3])}{more}: the architecture in config.json does not have them; "
                "export the checkpoint with the class it was trained with"
            )

    def _is_float(self, name: str) -> bool:
        return name in self._bfloat16 or (name in self._tensors and self._tensors[name].dtype.kind == "f")

    def _take(self, name: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
        if name not in self._tensors:
            raise InvalidModel(f"tensor {name} is missing; the checkpoint is incomplete or of another architecture")
        tensor = self._tensors[name]
        fits = len(tensor.shape) == len(shape) and all(
            want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
        )
        if shape and not fits:
            want = ", ".join("any" if extent is None else str(extent) for extent in shape)
            raise InvalidModel(f"tensor {name} has shape {list(tensor.shape)}, config.json makes it [{want}]")
        self._open.discard(name)
        return tensor


def finite(name: str, array: Float) -> Float:
    """Return `array`; raises InvalidModel naming it if it holds NaN or infinity."""
    bad = array.size - int(np.isfinite(array).sum())
    if bad:
        raise InvalidModel(f"tensor {name} holds {bad} NaN or infinite values; the checkpoint is damaged")
    return array


def read_safetensors(paths: Iterable[Path], prefix: str) -> Checkpoint:
    """Read the files at `paths` as one checkpoint whose names lose `prefix`; raises InvalidModel for a damaged file."""
    tensors: dict[str, NDArray[Any]] = {}
    bfloat16 = set()
    for path in paths:
        try:
            entries = safetensors.deserialize(_read(path))  # type: ignore[no-untyped-call]  # not annotated there
        except (safetensors.SafetensorError, OSError) as error:
            raise InvalidModel(f"{path} is not a complete safetensors file: {_one_line(error)}; copy it again") from None
        for stored, entry in entries:
            name = plain_name(stored, prefix)
            dtype = (_STORED | _OTHERS).get(entry["dtype"])
            if dtype is None:
                raise InvalidModel(f"tensor {stored} has type {entry['dtype']}; supported: {', '.join(_STORED)}")
            if name in tensors:
                raise InvalidModel(f"tensor {stored} occurs twice in {path.parent}; keep one set of safetensors files")
            tensors[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                bfloat16.add(name)
    return Checkpoint(tensors, frozenset(bfloat16))


def plain_name(stored: str, prefix: str) -> str:
    """The name of a tensor without `prefix`; checkpoints converted from TensorFlow call LayerNorm's tensors gamma and beta."""
    name = stored.removeprefix(prefix).replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def _read(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
