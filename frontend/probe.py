"""Random inputs of an encoder with padding, and whether what it makes of them is what its source makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.model import EncoderModel
from tilewright.errors import UnsupportedModel
from tilewright.frontend.reference import Array, forward

TOLERANCE = 1e-3
"""Largest difference of a token's values, relative to their usual size. Float32 in another order differs by some 1e-5."""

RAGGED = (23, 7, 1)
"""Lengths of the sequences of a batch."""

ROLES = ("input_ids", "attention_mask", "token_type_ids")
"""Names of the inputs of an encoder."""


@dataclass(frozen=True)
class Probe:
    """Inputs s64[batch, tokens]; `mask` is 1 at tokens and 0 at the padding behind them."""

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    types: NDArray[np.int64]

    @property
    def inputs(self) -> Mapping[str, NDArray[np.int64]]:
        """The inputs by their names in ROLES."""
        return dict(zip(ROLES, (self.ids, self.mask, self.types), strict=True))

    @property
    def valid(self) -> NDArray[np.bool_]:
        """True at tokens."""
        return self.mask.astype(bool)

    def sequences(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Rows of values [batch, tokens, ...], cut to each sequence's tokens."""
        return [row[valid] for row, valid in zip(values, self.valid, strict=True)]

    def joined(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values [batch, tokens, ...] of all tokens, one after the other; empty where they are not of that shape."""
        return np.concatenate(self.sequences(values)) if values.shape[:2] == self.ids.shape else np.empty(0)


def make_probe(
    random: np.random.Generator, lengths: Sequence[int], columns: int, vocabulary: int, token_types: int, padding: int
) -> Probe:
    """Sequences of `lengths` random tokens other than `padding`, with which they are filled up to `columns`."""
    mask = (np.arange(columns) < np.reshape(lengths, (-1, 1))).astype(np.int64)
    ids = random.integers(0, vocabulary, mask.shape)
    ids = np.where(ids == padding, (ids + 1) % vocabulary, ids)
    types = np.where(mask, random.integers(0, token_types, mask.shape), 0)
    return Probe(np.where(mask, ids, padding), mask, types)


def check_model(
    model: EncoderModel, probe: Probe, stream: Sequence[NDArray[Any]], outputs: Mapping[str, NDArray[Any]], remedy: str
) -> None:
    """Raise UnsupportedModel with `remedy` at the first place where `model` and its source differ on `probe`, in float32.

    stream: the source's residual stream [batch, tokens, hidden]: after the embeddings, after each layer, and maybe between
    attention and feed-forward network of each. outputs: those of the source's outputs that the model has, by name.
    """
    ours: dict[str, Array] = {}
    with np.errstate(all="ignore"):  # what is not finite differs, and is refused for that
        results = forward(model, probe.sequences(probe.ids), probe.sequences(probe.types), observe=ours.__setitem__)
    names = list(ours) if len(stream) == len(ours) else list(ours)[::2]
    for name, values in zip(names, stream, strict=True):
        _check(name, ours[name], probe.joined(values), remedy)
    for name, values in outputs.items():
        parts = [result[name] for result in results]
        if name == "sentence_embedding" or model.head.kind == "sequence_classification":
            _check(name, np.stack(parts), values, remedy)
        else:
            _check(name, np.concatenate(parts), probe.joined(values), remedy)


def _check(name: str, ours: Array, theirs: NDArray[Any], remedy: str) -> None:
    if ours.shape != theirs.shape:
        raise UnsupportedModel(f"{name} is {list(ours.shape)} as the model was understood, but {list(theirs.shape)}; {remedy}")
    first, second = (np.nan_to_num(np.asarray(x, np.float64).reshape(len(x), -1), nan=np.inf) for x in (ours, theirs))
    with np.errstate(all="ignore"):
        usual = np.sqrt((second**2).sum(axis=1).mean())
        error = np.sqrt(((first - second) ** 2).sum(axis=1)).max() / max(usual, 1e-30)
    if not error <= TOLERANCE:
        raise UnsupportedModel(f"{name} differs by {error:.2g} (relative, float32) from what was understood; {remedy}")
