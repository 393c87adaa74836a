"""Columns in lanes of vpmaddubsw: every column once, no sum that overflows, whatever the weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_harness import Array
from tilewright.codegen.budget import BUDGET, EMPTY, LANES, Bins, share_lanes

KINDS = ("gaussian", "random", "extreme", "highest", "lowest", "one output", "alternating", "zeros")


def draw(random: np.random.Generator, kind: str, columns: int, width: int) -> Array:
    """Weights s8[columns, width]."""
    if kind == "gaussian":
        values = np.rint(random.standard_normal((columns, width)) * 40).clip(-127, 127)
    elif kind == "random":
        values = random.integers(-128, 128, (columns, width))
    elif kind == "extreme":
        values = random.choice([-127, 127], (columns, width))
    elif kind == "one output":
        values = np.zeros((columns, width))
        values[:, 0] = random.choice([-127, 127], columns)
    elif kind == "alternating":
        values = np.where(np.arange(columns) % 2, 127, -127)[:, None] + np.zeros(width)
    else:
        values = np.full((columns, width), {"highest": 127, "lowest": -128, "zeros": 0}[kind])
    return values.astype(np.int8)


def saturating(bins: Bins, x: Array) -> Array:
    """i64[R, bn]: what a kernel computes of activations x u8[Z]: vpmaddubsw, vpaddw and vpmaddwd by ones, bin by bin.

    The first of them saturates at 16 bits, the second wraps around.
    """
    taken = np.where(bins.columns == EMPTY, 255, np.append(x, 255)[bins.columns]).astype(np.int64)
    products = taken[..., None] * bins.weight.astype(np.int64)
    pairs = (products[:, ::2] + products[:, 1::2]).clip(-(2**15), 2**15 - 1)
    lanes = pairs.sum(axis=1).astype(np.int16).astype(np.int64)
    total = np.zeros((len(bins.indptr) - 1, bins.weight.shape[2]), np.int64)
    np.add.at(total, bins.rows, lanes)
    return total


def check(weight: Array, counts: list[int], depth: int, random: np.random.Generator) -> Bins:
    indptr = np.cumsum([0, *counts])
    bins = share_lanes(weight, indptr, depth)
    assert not bins.excess.any()
    positive, negative = (np.maximum(sign * bins.weight.astype(int), 0).sum(axis=1) for sign in (1, -1))
    assert max(positive.max(initial=0), negative.max(initial=0)) <= BUDGET  # what `excess` claims, computed apart
    assert bins.columns.shape[1] == 2 * depth
    assert not (np.diff(bins.indptr) % LANES).any()
    held = bins.columns != EMPTY
    np.testing.assert_array_equal(np.sort(bins.columns[held]), np.arange(len(weight)))  # each once
    owner = np.repeat(np.arange(len(counts)), counts)
    np.testing.assert_array_equal(owner[bins.columns[held]], np.broadcast_to(bins.rows[:, None], held.shape)[held])
    np.testing.assert_array_equal(bins.weight[held], weight[bins.columns[held]])
    assert not bins.weight[~held].any()
    # activations that drive each output's lanes to either end, and random ones
    outputs = {0, weight.shape[1] - 1}
    patterns = [np.where(sign * weight[:, output].astype(int) > 0, 255, 0) for sign in (1, -1) for output in outputs]
    for x in (*patterns, np.full(len(weight), 255), random.integers(0, 256, len(weight))):
        exact = np.zeros((len(counts), weight.shape[1]), np.int64)
        np.add.at(exact, owner, x[:, None] * weight.astype(np.int64))
        np.testing.assert_array_equal(saturating(bins, x), exact)
    return bins


@pytest.mark.parametrize("depth", [1, 2])
@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    width=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_column_once_and_no_lane_overflows(depth: int, kind: str, counts: list[int], width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    check(draw(random, kind, sum(counts), width), counts, depth, random)


@pytest.mark.parametrize("depth", [1, 2])
def test_of_what_fits_easily_the_last_entry_alone_has_empty_slots(depth: int) -> None:
    random = np.random.default_rng(0)
    counts = [0, 1, 7, 8, 9, 200]
    weight = random.integers(-BUDGET // (2 * depth), BUDGET // (2 * depth) + 1, (sum(counts), 4)).astype(np.int8)
    bins = check(weight, counts, depth, random)
    entry = LANES * 2 * depth
    assert np.diff(bins.indptr).tolist() == [LANES * -(-count // entry) for count in counts]


@pytest.mark.parametrize(("depth", "most"), [(1, 0.02), (2, 0.12)])
def test_gaussian_weights_leave_few_slots_empty(depth: int, most: float) -> None:
    """A row-block of 768 inputs of which a fifth is kept; its largest weight is 127."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((154 * 64, 4))
    weight = np.rint(weight / np.abs(weight).max(axis=0) * 127).astype(np.int8)
    bins = check(weight, [154] * 64, depth, random)
    assert bins.columns.size <= (1 + most) * len(weight) + 64 * LANES * 2 * depth


def test_equal_weights_are_packed_equally() -> None:
    weight = draw(np.random.default_rng(1), "random", 600, 4)
    first, second = (share_lanes(weight, np.array([0, 250, 600]), 2) for _ in range(2))
    np.testing.assert_array_equal(first.columns, second.columns)
    np.testing.assert_array_equal(first.weight, second.weight)


def test_a_large_adversarial_matrix_is_packed() -> None:
    """A search that only ends when it succeeds would not end here."""
    random = np.random.default_rng(0)
    check(draw(random, "extreme", 48 * 768, 4), [768] * 48, 2, random)
