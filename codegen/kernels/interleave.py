"""Rows of tokens to vectors in which the channels of a token are adjacent, in the order that is cheapest on x86."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tvm import tirx

from tilewright.codegen.kernels.common import GROUP, Expr

Shuffle = Callable[[Sequence[Any], list[int]], Any]
"""(vectors, order): elements of the vectors one after the other, in that order."""


def interleave(rows: list[Expr], pack: int, tile: int, halved: bool = False) -> list[Expr]:
    """`tile` vectors [16, pack] from `pack` rows of tile * 16 tokens each, which come out in the order of `lane_of`.

    The order is that of vpunpck, which works within 128 bits; sums are put in order once, entries are many. halved: the first
    half of the vectors takes the first half of each 128 bits of the rows, so that each can be made without the other.
    """
    return _interleave(rows, pack, tile, halved, tirx.Shuffle)


def lane_of(token: int, pack: int, tile: int, halved: bool = False) -> tuple[int, int]:
    """The vector of `interleave`, and the lane in it, in which `token` of a tile comes out."""
    return _lanes(pack, tile, halved)[token]


def in_order(sums: list[Expr], pack: int, tile: int, halved: bool = False) -> list[Expr]:
    """Vectors of 16 sums as `interleave` leaves them, put in the order of tokens: one for each group."""
    if tile == pack == 4:  # quad v of group g is quad g of vector v; to exchange them takes two shuffles a vector
        halves = [
            [tirx.Shuffle(sums[first : first + 2], _quads(half, half + 1, half + 4, half + 5)) for first in (0, 2)]
            for half in (0, 2)
        ]
        return [tirx.Shuffle(pair, _quads(odd, odd + 2, odd + 4, odd + 6)) for pair in halves for odd in (0, 1)]
    places = [lane_of(token, pack, tile, halved) for token in range(tile * GROUP)]
    lanes = [GROUP * vector + lane for vector, lane in places]
    return [tirx.Shuffle(sums, lanes[first : first + GROUP]) for first in range(0, tile * GROUP, GROUP)]


def bytes_in_order(vectors: list[Expr]) -> Expr:
    """A row of two or four groups in the order of tokens, as one vector of u8, from as many vectors of s32 in 0..255.

    They stand as `interleave` leaves those of a tile at a pack of four, halved if of two groups. Of four, a dword takes a byte
    of each vector; within 128 bits, bytes and dwords then change places. Of two, vpackssdw and vpackuswb undo vpunpck.
    """
    if len(vectors) == 2:
        words = []
        for vector in vectors:
            parts = [tirx.Shuffle([vector], list(range(first, first + 8))) for first in (0, 8)]
            words.append(tirx.call_llvm_pure_intrin("int16x16", "llvm.x86.avx2.packssdw", *parts))
        return tirx.reinterpret("uint8x32", tirx.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.packuswb", *words))
    word = vectors[0]
    for number, vector in enumerate(vectors[1:], 1):
        word = tirx.bitwise_or(word, tirx.shift_left(vector, tirx.Broadcast(tirx.const(8 * number, "int32"), GROUP)))
    order = [16 * group + 4 * lane + vector for group in range(4) for vector in range(4) for lane in range(4)]
    return tirx.Shuffle([tirx.reinterpret(f"uint8x{4 * GROUP}", word)], order)


def transposed(rows: list[Expr]) -> list[Expr]:
    """A square of elements, given as rows, as columns: whoever pairs element i of rows r and r + n / 2 does so log n times."""
    size = len(rows)
    zipped = [source * size + i for i in range(size) for source in (0, 1)]
    for _ in range(size.bit_length() - 1):
        pairs = [(rows[i], rows[i + size // 2]) for i in range(size // 2)]
        rows = [tirx.Shuffle(list(pair), order) for pair in pairs for order in (zipped[:size], zipped[size:])]
    return rows


def _quads(*numbers: int) -> list[int]:
    return [4 * number + lane for number in numbers for lane in range(4)]


@cache
def _lanes(pack: int, tile: int, halved: bool) -> dict[int, tuple[int, int]]:
    """Token to vector and lane: where `interleave` puts the elements of rows that hold the tokens' numbers."""

    def shuffle(vectors: Sequence[list[int]], order: list[int]) -> list[int]:
        elements = [token for vector in vectors for token in vector]
        return [elements[place] for place in order]

    vectors = _interleave([list(range(tile * GROUP))] * pack, pack, tile, halved, shuffle)
    return {token: (number, lane) for number, vector in enumerate(vectors) for lane, token in enumerate(vector[::pack])}


def _interleave(rows: Sequence[Any], pack: int, tile: int, halved: bool, shuffle: Shuffle) -> list[Any]:
    """Trees of vpunpck over whole vectors; shorter rows are widened where LLVM makes one instruction of it.

    Rows of single groups are joined as they are loaded, rows of two by the shuffle (vpermt2w) that interleaves pairs.
    """
    tokens = tile * GROUP
    if tile == pack:
        return _unpack(rows, 4 * pack, tokens, 1, shuffle)
    if halved:
        vectors, count = _unpack(rows, 4 * pack, tokens, 1, shuffle), pack // tile
        return [shuffle(vectors[first : first + count], list(range(GROUP * pack))) for first in range(0, pack, count)]
    if tile == 1:
        joined = [shuffle(rows[parity::2], list(range(pack // 2 * tokens))) for parity in (0, 1)]
        halves = _unpack(joined, 4 * pack, pack // 2 * tokens, 1, shuffle)
        return [shuffle(halves, _pairs(pack // 2, tokens) + [pack // 2 * tokens + i for i in _pairs(pack // 2, tokens)])]
    halves = [_unpack(rows[first : first + 2], 4 * pack, tokens, 1, shuffle) for first in range(0, pack, 2)]
    return [shuffle(parts, _pairs(pack // 2, tokens)) for parts in zip(*halves, strict=True)]


def _pairs(parts: int, length: int) -> list[int]:
    """The order that interleaves `parts` sequences of `length` elements by pairs."""
    return [part * length + first + i for first in range(0, length, 2) for part in range(parts) for i in (0, 1)]


def _unpack(rows: Sequence[Any], whole: int, length: int, unit: int, shuffle: Shuffle) -> list[Any]:
    """The vpunpck tree over rows of `length` elements: `whole` elements make 128 bits, `unit` of them stay together."""
    if len(rows) == 1:
        return list(rows)
    results = []
    for half in (0, whole // 2):
        firsts = [start + half + i for start in range(0, length, whole) for i in range(0, whole // 2, unit)]
        order = [source + first + i for first in firsts for source in (0, length) for i in range(unit)]
        pairs = [shuffle([even, odd], order) for even, odd in zip(rows[::2], rows[1::2], strict=True)]
        results += _unpack(pairs, whole, length, unit * 2, shuffle)
    return results
