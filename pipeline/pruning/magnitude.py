"""Gradual magnitude pruning during training: a cubic schedule of sparsity, then a frozen mask (the paper's method)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tilewright.pipeline.modules import encoder_modules
from tilewright.pipeline.pruning import scores
from tilewright.pipeline.pruning.masks import BlockPattern, apply_masks, expand, kept_counts, prunable, select


class MagnitudeSettings(BlockPattern):
    """Shares of the training steps between which sparsity grows, and the steps between two prunings.

    The mask is frozen for at least the last fifth of training, in which the weights that stay recover.
    """

    begin: Annotated[float, Field(ge=0, lt=1)] = 0.0
    end: Annotated[float, Field(gt=0, le=0.8)] = 0.6
    interval: Annotated[int, Field(ge=1)] = 50

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.begin >= self.end:
            raise ValueError(f"begin {self.begin} must lie before end {self.end}")
        return self


class GradualMagnitude:
    """Prunes the linears of a transformers encoder while it is trained; call `step` after every optimizer step.

    What is pruned stays pruned: the mask only grows, and weights that the optimizer's momentum moves are zeroed again.
    """

    def __init__(self, model: nn.Module, settings: MagnitudeSettings, total_steps: int) -> None:
        self.settings = settings
        self.total_steps = total_steps
        self.linears: Mapping[str, nn.Linear] = prunable(encoder_modules(model).linears, settings)
        self.masks: dict[str, Tensor] = {
            name: torch.ones_like(linear.weight, dtype=torch.bool) for name, linear in self.linears.items()
        }

    def sparsity(self, step: int) -> float:
        """Sparsity due after optimizer step `step` of `total_steps`, from a cubic ramp (Zhu and Gupta, arXiv 1710.01878)."""
        begin, end = (round(share * self.total_steps) for share in (self.settings.begin, self.settings.end))
        done = min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
        return self.settings.sparsity * (1 - (1 - done) ** 3)

    def step(self, step: int) -> None:
        """Prune if a pruning is due after optimizer step `step` (counted from 1), and zero what is pruned."""
        end = round(self.settings.end * self.total_steps)
        if step == end or (step < end and step % self.settings.interval == 0):
            self._prune(self.sparsity(step))
        apply_masks(self.linears, self.masks)

    def _prune(self, sparsity: float) -> None:
        block = self.settings.block
        found = {}
        for name, linear in self.linears.items():
            score = scores.magnitude(linear.weight.detach(), block)
            # pruned blocks come last, also after blocks that happen to be all zero
            gone = ~self.masks[name][:: block[0], :: block[1]]
            found[name] = score.masked_fill(gone, -1.0)
        counts = kept_counts(found, self.settings, sparsity)
        for name, score in found.items():
            self.masks[name] &= expand(select(score, counts[name]), block)
