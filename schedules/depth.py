"""How many results of vpmaddubsw a byte kernel adds in 16 bits: decided on the matrix, by the slots that packing would take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.block_sparse import BlockSparseMatrix
from tilewright.codegen.budget import share_lanes

SLOT_COST = {1: 1.12, 2: 1.0}
"""What a slot costs in a kernel of either depth, in slots of depth 2: 44 instructions serve 256 products, or 73 serve 512."""

ROW_COST = 1.18
"""What a weight of a dense row kernel costs, whose products are of 16 bits: GMAC/s of both on Zen 3, 68 and 80."""

SAMPLE = 32
"""Row-blocks, evenly spaced, that stand for a matrix."""


@dataclass(frozen=True)
class Depth:
    """The best depth for a matrix, and what a non-zero column costs at that depth, in slots of depth 2."""

    depth: int
    cost: float


def choose_depth(weight: NDArray[np.generic], outputs: int) -> Depth:
    """The depth for weight s8[N, K] in row-blocks of `outputs`."""
    blocks = weight.reshape(-1, outputs, weight.shape[1])
    sample = blocks[np.linspace(0, len(blocks) - 1, min(SAMPLE, len(blocks))).astype(np.int64)]
    matrix = BlockSparseMatrix.from_dense(sample.reshape(-1, weight.shape[1]), (outputs, 1))
    columns = matrix.data[..., 0].astype(np.int8)
    costs = {
        depth: cost * share_lanes(columns, matrix.indptr, depth).columns.size / max(len(columns), 1)
        for depth, cost in SLOT_COST.items()
    }
    best = min(costs, key=lambda depth: costs[depth])
    return Depth(best, costs[best])
