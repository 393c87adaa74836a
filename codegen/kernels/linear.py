"""INT8 linear kernels: a sparse or dense product of one of the families, followed by a fused epilogue.

The sparse axis `e` runs over the whole width of the matrix, so that every loop is affine and all schedule primitives apply;
once scheduled, `codegen.trim` replaces its extent by the true count of the row-block, `indptr[nb + 1] - indptr[nb]`.
Reads of `index` and `indptr` are left out of the product's declared reads: tensorize compares operands one to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import tvm
from tvm import DataType, tirx
from tvm.tirx.script import builder as T

from tilewright.codegen.buckets import in_buckets
from tilewright.codegen.decisions import FAMILY_LANES, Family, LinearDecisions
from tilewright.codegen.epilogues import Epilogue, Raw
from tilewright.codegen.kernels.common import GROUP, Expr, arg, prim_func, scratch, stage, store
from tilewright.codegen.kernels.epilogue import EPILOGUES, orders_bytes
from tilewright.codegen.kernels.interleave import in_order, interleave
from tilewright.codegen.kernels.nest import Nest, Value
from tilewright.codegen.kernels.tiles import product_tiles
from tilewright.codegen.tiles import TILE
from tilewright.codegen.workload import PARTS, KernelSpec

INDEX_BYTES = 8
"""A gathered row's index is its offset in units of this many bytes: the largest scale an x86 address can apply for free."""


def index_step(made: LinearDecisions, k: int) -> int:
    """By how much a gathered row's index is higher than that of the row before: their distance in the widest tile.

    If 16 bits do not hold that for all `k` rows, it is the distance in a smaller one. Other tiles scale the index.
    """
    row = GROUP * int(DataType(made.operands.activation).bits) // 8 // INDEX_BYTES
    return next((row * tile for tile in made.input.tiles if (k - 1) * row * tile < 1 << 16), row)


def _nests(made: LinearDecisions, groups: Expr) -> Iterator[tuple[int, Expr, Expr]]:
    """Tile size, first group and number of tiles of each nest.

    The maxima change no value. A loop of which TVM's region analysis sees that it runs at most once, or does not see that it
    cannot run a negative number of times, ends as a loop inside the tile.
    """
    first: Expr = None
    for tile in made.token_tiles:
        whole = groups // tile * tile
        if first is None:
            yield tile, 0, groups // tile
            first = T.max(whole, groups // (2 * tile) * (2 * tile))
        else:
            yield tile, first, T.max(groups // tile - first // tile, 0)
            first = T.max(first, whole)


def linear(spec: KernelSpec, epilogue: Epilogue) -> tvm.tirx.PrimFunc:
    """The kernel of `spec`, whose decisions it follows; those of its buckets come along (`codegen/buckets.py`).

    Arguments: x (activation dtype, family's layout), the packed weights of `packing.pack_linear` (weight, and for sparse
    blocks index u16, indptr i32 and parts u16), fold i32[N], scale f32[N], bias f32[N], the epilogue's own arguments, its
    outputs. The integer part of output n of token t is sum(x * w) + fold[n]; the value is that times scale[n] plus bias[n].
    Raises ScheduleMismatch if decisions of buckets read other arguments.
    """
    return in_buckets(spec, lambda own: _linear(own, epilogue))


def _linear(spec: KernelSpec, epilogue: Epilogue) -> tvm.tirx.PrimFunc:
    def body() -> None:
        made, groups = spec.linear, tirx.Var("G", "int32")
        lanes, width = FAMILY_LANES[made.family], made.row_block * made.rows_at_once
        x = arg("x", made.input.shape(groups, spec.k), made.input.dtype)
        weights = WEIGHTS[made.family](spec)
        fold = arg("fold", [spec.n], "int32")
        scale = arg("scale", [spec.n], "float32")
        bias = arg("bias", [spec.n], "float32")
        with EPILOGUES[type(epilogue)](spec, epilogue, groups, lanes) as emit:
            for tile, first, count in _nests(made, groups):
                extents = {"q": count, "t": GROUP, "nb": spec.n // width, "ni": width, "j": tile}
                order = ("q", "t", "nb", "ni") if lanes == "rows" else ("q", "nb", "ni", "j", "t")
                mixed = made.family == "gather" and tile > 1 and orders_bytes(epilogue, tile, made.halves)
                nest = Nest(tile, first, count, {name: extents[name] for name in order}, mixed)
                sums = PRODUCTS[made.family](spec, nest, x, weights)

                def integer(axis: dict[str, Expr], nest: Nest = nest, sums: Value = sums) -> Expr:
                    return sums(axis) + fold[nest.output(axis)]

                def real(axis: dict[str, Expr], nest: Nest = nest, integer: Value = integer) -> Expr:
                    n = nest.output(axis)
                    return T.cast(integer(axis), "float32") * scale[n] + bias[n]

                emit(nest, integer if isinstance(epilogue, Raw) else real)

    return prim_func(spec, body)


@dataclass(frozen=True)
class Weights:
    """The arguments that hold a matrix; index and indptr are None if it is dense."""

    weight: Any
    index: Any = None
    indptr: Any = None

    def entry(self, nb: Expr, e: Expr) -> Expr:
        """Where entry e of row-block nb is stored; 64 bits spare the address a conversion in the inner loop."""
        return T.cast(self.indptr[nb], "int64") + T.cast(e, "int64")


def _weights_row(spec: KernelSpec) -> Weights:
    """weight s8[entries, bk / pack, bn, pack]; a dense matrix is s8[N / bn, K / pack, 1, bn, pack]."""
    made = spec.linear
    pack, width = made.operands.pack, made.row_block
    if made.block is None:
        return Weights(arg("weight", [spec.n // width, spec.k // pack, 1, width, pack], "int8"))
    return sparse_args(spec, [made.block[1] // pack, width, pack], [], "int8")


def _weights_gather(spec: KernelSpec) -> Weights:
    """weight[entries, bn, pack], index u16[entries, pack]; of a depth, [entries, bn, depth, pack], [entries, depth * pack]."""
    made, held = spec.linear, spec.linear.operands
    if not made.depth:
        return sparse_args(spec, [made.row_block, held.pack], [held.pack], held.weight)
    return sparse_args(spec, [made.row_block, made.depth, held.pack], [made.depth * held.pack], held.weight)


def _weights_column(spec: KernelSpec) -> Weights:
    """weight[entries, parts, bn, bk / pack, pack] and index u16[entries, parts]: a block as it is for each partial sum."""
    made = spec.linear
    assert made.block is not None
    pack, parts, (width, inner) = made.operands.pack, made.partial_sums, made.block
    return sparse_args(spec, [parts, width, inner // pack, pack], [parts], made.operands.weight)


def _weights_tile_column(spec: KernelSpec) -> Weights:
    """weight s8[entries, bn, 16, 4] and index u16[entries, 16]: 16 blocks are one entry."""
    return sparse_args(spec, [spec.linear.row_block, TILE, spec.linear.operands.pack], [TILE], "int8")


WEIGHTS: dict[Family, Callable[[KernelSpec], Weights]] = {
    "row": _weights_row,
    "column": _weights_column,
    "gather": _weights_gather,
    "tile_row": _weights_row,
    "tile_column": _weights_tile_column,
}
"""Family to what declares the arguments that hold a matrix."""


def accumulators(nest: Nest, name: str = "acc") -> Any:
    """A buffer of the nest's axes."""
    return scratch(nest.block(name), list(nest.axes.values()), "int32")


def as_summed(nest: Nest, buffer: Any) -> Value:
    """The value of an accumulator in `buffer`, which has the nest's axes."""
    return lambda axis: buffer[tuple(axis[name] for name in nest.axes)]


def _product_row(spec: KernelSpec, nest: Nest, x: Any, weights: Weights) -> Value:
    """acc[q, t, nb, ni]: weights are vectors of outputs."""
    acc = accumulators(nest)
    made, weight = spec.linear, weights.weight
    pack = made.operands.pack
    inner = pack if made.block is None else made.block[1]
    reduced = {"e": spec.k // inner, "kp": inner // pack, "ki": pack}
    with stage(nest.block("product"), nest.axes, reduced) as (q, t, nb, ni, e, kp, ki):
        g = nest.group({"q": q})
        if weights.index is None:
            left, right = x[g, t, e * pack + ki], weight[nb, e, kp, ni, ki]
        else:
            entry = weights.entry(nb, e)
            left = x[g, t, T.cast(weights.index[entry], "int32") * inner + kp * pack + ki]
            right = weight[entry, kp, ni, ki]
        multiply_add(acc, [q, t, nb, ni], left, right)
    return as_summed(nest, acc)


def _product_gather(spec: KernelSpec, nest: Nest, x: Any, weights: Weights) -> Value:
    """acc[q, nb, ni, j, lane]: `pack` rows of x, each of all tokens of the tile, are interleaved first; ordered has the tokens.

    Rows are interleaved as whole vectors, because a row is chosen at run time and tensorize matches no buffer region that is.
    With a depth that is done for d < depth times `pack` rows, whose products are summed at once.
    """
    made, tile, axes, index, acc = spec.linear, nest.tile, nest.axes, weights.index, accumulators(nest)
    pack, stored, depth = made.operands.pack, made.operands.activation, max(made.depth, 1)
    halved = made.halves and tile > 1
    vectors = tile // 2 if halved else tile  # of those that interleaving makes, so many are multiplied together
    # at most so many: with a depth, any of an entry's columns but one may be zero
    entries = spec.k if made.depth else -(-spec.k // pack)
    gathered = scratch(nest.block("gathered"), [axes["q"], axes["nb"], entries, tile, depth, GROUP, pack], stored)
    # the unit axes t and p carry the written region, which compute_at has to find in terms of axes
    loops = {"q": axes["q"], "nb": axes["nb"], "e": entries, "j": tile // vectors, "t": 1, "p": 1}
    with stage(nest.block("gather"), loops) as (q, nb, e, j, t, p):
        g, entry = nest.group({"q": q}), weights.entry(nb, e)
        T.reads(x[g : g + tile, 0 : spec.k, 0:GROUP], index[entry, 0 : depth * pack])
        extents = ((j, vectors), (t, depth), (t, GROUP), (p, pack))
        T.writes(gathered[(q, nb, e, *(slice(axis * extent, axis * extent + extent) for axis, extent in extents))])
        scale = tile * GROUP // index_step(made, spec.k)
        offsets = [T.cast(index[entry, column], "int64") * scale for column in range(depth * pack)]
        rows = [x.vload([g, 0, offset], f"{stored}x{tile * GROUP}") for offset in offsets]
        made_of = [interleave(rows[first : first + pack], pack, tile, halved) for first in range(0, depth * pack, pack)]

        def fill(numbers: range) -> None:
            for d, number in product(range(depth), numbers):
                store(gathered, made_of[d][number], [q, nb, e, number, d, 0, tirx.Ramp(0, 1, GROUP * pack)])

        if halved:  # the schedule unrolls j
            with T.If(j == 0):
                with T.Then():
                    fill(range(vectors))
                with T.Else():
                    fill(range(vectors, tile))
        else:
            fill(range(tile))
    reduced = {"e": entries, "d": depth, "ki": pack} if made.depth > 1 else {"e": entries, "ki": pack}
    with stage(nest.block("product"), axes, reduced) as (q, nb, ni, j, t, e, *deep, ki):
        (d,) = deep or (0,)
        weight = (weights.entry(nb, e), ni, d, ki) if made.depth else (weights.entry(nb, e), ni, ki)
        multiply_add(acc, [q, nb, ni, j, t], gathered[q, nb, e, j, d, t, ki], weights.weight[weight])

    if nest.mixed:
        return as_summed(nest, acc)
    ordered = accumulators(nest, "ordered")
    with stage(nest.block("order"), {"q": axes["q"], "nb": axes["nb"], "ni": axes["ni"], "j": 1, "t": 1}) as (q, nb, ni, j, t):
        T.reads(acc[q, nb, ni, j * tile : j * tile + tile, t * GROUP : t * GROUP + GROUP])
        T.writes(ordered[q, nb, ni, j * tile : j * tile + tile, t * GROUP : t * GROUP + GROUP])
        sums = [acc.vload([q, nb, ni, part, 0], f"int32x{GROUP}") for part in range(tile)]
        for part, vector in enumerate(in_order(sums, pack, tile, halved)):
            store(ordered, vector, [q, nb, ni, part, tirx.Ramp(0, 1, GROUP)])
    return as_summed(nest, ordered)


def _product_column(spec: KernelSpec, nest: Nest, x: Any, weights: Weights) -> Value:
    """acc[q, nb, ni, j, t]: tokens stand packed, so a block's inputs are vectors; p is the block within an entry."""
    made = spec.linear
    assert made.block is not None
    pack, parts, inner = made.operands.pack, made.partial_sums, made.block[1]
    packs, rows, acc = inner // pack, made.rows_at_once, accumulators(nest)
    reduced = {"e": -(-spec.k // inner // parts), "p": parts, "kp": packs, "ki": pack}
    with stage(nest.block("product"), nest.axes, reduced) as (q, nb, ni, j, t, e, p, kp, ki):
        row, n = (nb, ni) if rows == 1 else (nb * rows + ni, 0)
        entry = weights.entry(row, e)
        left = x[nest.group({"q": q, "j": j}), T.cast(weights.index[entry, p], "int32") * packs + kp, t, ki]
        multiply_add(acc, [q, nb, ni, j, t], left, weights.weight[entry, p, n, kp, ki])
    return as_summed(nest, acc)


def _product_tiles(spec: KernelSpec, nest: Nest, x: Any, weights: Weights) -> Value:
    """acc[q, nb, t, ni] (tile_row) or acc[q, nb, ni, t] (tile_column)."""
    acc = product_tiles(spec, x, nest.count, weights.weight, weights.index, weights.indptr)
    order = ("q", "nb", "t", "ni") if spec.linear.family == "tile_row" else ("q", "nb", "ni", "t")
    return lambda axis: acc[tuple(axis[name] for name in order)]


PRODUCTS: dict[Family, Callable[[KernelSpec, Nest, Any, Weights], Value]] = {
    "row": _product_row,
    "column": _product_column,
    "gather": _product_gather,
    "tile_row": _product_tiles,
    "tile_column": _product_tiles,
}
"""Family to what emits the blocks of a nest that sum its products."""


def sparse_args(spec: KernelSpec, entry: list[int], index: list[int], dtype: str) -> Weights:
    """Declare weight[Z, *entry], index u16[Z, *index], indptr i32[N / bn + 1] and parts; Z is the number of stored entries."""
    stored = tirx.Var("Z", "int32")
    weights = Weights(
        arg("weight", [stored, *entry], dtype),
        arg("index", [stored, *index], "uint16"),
        arg("indptr", [spec.n // spec.linear.row_block + 1], "int32"),
    )
    arg("parts", [PARTS + 1], "uint16")  # for `codegen.trim`; unsigned, so that offsets into scratch can be seen to be 0
    return weights


def multiply_add(acc: Any, indices: list[Expr], left: Expr, right: Expr) -> None:
    """acc[indices] += i32(left) * i32(right), reads declared as [left, right] only."""
    T.reads(left, right)
    T.writes(acc[tuple(indices)])
    with T.init():
        store(acc, 0, indices)
    store(acc, acc[tuple(indices)] + T.cast(left, "int32") * T.cast(right, "int32"), indices)
