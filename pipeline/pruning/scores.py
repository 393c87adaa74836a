"""How much each block of a weight matters: a table of scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

ScoreName = Literal["magnitude", "obs"]
Score = Callable[[Tensor, tuple[int, int], Tensor | None], Tensor]
"""Takes a weight f32[outputs, inputs], a block shape and the inverse Hessian f32[inputs, inputs] of the linear's inputs."""


def magnitude(weight: Tensor, block: tuple[int, int], inverse: Tensor | None = None) -> Tensor:
    """Mean absolute value of each block, f32[G, C] (Prune Once For All, arXiv 2111.05754)."""
    return grid(weight, block).abs().mean((1, 3))


def obs(weight: Tensor, block: tuple[int, int], inverse: Tensor | None = None) -> Tensor:
    """Least increase of the squared output error when a block goes and all others are refitted, f32[G, C].

    It is sum over the block's outputs of w_B (H^-1_BB)^-1 w_B', where B are the block's inputs and H = X'X (Optimal BERT
    Surgeon, arXiv 2203.07259, equation 3, with the exact Hessian of the layer's squared error in place of Fisher's).
    """
    assert inverse is not None
    parts = grid(weight, block)
    size = block[1]
    if size == 1:
        return parts.square().sum((1, 3)) / inverse.diagonal()
    corner = grid(inverse, (size, size)).diagonal(dim1=0, dim2=2).movedim(-1, 0)  # [C, bk, bk]
    columns = parts.permute(2, 3, 0, 1).flatten(2)  # [C, bk, G * bn]
    products = (columns * torch.cholesky_solve(columns, torch.linalg.cholesky(corner))).sum(1)
    return products.reshape(len(products), -1, block[0]).sum(2).T


SCORES: Mapping[ScoreName, Score] = {"magnitude": magnitude, "obs": obs}


def grid(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """View of weight [outputs, inputs] as [G, block[0], C, block[1]]."""
    (n, k), (bn, bk) = weight.shape, block
    return weight.reshape(n // bn, bn, k // bk, bk)
