"""Inputs of a call as the runtime takes them: contiguous i64[batch, seq].

What can be said of arrays is checked here, values and lengths by the runtime (`runtime/batch.c`), which packs the valid tokens:
those whose attention_mask is 1. Their positions count the sequence's valid tokens: the column index for right padding, and for
left padding or holes whatever makes the result equal to that of the sequence alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewright.errors import InvalidInput

Int64 = NDArray[np.int64]
Inputs = tuple[Int64, Int64 | None, Int64 | None]
_LARGEST = 2**63 - 1


def as_inputs(input_ids: ArrayLike, attention_mask: ArrayLike | None, token_type_ids: ArrayLike | None) -> Inputs:
    """Integer arrays [batch, seq] of ids, mask and types; raises InvalidInput for a wrong dtype, rank or shape."""
    ids = _integers("input_ids", input_ids)
    if ids.ndim != 2:
        raise InvalidInput(f"input_ids has shape {ids.shape}; expected [batch, seq], one row for each sequence")
    if ids.size == 0:
        raise InvalidInput(f"input_ids has shape {ids.shape}; expected at least one sequence of at least one token")
    types = None if token_type_ids is None else _integers("token_type_ids", token_type_ids, shape=ids.shape)
    mask = None if attention_mask is None else _integers("attention_mask", attention_mask, "iub", ids.shape)
    return _as_int64(ids), None if mask is None else _as_int64(mask), None if types is None else _as_int64(types)


def _integers(name: str, value: ArrayLike, kinds: str = "iu", shape: tuple[int, ...] | None = None) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError:
        raise InvalidInput(f"{name} has rows of different lengths; pad them and pass attention_mask") from None
    if array.dtype.kind not in kinds:
        raise InvalidInput(f"{name} has dtype {array.dtype}; expected integers, such as int64")
    if shape is not None and array.shape != shape:
        raise InvalidInput(f"{name} has shape {array.shape}, input_ids {shape}; they must be equal")
    return array


def _as_int64(array: NDArray[Any]) -> Int64:
    if array.dtype == np.uint64:
        array = np.minimum(array, _LARGEST)  # which is out of any range, too
    return np.ascontiguousarray(array, np.int64)
