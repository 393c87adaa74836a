"""Which columns of a row-block share a 16-bit lane of `vpmaddubsw`, so that no sum in it can overflow.

The instruction multiplies u8 by s8 and adds two products in 16 bits, where it saturates; `depth` such sums are then added in
16 bits before they are widened. Activations go up to 255, so a lane is exact whatever they are if, for each output, the
positive weights in it sum to at most 128 and the negative ones to at least -128: 128 * 255 = 32640. The columns of a gather
kernel may stand in any order, so they are put into bins, each a lane of every output, that keep this budget. What does not fit
leaves a slot empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BUDGET = 128
"""The largest sum of a lane's positive weights, and of its negative ones: the most of which 255 times fits 16 bits."""

LANES = 2
"""Lanes, and so bins, that a 32-bit accumulator adds up: an entry of a kernel holds so many bins."""

EMPTY = -1
"""The column of a slot that holds none."""

_PASSES, _ROUNDS = 3, 64  # how often bins are added, less one, and rounds of swaps each time: 0.9 s for 3072x768 at 80 %


@dataclass(frozen=True)
class Bins:
    """Columns in bins of `2 * depth` slots.

    columns: i32[B, slots], numbers of the columns as they were given, or EMPTY. weight: s8[B, slots, bn], 0 in empty slots.
    indptr: i64[R + 1], the bins of each row-block; a multiple of LANES.
    """

    columns: NDArray[np.int32]
    weight: NDArray[np.int8]
    indptr: NDArray[np.int64]

    @property
    def excess(self) -> NDArray[np.int32]:
        """i32[B]: by how much the weights of each bin exceed the budget; 0 everywhere proves that no lane can overflow."""
        return _excess(_signed(self.weight).sum(axis=1))

    @property
    def rows(self) -> NDArray[np.int64]:
        """i64[B]: the row-block of each bin."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))


def share_lanes(weight: NDArray[np.int8], indptr: NDArray[np.int64], depth: int) -> Bins:
    """The columns weight s8[Z, bn] of row-blocks, of which r owns `indptr[r] .. indptr[r + 1]`, in bins that keep the budget.

    Deterministic, and bounded in time: a row-block starts with the fewest bins that hold its columns,
    heavy columns beside light ones; swaps between its bins repair those that exceed the budget; bins are added where that
    fails; and what exceeds it even then moves to where it fits, at worst alone to a bin of its own.
    """
    slots, counts = 2 * depth, np.diff(indptr)
    bins = _spread(weight, indptr, slots, _whole(-(-counts // slots)))
    for seed in range(_PASSES):
        if seed:
            # an empty lane takes BUDGET of each sign of every output, of which half are in excess at most
            over = np.bincount(bins.rows, bins.excess, len(counts)).astype(np.int64)
            bins = _with_more(bins, _whole(-(-over // (BUDGET * weight.shape[1]))))
        bins = _swap(bins, seed)
        if not bins.excess.any():
            return bins
    return _evict(bins)


def _whole(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts of bins rounded up to whole entries."""
    return -(-counts // LANES) * LANES


def _signed(weight: NDArray[np.int8]) -> NDArray[np.int16]:
    """i16[..., 2 * bn]: what weights [..., bn] add to the positive and to the negative sum of each output."""
    wide = weight.astype(np.int16)
    return np.concatenate([np.maximum(wide, 0), np.maximum(-wide, 0)], axis=-1)


def _excess(sums: NDArray[np.integer]) -> NDArray[np.int32]:
    found: NDArray[np.int32] = np.maximum(sums - BUDGET, 0).sum(axis=-1, dtype=np.int32)
    return found


def _spread(weight: NDArray[np.int8], indptr: NDArray[np.int64], slots: int, counts: NDArray[np.int64]) -> Bins:
    """`counts` bins for each row-block, filled in turns, the heaviest columns first and every second turn backwards."""
    rows = np.repeat(np.arange(len(counts)), np.diff(indptr))
    order = np.lexsort((-np.square(weight.astype(np.int32)).sum(axis=1), rows))
    turn, place = np.divmod(np.arange(len(order)) - indptr[rows], np.maximum(counts[rows], 1))
    starts = np.concatenate([[0], np.cumsum(counts)])
    target = starts[rows] + np.where(turn % 2, counts[rows] - 1 - place, place)
    columns = np.full((starts[-1], slots), EMPTY, np.int32)
    columns[target, turn] = order
    return Bins(columns, _with_empty(weight)[columns], starts)


def _with_empty(weight: NDArray[np.int8]) -> NDArray[np.int8]:
    """The weights of all columns, those of EMPTY at its place: the last."""
    return np.concatenate([weight, np.zeros((1, weight.shape[1]), np.int8)])


def _swap(bins: Bins, seed: int) -> Bins:
    """Rounds of the best exchange between each bin that exceeds the budget and a partner, until none does.

    In round s, bin b of n meets bin (s - b) modulo n, so that every bin has one partner. An exchange that leaves as much excess
    as there was is made, too: it changes what the next partner finds.
    """
    columns, weight = bins.columns.copy(), bins.weight.copy()
    random, slots = np.random.default_rng(seed), columns.shape[1]
    starts, counts, excess = bins.indptr[bins.rows], np.diff(bins.indptr)[bins.rows], bins.excess
    for _ in range(_ROUNDS):
        over = np.flatnonzero(excess)
        partner = starts[over] + (random.integers(1 << 30) - (over - starts[over])) % counts[over]
        pairs = (partner != over) & ((excess[partner] == 0) | (over < partner))
        one, other = over[pairs], partner[pairs]
        if not len(over):
            break
        a, b = (_signed(weight[which]).transpose(2, 0, 1).copy() for which in (one, other))
        moved = b[:, :, None] - a[..., None]  # what exchanging slots i and j adds to the first bin: [2 * bn, pairs, i, j]
        sums = [side.sum(axis=2, dtype=np.int16)[..., None, None] for side in (a, b)]
        after = np.maximum(sums[0] + moved, BUDGET).sum(axis=0, dtype=np.int32)
        after += np.maximum(sums[1] - moved, BUDGET).sum(axis=0, dtype=np.int32)
        after -= 2 * len(a) * BUDGET
        best = after.reshape(-1, slots * slots).argmin(axis=1)
        good = after.reshape(-1, slots * slots)[np.arange(len(one)), best] <= excess[one] + excess[other]
        one, other, (i, j) = one[good], other[good], np.divmod(best[good], slots)
        for array in (columns, weight):
            array[one, i], array[other, j] = array[other, j], array[one, i]
        changed = np.concatenate([one, other])
        excess[changed] = _excess(_signed(weight[changed]).sum(axis=1))
    return Bins(columns, weight, bins.indptr)


def _with_more(bins: Bins, more: NDArray[np.int64]) -> Bins:
    """`more` empty bins behind those of each row-block."""
    indptr = bins.indptr + np.concatenate([[0], np.cumsum(more)])
    target = np.arange(len(bins.columns)) + (indptr - bins.indptr)[bins.rows]
    columns = np.full((indptr[-1], bins.columns.shape[1]), EMPTY, np.int32)
    weight = np.zeros((indptr[-1], *bins.weight.shape[1:]), np.int8)
    columns[target], weight[target] = bins.columns, bins.weight
    return Bins(columns, weight, indptr)


def _evict(bins: Bins) -> Bins:
    """Each column that exceeds its bin's budget moves to the first bin of its row-block that has room for it."""
    sums = np.zeros((len(bins.columns), 2 * bins.weight.shape[2]), np.int32)
    out = np.zeros(bins.columns.shape, bool)
    for slot in range(bins.columns.shape[1]):
        added = sums + _signed(bins.weight[:, slot])
        out[:, slot] = (added > BUDGET).any(axis=1)
        sums = np.where(out[:, slot, None], sums, added)
    homeless, columns, rows = bins.weight[out], bins.columns[out], bins.rows[np.nonzero(out)[0]]
    bins = _with_more(
        Bins(np.where(out, EMPTY, bins.columns), np.where(out[..., None], np.int8(0), bins.weight), bins.indptr),
        _whole(np.bincount(rows, minlength=len(bins.indptr) - 1)),  # enough for all; those that stay empty are dropped
    )
    sums, row_of, turn = _signed(bins.weight).sum(axis=1), bins.rows, np.arange(len(rows)) - np.searchsorted(rows, rows)
    for number in range(turn.max(initial=-1) + 1):
        mine = np.full(len(bins.indptr) - 1, -1)
        mine[rows[turn == number]] = np.flatnonzero(turn == number)
        open_ = np.flatnonzero((mine[row_of] >= 0) & (bins.columns == EMPTY).any(axis=1))
        added = _signed(homeless)[mine[row_of[open_]]]
        fits = open_[((sums[open_] + added) <= BUDGET).all(axis=1)]
        _, first = np.unique(row_of[fits], return_index=True)
        place = fits[first]
        which = mine[row_of[place]]
        slot = (bins.columns[place] == EMPTY).argmax(axis=1)
        bins.columns[place, slot], bins.weight[place, slot] = columns[which], homeless[which]
        sums[place] += _signed(homeless[which])
    return _without_empty(bins)


def _without_empty(bins: Bins) -> Bins:
    """The bins up to each row-block's last entry that holds a column."""
    used = (bins.columns != EMPTY).any(axis=1)
    last = np.zeros(len(bins.indptr) - 1, np.int64)
    np.maximum.at(last, bins.rows[used], (np.arange(len(used)) - bins.indptr[bins.rows])[used] + 1)
    counts = _whole(last)
    kept = np.arange(len(used)) - bins.indptr[bins.rows] < counts[bins.rows]
    return Bins(bins.columns[kept], bins.weight[kept], np.concatenate([[0], np.cumsum(counts)]))
