"""Rows of tokens to vectors in which the channels of a token are adjacent, in the order that is cheapest on x86."""

from __future__ import annotations

from tvm import tirx

from tilewright.codegen.kernels.common import GROUP, Expr


def interleave(rows: list[Expr], pack: int, tile: int) -> list[Expr]:
    """`tile` vectors [16, pack] from `pack` rows of tile * 16 tokens each, which come out in the order of `lane_of`.

    The order is that of vpunpck, which works within 128 bits; sums are put in order once, entries are many.
    """
    tokens = tile * GROUP
    if tile == pack:
        return _unpack(rows, 4 * pack, tokens, 1)
    token_of = {lane_of(token, pack, 1): token for token in range(GROUP)}
    return [tirx.Shuffle(rows, [GROUP * p + token_of[0, lane] for lane in range(GROUP) for p in range(pack)])]


def _unpack(rows: list[Expr], whole: int, tokens: int, unit: int) -> list[Expr]:
    """The vpunpck tree: `whole` elements make 128 bits, `unit` of them stay together."""
    if len(rows) == 1:
        return rows
    results = []
    for half in (0, whole // 2):
        firsts = [start + half + i for start in range(0, tokens, whole) for i in range(0, whole // 2, unit)]
        order = [source + first + i for first in firsts for source in (0, tokens) for i in range(unit)]
        pairs = [tirx.Shuffle([even, odd], order) for even, odd in zip(rows[::2], rows[1::2], strict=True)]
        results += _unpack(pairs, whole, tokens, unit * 2)
    return results


def lane_of(token: int, pack: int, tile: int) -> tuple[int, int]:
    """The vector of `interleave`, and the lane in it, in which `token` of a tile comes out.

    Of the tokens in 128 bits, four at a time come out together: the first fours of all 128 bits, then the second, ...
    """
    whole = 4 * pack
    quad, lane = token % whole // 4, token // whole * 4 + token % 4
    return (quad, lane) if tile == pack else (0, quad * (GROUP // pack) + lane)
