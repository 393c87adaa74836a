"""The attention kernel against NumPy in float64, over packings of sequences into token groups."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernel_harness import (
    EXAMPLES,
    LEVELS,
    Array,
    Kernel,
    assert_u8,
    from_stored,
    read_as,
    round_up,
    spread,
    to_groups,
)
from tilewright.codegen.decisions import AttentionDecisions
from tilewright.codegen.kernels.attention import attention
from tilewright.codegen.workload import KernelSpec
from tilewright.schedules.decide import decide_attention
from tilewright.schedules.isa import ISAS

# heads, channels, longest sequence, consumer; longest is no multiple of 4 in two
SIZES = [(2, 16, 40, "rows"), (3, 32, 41, "columns"), (4, 8, 33, "rows"), (1, 4, 20, "columns"), (2, 64, 400, "packed")]
LENGTHS = {
    longest: st.lists(st.integers(1, longest), min_size=1, max_size=1 if longest > 100 else 6) for _, _, longest, _ in SIZES
}


@cache
def compiled(
    isa: str, heads: int, channels: int, longest: int, consumer: str, made: AttentionDecisions | None = None
) -> Kernel:
    stored, made = read_as(isa, consumer), made or decide_attention(channels, ISAS[isa])
    own = KernelSpec("attention", heads, channels, isa, stored.label, made)
    return Kernel.of(attention(own, stored, longest), own)


def run(isa: str, size: tuple, lengths: list[int], q: Array, k: Array, v: Array, quant: Array, garbage: np.random.Generator):
    """Context u8[T, H]; lanes past the last token hold random operands, as memory that is used again does.

    size: an entry of SIZES, after which decisions may stand.
    """
    heads, channels, _, consumer, *_ = size
    hidden = heads * channels
    held, stored = ISAS[isa].attention, read_as(isa, consumer)
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    padded = round_up(offsets[-1])

    def fill(array: Array, dtype: str, offset: int = 0) -> Array:
        whole = garbage.integers(-127, 128, (padded, hidden))
        whole[: len(array)] = array
        return (whole + offset).astype(dtype)

    inputs = {
        "query": to_groups(fill(q, held.query), "packed", held.pack),
        "key": to_groups(fill(k, held.key, held.key_offset), "packed", held.pack),
        "value": to_groups(fill(v, held.query), "columns"),
        "offsets": offsets,
        "quant": quant,
    }
    shape = stored.shape(padded // 16, hidden)
    return from_stored(compiled(isa, *size)(inputs, {"context": shape})["context"], stored)


def expected(heads: int, lengths: list[int], q: Array, k: Array, v: Array, quant: Array) -> Array:
    """Real context in units of its scale, f64[T, H]: scores exact, probabilities u8 with the largest 255."""
    tokens, hidden = q.shape
    context = np.zeros((tokens, hidden))
    split = [array.astype(np.float64).reshape(tokens, heads, -1).transpose(1, 0, 2) for array in (q, k, v)]
    for start, end in pairwise(np.cumsum([0, *lengths])):
        qs, ks, vs = (array[:, start:end] for array in split)
        scores = qs @ ks.transpose(0, 2, 1)
        p = np.rint(255 * np.exp((scores - scores.max(-1, keepdims=True)) * quant[0].astype(np.float64)))
        real = p @ vs / p.sum(-1, keepdims=True) * quant[1].astype(np.float64)
        context[start:end] = real.transpose(1, 0, 2).reshape(end - start, hidden)
    return context


def draw(random: np.random.Generator, tokens: int, hidden: int, values: str) -> list[Array]:
    if values == "extreme":
        return [random.choice([-127, 127], (tokens, hidden)) for _ in range(3)]
    if values == "equal":
        return [np.full((tokens, hidden), value) for value in (127, 127, -127)]
    if values == "zero":
        return [np.zeros((tokens, hidden), int)] * 3
    return [random.integers(-127, 128, (tokens, hidden)) for _ in range(3)]


def check(isa: str, size: tuple, lengths: list[int], values: str, sharpness: float, seed: int) -> None:
    heads, channels, *_ = size
    random = np.random.default_rng(seed)
    tokens = sum(lengths)
    q, k, v = draw(random, tokens, heads * channels, values)
    # scores spread over about `sharpness`: 0.1 is almost flat, 50 picks one key
    quant = np.array([sharpness / (5400 * channels**0.5), random.uniform(0.3, 1.2), random.integers(0, 256)], np.float32)
    found = run(isa, size, lengths, q, k, v, quant, random)
    assert_u8(found[:tokens], expected(heads, lengths, q, k, v, quant), quant[2])
    assert not found[tokens:].any()


@pytest.mark.parametrize(("isa", "heads", "channels", "longest", "consumer"), spread(SIZES))
@EXAMPLES
@given(data=st.data(), sharpness=st.sampled_from([0.1, 1.0, 5.0, 50.0]), seed=st.integers(0, 2**32 - 1))
def test_attention(isa: str, heads: int, channels: int, longest: int, consumer: str, data, sharpness: float, seed: int) -> None:
    lengths = data.draw(LENGTHS[longest])
    check(isa, (heads, channels, longest, consumer), lengths, "random", sharpness, seed)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("values", ["extreme", "equal", "zero"])
def test_extreme_operands(isa: str, values: str) -> None:
    for size in SIZES[:4]:
        check(isa, size, [1, 17, 3, 16, size[2] - 1, size[2]] if size[2] > 17 else [1, 3], values, 1.0, 0)


@pytest.mark.parametrize("isa", LEVELS)
def test_every_length_at_every_place_of_a_group(isa: str) -> None:
    """Sequences of each length start at each lane: all of them begin, end and straddle groups somewhere."""
    size = SIZES[0]
    for length in range(1, size[2] + 1):
        check(isa, size, [length % 16 + 1, *[length] * 4], "random", 3.0, length)
    for first in range(1, 17):
        check(isa, size, [first, 1, 16, 31], "random", 3.0, first)


@pytest.mark.parametrize("isa", LEVELS)
def test_many_sequences_in_one_group(isa: str) -> None:
    check(isa, SIZES[1], [1] * 16 + [2] * 7 + [1, 1, 5], "random", 3.0, 0)


@pytest.mark.parametrize("isa", LEVELS)
@EXAMPLES
@given(
    before=st.lists(st.integers(1, 40), max_size=3),
    after=st.lists(st.integers(1, 40), max_size=3),
    length=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_neighbours_are_not_seen(isa: str, before: list[int], after: list[int], length: int, seed: int) -> None:
    """Bit for bit the same alone and between others."""
    size = SIZES[0]
    random = np.random.default_rng(seed)
    lengths = [*before, length, *after]
    q, k, v = draw(random, sum(lengths), size[0] * size[1], "random")
    quant = np.array([3.0 / (5400 * size[1] ** 0.5), 1.0, 128], np.float32)
    start = sum(before)
    own = slice(start, start + length)
    together = run(isa, size, lengths, q, k, v, quant, random)[own]
    alone = run(isa, size, [length], q[own], k[own], v[own], quant, random)[:length]
    np.testing.assert_array_equal(together, alone)
