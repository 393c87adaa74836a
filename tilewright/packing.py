"""From padded [batch, seq] arrays to one packed token axis and back.

Only tokens whose attention_mask is 1 are packed. Their positions count the sequence's valid tokens: the column index
for right padding, and for left padding or holes whatever makes the result equal to that of the sequence alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewright.errors import InvalidInput
from tilewright.manifest import Limits

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Packed:
    """A batch's T valid tokens: ids, positions, types i32[T]; sequence b owns tokens offsets[b] .. offsets[b + 1]."""

    input_ids: Int32
    position_ids: Int32
    token_type_ids: Int32 | None
    offsets: Int32
    shape: tuple[int, int]
    mask: NDArray[np.bool_] | None  # None when every token is valid

    def chunks(self, max_tokens: int) -> Iterator[tuple[int, int]]:
        """Ranges of sequences, each as long as fits in `max_tokens` tokens (at least one sequence)."""
        first, batch = 0, self.shape[0]
        if self.offsets[-1] <= max_tokens:
            yield 0, batch
            return
        while first < batch:
            fitting = np.searchsorted(self.offsets, self.offsets[first] + max_tokens, side="right")
            last = max(first + 1, int(fitting) - 1)
            yield first, last
            first = last

    def scatter(self, tokens: Float32) -> Float32:
        """f32[T, C] to f32[batch, seq, C], zero at padding."""
        if self.mask is None:
            return tokens.reshape(*self.shape, -1)
        padded = np.zeros((*self.shape, tokens.shape[-1]), np.float32)
        padded[self.mask] = tokens
        return padded


def pack(
    limits: Limits,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    token_type_ids: ArrayLike | None = None,
) -> Packed:
    """Check and pack integer arrays [batch, seq]; the mask holds 0 and 1, and ids at masked positions are not read.

    Raises InvalidInput for a wrong dtype, rank or shape, an empty batch or sequence, ids or types out of range, and
    sequences longer than `limits.max_positions`.
    """
    ids = _integers("input_ids", input_ids)
    if ids.ndim != 2:
        raise InvalidInput(f"input_ids has shape {ids.shape}; expected [batch, seq], one row for each sequence")
    batch, seq = ids.shape
    if batch == 0 or seq == 0:
        raise InvalidInput(f"input_ids has shape {ids.shape}; expected at least one sequence of at least one token")
    types = None if token_type_ids is None else _integers("token_type_ids", token_type_ids, shape=ids.shape)
    mask = None if attention_mask is None else _mask(attention_mask, ids)
    if mask is None:
        _check_length(limits, seq, 0)
        offsets = np.arange(0, batch * seq + 1, seq, dtype=np.int32)
        positions = np.arange(seq, dtype=np.int32)
        positions = positions if batch == 1 else np.tile(positions, batch)
    else:
        lengths = np.count_nonzero(mask, axis=1)
        shortest, longest = int(lengths.argmin()), int(lengths.argmax())
        if lengths[shortest] == 0:
            raise InvalidInput(f"attention_mask of sequence {shortest} is all zero; every sequence needs a token")
        _check_length(limits, int(lengths[longest]), longest)
        offsets = np.zeros(batch + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        positions = (np.cumsum(mask, axis=1, dtype=np.int32) - 1)[mask]
    return Packed(
        input_ids=_tokens("input_ids", ids, mask, limits.vocab_size),
        position_ids=positions,
        token_type_ids=None if types is None else _tokens("token_type_ids", types, mask, limits.token_types),
        offsets=offsets,
        shape=(batch, seq),
        mask=mask,
    )


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


def _mask(value: ArrayLike, ids: NDArray[Any]) -> NDArray[np.bool_] | None:
    array = _integers("attention_mask", value, "iub", ids.shape)
    mask = array.astype(bool)
    if (array != mask).any():
        raise InvalidInput(f"attention_mask holds {array[array != mask][0]}; expected 1 for tokens and 0 for padding")
    return None if mask.all() else mask


def _check_length(limits: Limits, length: int, sequence: int) -> None:
    if length > limits.max_positions:
        raise InvalidInput(f"sequence {sequence} has {length} tokens; the model takes at most {limits.max_positions}")


def _tokens(name: str, array: NDArray[Any], mask: NDArray[np.bool_] | None, bound: int) -> Int32:
    """The valid entries as i32[T], each checked to be in 0 .. bound - 1."""
    tokens = array.reshape(-1) if mask is None else array[mask]
    for extreme in (tokens.min(), tokens.max()):
        if not 0 <= extreme < bound:
            raise InvalidInput(f"{name} holds {extreme}; the model takes 0 to {bound - 1}")
    return tokens.astype(np.int32, copy=False)
