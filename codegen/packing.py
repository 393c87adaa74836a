"""Weights in the layout that kernels read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.block_sparse import BlockSparseMatrix
from tilewright.codegen.budget import EMPTY, LANES, share_lanes
from tilewright.codegen.decisions import Family, LinearDecisions
from tilewright.codegen.kernels.linear import index_step
from tilewright.codegen.tiles import TILE
from tilewright.codegen.workload import PARTS
from tilewright.errors import UnsupportedModel
from tilewright.manifest import Role

Array = NDArray[np.generic]

_EPILOGUE = 8
"""Entries that cost as much as what is done once for a row-block, roughly: entries and epilogues both grow with its outputs."""


@dataclass(frozen=True)
class PackedLinear:
    """The first arguments of a linear kernel after x: weight, and index, indptr and parts of a sparse one.

    stored: weights inside kept blocks (padding not counted). rows: row-blocks that the kernel finishes together.
    """

    stored: int
    weight: Array
    index: Array | None = None
    indptr: NDArray[np.int32] | None = None
    rows: int = 1

    @property
    def parts(self) -> NDArray[np.uint16] | None:
        """u16[PARTS + 1]: the row-block (in units of `rows`) each part of equal work begins with; parts of few may be empty.

        Work is counted in entries, and a row-block's epilogue as _EPILOGUE more.
        """
        if self.indptr is None:
            return None
        work = (self.indptr + _EPILOGUE * np.arange(len(self.indptr)))[:: self.rows]
        wanted = np.arange(PARTS + 1) * work[-1] / PARTS
        middles: NDArray[np.float64] = (work[1:] + work[:-1]) / 2
        first: NDArray[np.intp] = np.searchsorted(middles, wanted)
        return first.astype(np.uint16)

    @property
    def roles(self) -> dict[str, Role]:
        """Roles of those arguments that kernels use as places in memory."""
        return {} if self.index is None else {"index": "addresses", "indptr": "addresses", "parts": "addresses"}

    def arguments(self) -> dict[str, Array]:
        """Name to array, in the kernel's order."""
        named = {"weight": self.weight, "index": self.index, "indptr": self.indptr, "parts": self.parts}
        return {name: array for name, array in named.items() if array is not None}


def pack_linear(made: LinearDecisions, weight: NDArray[np.int8]) -> PackedLinear:
    """Pack weight s8[N, K] as `made` says; raises UnsupportedModel if its shape does not fit the packing."""
    n, k = weight.shape
    pack = made.operands.pack
    if made.block is None:
        width = made.row_block
        packed = weight.reshape(n // width, width, k // pack, pack).transpose(0, 2, 1, 3)
        return PackedLinear(weight.size, np.ascontiguousarray(packed[:, :, None]))
    matrix = BlockSparseMatrix.from_dense(weight, made.block)
    row_blocks = n // made.row_block
    if row_blocks > np.iinfo(np.uint16).max:
        raise UnsupportedModel(f"linear {n}x{k}: {row_blocks} row-blocks are more than 16 bits count; compile it as dense")
    return PACKERS[made.family](made, matrix)


def as_index(values: NDArray[np.integer], matrix: BlockSparseMatrix) -> NDArray[np.uint16]:
    """`values` in 16 bits; raises UnsupportedModel if they do not fit."""
    if values.max(initial=0) > np.iinfo(np.uint16).max:
        n, k = matrix.shape
        raise UnsupportedModel(f"linear {n}x{k}: {k} inputs are more than a 16-bit index reaches; compile it as dense")
    return values.astype(np.uint16)


def _pack_row(made: LinearDecisions, matrix: BlockSparseMatrix) -> PackedLinear:
    """Entries [bk / pack, bn, pack], one per block."""
    pack = made.operands.pack
    bn, bk = matrix.block
    weight = matrix.data.reshape(-1, bn, bk // pack, pack).transpose(0, 2, 1, 3)
    index, indptr = as_index(matrix.indices, matrix), matrix.indptr.astype(np.int32)
    return PackedLinear(matrix.data.size, *never_empty(weight, index), indptr)


def _pack_column(made: LinearDecisions, matrix: BlockSparseMatrix) -> PackedLinear:
    """Entries [parts, bn, bk / pack, pack], a block as it is for each partial sum; a row-block's last is filled with zeros."""
    pack = made.operands.pack
    bn, bk = matrix.block
    weight, index, indptr = in_entries(matrix, made.partial_sums)
    weight = weight.reshape(*index.shape, bn, bk // pack, pack).astype(made.operands.weight)
    return PackedLinear(matrix.data.size, *never_empty(weight, as_index(index, matrix)), indptr, made.rows_at_once)


def _pack_gather(made: LinearDecisions, matrix: BlockSparseMatrix) -> PackedLinear:
    """Entries [bn, pack] of `pack` non-zero columns each; the last entry of a row-block is filled with zero weights.

    With a depth, [bn, depth, pack] of depth * pack columns, among them zero ones wherever others would exceed the budget.
    """
    if made.depth:
        weight, index, indptr = _in_lanes(matrix, made.depth)
    else:
        weight, index, indptr = in_entries(matrix, made.operands.pack)
        weight = weight[..., 0].transpose(0, 2, 1)
    index *= index_step(made, matrix.shape[1])
    return PackedLinear(matrix.data.size, *never_empty(weight.astype(made.operands.weight), as_index(index, matrix)), indptr)


def _in_lanes(matrix: BlockSparseMatrix, depth: int) -> tuple[NDArray[np.int8], NDArray[np.int64], NDArray[np.int32]]:
    """Each row-block's columns as `share_lanes` puts them: [Z, bn, depth, 4], index [Z, depth * 4], indptr.

    Products 0, 1 and 2, 3 of each of depth are those of one lane.
    """
    bins = share_lanes(matrix.data[..., 0].astype(np.int8), matrix.indptr, depth)
    bn, pair = matrix.block[0], (LANES, depth, 2)
    weight = bins.weight.reshape(-1, *pair, bn).transpose(0, 4, 2, 1, 3).reshape(-1, bn, depth, 2 * LANES)
    index = np.where(bins.columns == EMPTY, 0, matrix.indices[bins.columns] if len(matrix.indices) else 0).astype(np.int64)
    index = index.reshape(-1, *pair).transpose(0, 2, 1, 3).reshape(-1, 2 * LANES * depth)
    if bins.excess.any():
        raise AssertionError("sums of 16 bits could overflow")
    return weight, index, (bins.indptr // LANES).astype(np.int32)


def _pack_tile_column(made: LinearDecisions, matrix: BlockSparseMatrix) -> PackedLinear:
    """Entries [bn, 16, pack] of 16 blocks each; the last entry of a row-block is filled with zero weights."""
    weight, index, indptr = in_entries(matrix, TILE)
    return PackedLinear(matrix.data.size, *never_empty(weight.transpose(0, 2, 1, 3), as_index(index, matrix)), indptr)


def in_entries(matrix: BlockSparseMatrix, size: int) -> tuple[NDArray[np.int8], NDArray[np.int64], NDArray[np.int32]]:
    """Each row-block's blocks in entries of `size`, the last filled with zeros: [Z, size, bn, bk], index [Z, size], indptr."""
    counts = np.diff(matrix.indptr)
    indptr = np.concatenate([[0], np.cumsum(-(-counts // size))])
    # position of every block in the padded sequence
    target = np.arange(len(matrix.indices)) + np.repeat(indptr[:-1] * size - matrix.indptr[:-1], counts)
    weight = np.zeros((indptr[-1] * size, *matrix.block), np.int8)
    index = np.zeros(indptr[-1] * size, np.int64)
    weight[target] = matrix.data
    index[target] = matrix.indices
    return weight.reshape(-1, size, *matrix.block), index.reshape(-1, size), indptr.astype(np.int32)


PACKERS: dict[Family, Callable[[LinearDecisions, BlockSparseMatrix], PackedLinear]] = {
    "row": _pack_row,
    "column": _pack_column,
    "gather": _pack_gather,
    "tile_column": _pack_tile_column,
}
"""Family to what packs a sparse matrix for it."""


def never_empty(weight: Array, index: Array) -> tuple[Array, Array]:
    """One entry that no kernel reads where a matrix has none: an empty array has no address to pass."""
    if len(index):
        return np.ascontiguousarray(weight), index
    return np.zeros((1, *weight.shape[1:]), weight.dtype), np.zeros((1, *index.shape[1:]), index.dtype)
