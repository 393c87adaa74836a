"""INT8 linear kernels: a sparse or dense product of one of three families, followed by a fused epilogue.

The sparse axis `e` runs over the whole width of the matrix, so that every loop is affine and all schedule primitives apply;
once scheduled, `codegen.trim` replaces its extent by the true count of the row-block, `indptr[nb + 1] - indptr[nb]`.
Reads of `index` and `indptr` are left out of the product's declared reads: tensorize compares operands one to one.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import DataType, tirx
from tvm.tirx.script import builder as T

from tilewright.codegen.kernels.common import GROUP, Expr, arg, prim_func, scratch, shape, stage, store
from tilewright.codegen.kernels.epilogue import EPILOGUES, Epilogue, Raw
from tilewright.codegen.kernels.tiles import product_tiles
from tilewright.codegen.tiles import TILE
from tilewright.codegen.workload import FAMILY_LANES, FAMILY_LAYOUT, Workload


def row_block(workload: Workload) -> int:
    """Outputs of one row-block as stored: the sparse block's, or the packing unit of a dense matrix."""
    if workload.block is not None:
        return workload.block[0]
    return next(width for width in workload.operands.row_blocks if workload.n % width == 0)


INDEX_BYTES = 8
"""A gathered row's index is its offset in units of this many bytes: the largest scale an x86 address can apply for free."""


def linear(workload: Workload, epilogue: Epilogue) -> tvm.tirx.PrimFunc:
    """The kernel of `workload`.

    Arguments: x (activation dtype, family's layout), the packed weights of `packing.pack_linear` (weight, and for sparse
    blocks index u16 and indptr i32), fold i32[N], scale f32[N], bias f32[N], the epilogue's own arguments, its outputs.
    The integer part of output n of token t is sum(x * w) + fold[n]; the real value is that times scale[n] plus bias[n].
    """

    def body() -> None:
        assert workload.family is not None
        groups = tirx.Var("G", "int32")
        layout = FAMILY_LANES[workload.family]
        x = arg(
            "x", shape(FAMILY_LAYOUT[workload.family], groups, workload.k, workload.operands.pack), workload.operands.activation
        )
        acc = _PRODUCTS[workload.family](workload, x, groups)
        fold = arg("fold", [workload.n], "int32")
        scale = arg("scale", [workload.n], "float32")
        bias = arg("bias", [workload.n], "float32")
        width = row_block(workload)

        def integer(g: Expr, t: Expr, nb: Expr, ni: Expr) -> Expr:
            if workload.family == "tile_row":
                sums = acc[g, nb, t, ni]
            else:
                sums = acc[g, t, nb, ni] if layout == "rows" else acc[g, nb, ni, _lane_of(workload, t)]
            return sums + fold[nb * width + ni]

        def real(g: Expr, t: Expr, nb: Expr, ni: Expr) -> Expr:
            n = nb * width + ni
            return T.cast(integer(g, t, nb, ni), "float32") * scale[n] + bias[n]

        order = ("g", "t", "nb", "ni") if layout == "rows" else ("g", "nb", "ni", "t")
        extents = {"g": groups, "t": GROUP, "nb": workload.n // width, "ni": width}
        axes = {name: extents[name] for name in order}
        EPILOGUES[type(epilogue)](workload, epilogue, axes, integer if isinstance(epilogue, Raw) else real, layout)

    return prim_func(workload, body)


def _product_row(workload: Workload, x: Any, groups: Expr) -> Any:
    """acc[g, t, nb, ni] over weight s8[entries, bk / pack, bn, pack]; a dense matrix has K / pack entries per row-block."""
    pack, width = workload.operands.pack, row_block(workload)
    blocks = workload.n // width
    if workload.block is None:
        inner, entries = pack, workload.k // pack
        weight = arg("weight", [blocks, entries, 1, width, pack], "int8")
        index: Any = None
        indptr: Any = None
    else:
        inner, entries = workload.block[1], workload.k // workload.block[1]
        weight, index, indptr = _sparse_args([inner // pack, width, pack], [], blocks, "int8")
    acc = scratch("acc", [groups, GROUP, blocks, width], "int32")
    reduced = {"e": entries, "kp": inner // pack, "ki": pack}
    with stage("product", {"g": groups, "t": GROUP, "nb": blocks, "ni": width}, reduced) as (g, t, nb, ni, e, kp, ki):
        if index is None:
            left, right = x[g, t, e * pack + ki], weight[nb, e, kp, ni, ki]
        else:
            entry = indptr[nb] + e
            left = x[g, t, T.cast(index[entry], "int32") * inner + kp * pack + ki]
            right = weight[entry, kp, ni, ki]
        _multiply_add(acc, [g, t, nb, ni], left, right)
    return acc


def _product_gather(workload: Workload, x: Any, groups: Expr) -> Any:
    """acc[g, nb, ni, lane] over weight[entries, bn, pack] and index u16[entries, pack]: `pack` rows of x are interleaved first.

    The interleaved tokens stand in the order of `_LANES`. Rows are interleaved as whole vectors, because a row is chosen at
    run time and tensorize matches no buffer region that is.
    """
    pack, width = workload.operands.pack, row_block(workload)
    blocks, entries = workload.n // width, -(-workload.k // pack)
    weight, index, indptr = _sparse_args([width, pack], [pack], blocks, workload.operands.weight)
    gathered = scratch("gathered", [groups, blocks, entries, GROUP, pack], workload.operands.activation)
    acc = scratch("acc", [groups, blocks, width, GROUP], "int32")
    order = [GROUP * p + token for token in _LANES[pack] for p in range(pack)]
    # the unit axes t and p carry the written region, which compute_at has to find in terms of axes
    with stage("gather", {"g": groups, "nb": blocks, "e": entries, "t": 1, "p": 1}) as (g, nb, e, t, p):
        T.reads(x[g, 0 : workload.k, 0:GROUP], index[indptr[nb] + e, 0:pack])
        T.writes(gathered[g, nb, e, t * GROUP : t * GROUP + GROUP, p * pack : p * pack + pack])
        unit = INDEX_BYTES * 8 // DataType(workload.operands.activation).bits
        offsets = [T.cast(index[indptr[nb] + e, column], "int64") * unit for column in range(pack)]
        rows = [x.vload([g, 0, offset], f"{workload.operands.activation}x{GROUP}") for offset in offsets]
        store(gathered, tirx.Shuffle(rows, order), [g, nb, e, 0, tirx.Ramp(0, 1, GROUP * pack)])
    spatial = {"g": groups, "nb": blocks, "ni": width, "t": GROUP}
    with stage("product", spatial, {"e": entries, "ki": pack}) as (g, nb, ni, t, e, ki):
        _multiply_add(acc, [g, nb, ni, t], gathered[g, nb, e, t, ki], weight[indptr[nb] + e, ni, ki])
    return acc


def _product_column(workload: Workload, x: Any, groups: Expr) -> Any:
    """acc[g, nb, ni, t] over weight[entries, bn, bk / pack, pack]: tokens stand packed, so a block's inputs are vectors."""
    assert workload.block is not None
    pack, (width, inner) = workload.operands.pack, workload.block
    blocks, entries, packs = workload.n // width, workload.k // inner, inner // pack
    weight, index, indptr = _sparse_args([width, packs, pack], [], blocks, workload.operands.weight)
    acc = scratch("acc", [groups, blocks, width, GROUP], "int32")
    spatial = {"g": groups, "nb": blocks, "ni": width, "t": GROUP}
    with stage("product", spatial, {"e": entries, "kp": packs, "ki": pack}) as (g, nb, ni, t, e, kp, ki):
        entry = indptr[nb] + e
        left = x[g, T.cast(index[entry], "int32") * packs + kp, t, ki]
        _multiply_add(acc, [g, nb, ni, t], left, weight[entry, ni, kp, ki])
    return acc


def _product_tile_row(workload: Workload, x: Any, groups: Expr) -> Any:
    """acc[g, nb, t, ni] over weight s8[blocks, K / 4, 1, width, 4], the packing of a dense row kernel."""
    pack, width = workload.operands.pack, row_block(workload)
    weight = arg("weight", [workload.n // width, workload.k // pack, 1, width, pack], "int8")
    return product_tiles(workload, x, groups, width, weight, None, None)


def _product_tile_column(workload: Workload, x: Any, groups: Expr) -> Any:
    """acc[g, nb, ni, t] over weight s8[entries, bn, 16, 4] and index u16[entries, 16]: 16 blocks are one entry."""
    width = row_block(workload)
    sparse = _sparse_args([width, TILE, workload.operands.pack], [TILE], workload.n // width, "int8")
    return product_tiles(workload, x, groups, width, *sparse)


_PRODUCTS = {
    "row": _product_row,
    "column": _product_column,
    "gather": _product_gather,
    "tile_row": _product_tile_row,
    "tile_column": _product_tile_column,
}


_LANES = {
    # vpunpck works within 128-bit halves: quads of tokens 0, 2 and 1, 3 come out together
    2: [0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15],
    4: list(range(GROUP)),
}
"""Pack to the token of each lane of an interleaved group."""


def _lane_of(workload: Workload, token: Expr) -> Expr:
    """The lane of `token`: in gather kernels the inverse of _LANES, which for pairs swaps the two middle quads."""
    swapped = workload.family == "gather" and workload.operands.pack == 2
    return token % 8 // 4 * 8 + token // 8 * 4 + token % 4 if swapped else token


def _sparse_args(entry: list[int], index: list[int], blocks: int, dtype: str) -> tuple[Any, Any, Any]:
    """Declare weight[Z, *entry], index u16[Z, *index] and indptr i32[blocks + 1]; Z is the number of stored entries."""
    stored = tirx.Var("Z", "int32")
    return (
        arg("weight", [stored, *entry], dtype),
        arg("index", [stored, *index], "uint16"),
        arg("indptr", [blocks + 1], "int32"),
    )


def _multiply_add(acc: Any, indices: list[Expr], left: Expr, right: Expr) -> None:
    """acc[indices] += i32(left) * i32(right), reads declared as [left, right] only."""
    T.reads(left, right)
    T.writes(acc[tuple(indices)])
    with T.init():
        store(acc, 0, indices)
    store(acc, acc[tuple(indices)] + T.cast(left, "int32") * T.cast(right, "int32"), indices)
