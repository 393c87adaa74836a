"""Packed weights, as `tilewright pack` stores them: the non-zero blocks of an s8 weight, and a bit for every block.

`NAME.weight_blocks` s8[count, block[0], block[1]] holds the blocks row-block by row-block; `NAME.weight_bitmask` has a bit for
each block of the weight in the same order, set where the block is stored, the most significant bit of a byte first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.block_sparse import BlockSparseMatrix
from tilewright.errors import InvalidModel
from tilewright.frontend.tensors import Checkpoint


def pack_weight(weight: NDArray[np.int8], block: tuple[int, int]) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """Blocks and bit mask of `weight` s8[N, K]."""
    matrix = BlockSparseMatrix.from_dense(weight, block)
    stored = np.zeros((weight.shape[0] // block[0], weight.shape[1] // block[1]), bool)
    stored[np.repeat(np.arange(len(stored)), np.diff(matrix.indptr)), matrix.indices] = True
    return matrix.data.astype(np.int8), np.packbits(stored)


def is_packed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the Linear `name` is stored packed."""
    return f"{name}.weight_blocks" in checkpoint


def packed_weight(checkpoint: Checkpoint, name: str, n: int, k: int) -> NDArray[np.int8]:
    """Take the packed weight of the Linear `name` as s8[n, k]; raises InvalidModel where blocks and bit mask do not fit."""
    data = checkpoint.integers(f"{name}.weight_blocks", np.int8, None, None, None)
    bits = checkpoint.integers(f"{name}.weight_bitmask", np.uint8, None)
    count, *block = data.shape
    if not all(block) or n % block[0] or k % block[1]:
        raise InvalidModel(f"tensor {name}.weight_blocks has blocks of {block}, which do not divide the weight of {n} x {k}")
    rows, columns = n // block[0], k // block[1]
    stored, rest = np.split(np.unpackbits(bits).astype(bool), [rows * columns])
    if len(bits) != -(-rows * columns // 8) or stored.sum() != count or rest.any():
        raise InvalidModel(
            f"tensor {name}.weight_bitmask does not mark the {count} blocks of weight_blocks among {rows} x {columns}; "
            "pack the checkpoint again"
        )
    grid = stored.reshape(rows, columns)
    indptr = np.concatenate([[0], grid.sum(1).cumsum()]).astype(np.int64)
    matrix = BlockSparseMatrix((n, k), (block[0], block[1]), indptr, np.nonzero(grid)[1].astype(np.int32), data)
    return matrix.to_dense().astype(np.int8)
