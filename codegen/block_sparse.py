"""Block-sparse row (BSR) matrices: the one in-memory form of a sparse weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.decisions import Block, Storage
from tilewright.errors import InvalidModel

BLOCKS: dict[Block, tuple[Storage, ...]] = {
    (1, 4): (Storage("column", (1, 4)),),
    (4, 1): (Storage("gather", (4, 1)),),
    (4, 4): (Storage("column", (4, 4)), Storage("gather", (4, 1))),
    (8, 1): (Storage("gather", (8, 1)), Storage("gather", (4, 1))),
    (8, 2): (Storage("row", (8, 2)), Storage("gather", (8, 1)), Storage("gather", (4, 1))),
    (8, 4): (Storage("column", (8, 4)), Storage("column", (4, 4)), Storage("gather", (4, 1))),
    (16, 1): (Storage("gather", (16, 1)), Storage("gather", (4, 1))),
    (16, 4): (Storage("tile_column", (16, 4)), Storage("row", (16, 4)), Storage("gather", (4, 1))),
    (32, 4): (Storage("tile_column", (32, 4)), Storage("row", (32, 4)), Storage("gather", (4, 1))),
}
"""Block shapes (outputs, inputs) that `detect_block` looks for, each with the ways to store it, best first.

The first that is legal and fits the registers of an ISA level is used, but before it one that gathers, where only gathering
multiplies bytes (`schedules/choice.py`). It may be of smaller blocks, as (8, 1) blocks are stored as (4, 1) where registers
are few for their tile. `register_block` adds a shape.
"""

NOTABLE_SPARSITY = 0.05
"""The share of zero blocks from which `detect_block` reports a shape: less is what single zeros give by chance.

Whether it pays to skip them is not decided here but in `schedules/choice.py`.
"""


@dataclass(frozen=True)
class BlockSparseMatrix:
    """A matrix [N, K] = [outputs, inputs] of which only the non-zero blocks are stored.

    Layout: row-block `r` covers outputs `r*bn .. r*bn+bn` and owns entries `indptr[r] .. indptr[r+1]`;
    entry `i` covers inputs `indices[i]*bk .. indices[i]*bk+bk` and holds `data[i]` of shape [bn, bk].
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    data: NDArray[np.generic]

    @classmethod
    def from_dense(cls, dense: NDArray[np.generic], block: tuple[int, int]) -> BlockSparseMatrix:
        """Keep the blocks of dense [N, K] that have a non-zero value; raises InvalidModel if `block` does not divide it."""
        blocks = _blocks(dense, block)
        keep = blocks.any(axis=(2, 3))
        rows, columns = np.nonzero(keep)
        indptr = np.zeros(keep.shape[0] + 1, np.int64)
        np.cumsum(keep.sum(axis=1), out=indptr[1:])
        n, k = dense.shape
        return cls((n, k), block, indptr, columns.astype(np.int32), np.ascontiguousarray(blocks[rows, columns]))

    def to_dense(self) -> NDArray[np.generic]:
        """The matrix [N, K] with its zeros."""
        n, k = self.shape
        bn, bk = self.block
        blocks = np.zeros((n // bn, k // bk, bn, bk), self.data.dtype)
        rows = np.repeat(np.arange(n // bn), np.diff(self.indptr))
        blocks[rows, self.indices] = self.data
        return blocks.transpose(0, 2, 1, 3).reshape(n, k)

    @property
    def density(self) -> float:
        """Share of blocks that are stored, 0..1."""
        (n, k), (bn, bk) = self.shape, self.block
        return len(self.indices) / ((n // bn) * (k // bk))


def block_density(dense: NDArray[np.generic], block: tuple[int, int]) -> float | None:
    """Share of blocks of dense [N, K] that hold a non-zero value, or None if `block` does not divide the matrix."""
    if dense.shape[0] % block[0] or dense.shape[1] % block[1]:
        return None
    return float(_blocks(dense, block).any(axis=(2, 3)).mean())


def detect_block(dense: NDArray[np.generic]) -> Block | None:
    """The largest shape of BLOCKS that explains the zero blocks of dense [N, K], or None for a dense matrix.

    A shape explains them when its share of zero blocks reaches NOTABLE_SPARSITY and is within one point of the best shape's:
    a block larger than the pruned one would store zeros. Zero elements are not counted, because quantisation rounds
    small weights inside kept blocks to zero.
    """
    zeros = {block: 1.0 - density for block in BLOCKS if (density := block_density(dense, block)) is not None}
    best = max(zeros.values(), default=0.0)
    if best < NOTABLE_SPARSITY:
        return None
    return max((block for block, zero in zeros.items() if zero >= best - 0.01), key=lambda block: block[0] * block[1])


def _blocks(dense: NDArray[np.generic], block: tuple[int, int]) -> NDArray[np.generic]:
    """View of dense [N, K] as [N/bn, K/bk, bn, bk]."""
    (n, k), (bn, bk) = dense.shape, block
    if n % bn or k % bk:
        raise InvalidModel(f"matrix {n}x{k} is not a multiple of block {bn}x{bk}; choose a block that divides it")
    return dense.reshape(n // bn, bn, k // bk, bk).transpose(0, 2, 1, 3)
