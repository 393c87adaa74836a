"""INT8 linear kernels: a sparse or dense product in one of two orientations, followed by one of three fused epilogues.

The sparse axis `e` runs over the whole width of the matrix, so that every loop is affine and all schedule primitives apply;
once scheduled, `codegen.trim` replaces its extent by the true count of the row-block, `indptr[nb + 1] - indptr[nb]`.
Reads of `index` and `indptr` are left out of the product's declared reads: tensorize compares operands one to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import DataType, tirx
from tvm.tirx.script import builder as T

from tilewright.codegen.kernels.common import GROUP, Expr, arg, at, prim_func, quantize, scratch, shape, stage, store
from tilewright.codegen.kernels.math import ACTIVATIONS
from tilewright.codegen.kernels.norm import Norm, norm_args, norm_outputs, norm_stages
from tilewright.codegen.workload import FAMILY_LANES, FAMILY_LAYOUT, Layout, Operands, Workload


@dataclass(frozen=True)
class Qkv:
    """Epilogue: the concatenated q, k, v as attention wants them.

    q, k: [G, H / pack, 16, pack], neighbouring channels of a token adjacent. v: [G, H, 16].
    """


@dataclass(frozen=True)
class Activate:
    """Epilogue: activation function, then u8 in the layout of the next linear."""

    activation: str
    consumer: Layout


@dataclass(frozen=True)
class AddNorm:
    """Epilogue: residual add and LayerNorm."""

    norm: Norm


@dataclass(frozen=True)
class Raw:
    """Epilogue: the int32 sums with the zero point folded in, [G, C, 16] or [G, 16, C]; what tests compare bit for bit."""


Epilogue = Qkv | Activate | AddNorm | Raw


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
            tile = acc[g, t, nb, ni] if layout == "rows" else acc[g, nb, ni, _lane_of(workload, t)]
            return tile + fold[nb * width + ni]

        def real(g: Expr, t: Expr, nb: Expr, ni: Expr) -> Expr:
            n = nb * width + ni
            return T.cast(integer(g, t, nb, ni), "float32") * scale[n] + bias[n]

        order = ("g", "t", "nb", "ni") if layout == "rows" else ("g", "nb", "ni", "t")
        extents = {"g": groups, "t": GROUP, "nb": workload.n // width, "ni": width}
        axes = {name: extents[name] for name in order}
        _EPILOGUES[type(epilogue)](workload, epilogue, axes, integer if isinstance(epilogue, Raw) else real, layout)

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


_PRODUCTS = {"row": _product_row, "column": _product_column, "gather": _product_gather}


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


def _epilogue_raw(workload: Workload, _: Raw, axes: dict[str, Expr], value: Any, layout: Layout) -> None:
    out = arg("sums", shape(layout, axes["g"], workload.n), "int32")
    with stage("epilogue", axes) as variables:
        axis = dict(zip(axes, variables, strict=True))
        store(out, value(**axis), at(layout, axis["g"], axis["t"], axis["nb"] * axes["ni"] + axis["ni"]))


def _epilogue_qkv(workload: Workload, _: Qkv, axes: dict[str, Expr], value: Any, layout: Layout) -> None:
    """Two blocks: `epilogue` quantises to s8 in the order of the accumulators, `scatter` stores `pack` channels at a time.

    Which of the three outputs a pack belongs to does not vary within it, because hidden is a multiple of pack.
    """
    operands, hidden, width = workload.operands, workload.n // 3, axes["ni"]
    groups, pack = axes["g"], operands.pack
    query = arg("query", [groups, hidden // pack, GROUP, pack], operands.attention)
    key = arg("key", [groups, hidden // pack, GROUP, pack], operands.key)
    values = arg("value", [groups, hidden, GROUP], operands.attention)
    small = scratch("small", list(axes.values()), operands.attention)
    with stage("epilogue", axes) as variables:
        real = value(**dict(zip(axes, variables, strict=True)))
        store(small, quantize(real, -127, 127, operands.attention), variables)

    def put(first: Expr, g: Expr, t: Expr, packed: Expr, channels: list[Expr], lanes: Expr) -> None:
        """Store the channels from `first` on: `packed` at `lanes` of their pack in q and k, `channels` one by one in v."""
        with T.If(first < hidden):
            with T.Then():
                store(query, packed, [g, first // pack, t, lanes])
            with T.Else(), T.If(first < 2 * hidden):
                with T.Then():
                    store(key, _offset(packed, operands, lanes.lanes), [g, first // pack - hidden // pack, t, lanes])
                with T.Else():
                    for index, channel in enumerate(channels):
                        last = t if layout == "rows" else tirx.Ramp(0, 1, GROUP)
                        store(values, channel, [g, first + index - 2 * hidden, last])

    whole = width % pack == 0  # else a pack spans row-blocks, and its channels are stored with a stride
    if layout == "columns":
        order = [GROUP * p + token for token in range(GROUP) for p in range(pack)]
        with stage("scatter", {"g": axes["g"], "nb": axes["nb"], "i": 1, "t": 1}) as (g, nb, i, t):
            T.reads(small[g, nb, i * width : i * width + width, t * GROUP : t * GROUP + GROUP])
            T.writes(query[g, :, :, :], key[g, :, :, :], values[g, :, :])
            for first in range(0, width, pack if whole else 1):
                n = nb * width + first
                rows = [
                    small.vload([g, nb, first + p, 0], f"{operands.attention}x{GROUP}") for p in range(pack if whole else 1)
                ]
                if whole:
                    put(n, g, 0, tirx.Shuffle(rows, order), rows, tirx.Ramp(0, 1, GROUP * pack))
                else:
                    put(n, g, 0, rows[0], rows, tirx.Ramp(n % pack, pack, GROUP))
    else:
        with stage("scatter", {"g": axes["g"], "t": GROUP, "nb": axes["nb"], "i": 1}) as (g, t, nb, i):
            T.reads(small[g, t, nb, i * width : i * width + width])
            T.writes(query[g, :, t, :], key[g, :, t, :], values[g, :, t])
            for first in range(0, width, pack):
                packed = small.vload([g, t, nb, first], f"{operands.attention}x{pack}")
                channels = [small[g, t, nb, first + p] for p in range(pack)]
                put(nb * width + first, g, t, packed, channels, tirx.Ramp(0, 1, pack))


def _offset(packed: Expr, operands: Operands, lanes: int) -> Expr:
    """`packed` s8 as the keys' dtype: adding 128 to a byte flips its highest bit."""
    if not operands.key_offset:
        return packed
    flipped = tirx.reinterpret(f"{operands.key}x{lanes}", packed)
    return tirx.bitwise_xor(flipped, tirx.Broadcast(tirx.const(operands.key_offset, operands.key), lanes))


def _epilogue_activate(workload: Workload, epilogue: Activate, axes: dict[str, Expr], value: Any, _: Layout) -> None:
    quant = arg("quant", [2], "float32")
    pack = workload.operands.pack
    out = arg("activated", shape(epilogue.consumer, axes["g"], workload.n, pack), workload.operands.activation)
    with stage("epilogue", axes) as variables:
        axis = dict(zip(axes, variables, strict=True))
        real = ACTIVATIONS[epilogue.activation](value(**axis)) * quant[0]
        index = at(epilogue.consumer, axis["g"], axis["t"], axis["nb"] * axes["ni"] + axis["ni"], pack)
        store(out, quantize(real, 0, 255, workload.operands.activation, quant[1]), index)


def _epilogue_add_norm(workload: Workload, epilogue: AddNorm, axes: dict[str, Expr], value: Any, _: Layout) -> None:
    norm, groups, hidden = epilogue.norm, axes["g"], workload.n
    residual = arg("residual", shape(norm.residual, groups, hidden), "float32")
    args = norm_args(hidden)
    outputs = norm_outputs(groups, hidden, norm, workload.operands)
    pre = scratch("pre", shape(norm.residual, groups, hidden), "float32")
    with stage("epilogue", axes) as variables:
        axis = dict(zip(axes, variables, strict=True))
        index = at(norm.residual, axis["g"], axis["t"], axis["nb"] * axes["ni"] + axis["ni"])
        store(pre, value(**axis) + residual[tuple(index)], index)
    norm_stages(pre, groups, hidden, norm, workload.operands, args, outputs)


_EPILOGUES: dict[type, Any] = {
    Raw: _epilogue_raw,
    Qkv: _epilogue_qkv,
    Activate: _epilogue_activate,
    AddNorm: _epilogue_add_norm,
}
