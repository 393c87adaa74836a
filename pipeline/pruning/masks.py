"""Block masks: how many blocks every row-block keeps, which ones, and how the pruned weights stay zero in training.

A weight [outputs, inputs] is a grid of blocks: G row-blocks of `block[0]` outputs, each of C blocks of `block[1]` inputs.
Scores are f32[G, C], one for every block; the blocks of the least scores are pruned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from tilewright.codegen.block_sparse import BLOCKS
from tilewright.errors import InvalidInput
from tilewright.pipeline.pruning.scores import grid

Masks = Mapping[str, Tensor]
"""By the name of a linear: bool[outputs, inputs], true where its weight is kept."""


class BlockPattern(BaseModel):
    """Which share of the blocks of which shape is pruned, and where they may lie.

    `scope`: `layer` prunes every linear alike; `global` shares one budget among all linears by their scores. `balanced`
    keeps equally many blocks in every row-block of a linear, so that all tiles of its kernel have equal work. A linear that
    the block does not divide is refused, or left dense.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    block: tuple[int, int] = (4, 1)
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.8
    scope: Literal["layer", "global"] = "layer"
    balanced: bool = False
    indivisible: Literal["refuse", "dense"] = "refuse"


def prunable(linears: Mapping[str, nn.Linear], pattern: BlockPattern) -> dict[str, nn.Linear]:
    """Choose the linears that `pattern` prunes; raises InvalidInput for a block without a kernel, or that divides not all."""
    if pattern.block not in BLOCKS:
        shapes = ", ".join("{}x{}".format(*block) for block in BLOCKS)
        raise InvalidInput("block {}x{} has no kernel; choose one of ".format(*pattern.block) + shapes)
    chosen = {name: linear for name, linear in linears.items() if _divides(pattern.block, linear)}
    left = next((name for name in linears if name not in chosen), None)
    if left is not None and pattern.indivisible == "refuse":
        raise InvalidInput(
            "block {}x{} does not divide {} of {} x {}; choose another block, or indivisible: dense".format(
                *pattern.block, left, linears[left].out_features, linears[left].in_features
            )
        )
    return chosen


def _divides(block: tuple[int, int], linear: nn.Linear) -> bool:
    return linear.out_features % block[0] == 0 and linear.in_features % block[1] == 0


def kept_counts(scores: Mapping[str, Tensor], pattern: BlockPattern, sparsity: float | None = None) -> dict[str, Tensor]:
    """Blocks to keep in every row-block, s64[G] by linear, for scores f32[G, C].

    The budget is met exactly: round((1 - sparsity) * blocks) stay in each linear, or of all linears together; a balanced
    pattern rounds to a whole number in each row-block. `sparsity` stands in for the pattern's on the way to it.
    """
    share = 1 - (pattern.sparsity if sparsity is None else sparsity)
    if pattern.scope == "global":
        flat = torch.cat([score.flatten() for score in scores.values()])
        kept = torch.split(_largest(flat, round(share * len(flat))), [score.numel() for score in scores.values()])
        grids = {name: part.view_as(scores[name]) for name, part in zip(scores, kept, strict=True)}
    else:
        grids = {name: _largest(score.flatten(), round(share * score.numel())).view_as(score) for name, score in scores.items()}
    counts = {name: grid.sum(1) for name, grid in grids.items()}
    if pattern.balanced:
        return {name: torch.full_like(count, round(count.double().mean().item())) for name, count in counts.items()}
    return counts


def select(scores: Tensor, counts: Tensor) -> Tensor:
    """Keep the `counts` s64[G] blocks of the largest scores f32[G, C] in each row-block; returns bool[G, C]."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1) < counts[:, None]


def expand(kept: Tensor, block: tuple[int, int]) -> Tensor:
    """Mask bool[outputs, inputs] of a weight from its kept blocks bool[G, C]."""
    return kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def apply_masks(linears: Mapping[str, nn.Linear], masks: Masks) -> None:
    """Set pruned weights to zero, in place."""
    with torch.no_grad():
        for name, mask in masks.items():
            linears[name].weight.mul_(mask.to(linears[name].weight.device))


def masks_of(linears: Mapping[str, nn.Linear], block: tuple[int, int]) -> dict[str, Tensor]:
    """Masks of a pruned model from its zero blocks; linears that `block` does not divide have none."""
    masks = {}
    for name, linear in linears.items():
        if _divides(block, linear):
            masks[name] = expand((grid(linear.weight.detach(), block) != 0).any(3).any(1), block)
    return masks


def block_sparsity(masks: Masks) -> float:
    """Share of the weights of all `masks` that is pruned."""
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


@contextmanager
def frozen(linears: Mapping[str, nn.Linear], masks: Masks) -> Iterator[None]:
    """Within the context, gradients of pruned weights are zero.

    Weights that start at zero then stay exactly zero under SGD and Adam with weight decay, and gradient clipping does not
    count them. The hooks run before gradients are accumulated or averaged between processes.
    """
    apply_masks(linears, masks)
    hooks = []
    for name, mask in masks.items():
        weight: Any = linears[name].weight
        hooks.append(weight.register_hook(_masked(mask.to(weight.device, weight.dtype))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _masked:
    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, gradient: Tensor) -> Tensor:
        return gradient * self.mask


def _largest(values: Tensor, count: int) -> Tensor:
    """Where the `count` largest of values [n] are, the first of equal ones; bool[n]."""
    kept = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    kept[values.argsort(descending=True, stable=True)[:count]] = True
    return kept
