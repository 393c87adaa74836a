"""Second-order pruning with exact refit, layer after layer, without training (Optimal Brain Surgeon on blocks).

Every linear is seen as a least-squares problem: from its inputs X as the pruned model computes them to a target Y of the
dense model, with H = X'X. Blocks go in rounds along a cubic schedule; after each, the weights that stay are the least-squares
solution on what is left. The outputs of a row-block share mask and H, so that one Cholesky factor serves them all.

The target makes the pruned model follow the dense one instead of letting errors add up: linears that add to the residual
stream aim at the dense stream less the pruned one, the others at the dense output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tilewright.errors import InvalidInput
from tilewright.pipeline.modules import EncoderModules, LayerModules, encoder_modules
from tilewright.pipeline.pruning import scores
from tilewright.pipeline.pruning.masks import BlockPattern, expand, kept_counts, masks_of, prunable, select

Progress = Callable[[int, int], None]
"""Called with the number of linears done and their total."""


class ObsSettings(BlockPattern):
    """`rounds` of pruning and refitting; `damping`, in parts of the mean of H's diagonal, pulls to the dense weight."""

    rounds: Annotated[int, Field(ge=1)] = 12
    damping: Annotated[float, Field(gt=0)] = 0.02


@dataclass(frozen=True)
class LeastSquares:
    """Fit of outputs to inputs around their means: hessian f32[K, K] is damped X'X, cross f32[K, N] is X'Y + damping * W'."""

    hessian: Tensor
    cross: Tensor
    inputs: Tensor  # mean f64[K]
    outputs: Tensor  # mean f64[N]


class Moments:
    """Sums over tokens of X'X, X'Y, X and Y, for inputs f32[tokens, K] and targets f32[tokens, N]; added up in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sums: tuple[Tensor, ...] = ()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count tokens of one batch."""
        parts = tuple(part.double() for part in (x.T @ x, x.T @ y, x.sum(0), y.sum(0)))
        self.sums = tuple(a.add_(b) for a, b in zip(self.sums, parts, strict=True)) if self.sums else parts
        self.tokens += len(x)

    def problem(self, weight: Tensor, damping: float) -> LeastSquares:
        """Centre the moments, and damp them towards `weight` f32[N, K]."""
        square, cross, x, y = self.sums
        square = square - torch.outer(x, x) / self.tokens
        cross = cross - torch.outer(x, y) / self.tokens
        amount = damping * square.diagonal().mean()
        square.diagonal().add_(amount)
        cross = cross + amount * weight.T
        return LeastSquares(square, cross, x / self.tokens, y / self.tokens)

    def split(self, sizes: list[int]) -> list[Moments]:
        """The moments of targets side by side, `sizes` channels each."""
        square, cross, x, y = self.sums
        parts = []
        for some, means in zip(torch.split(cross, sizes, dim=1), torch.split(y, sizes), strict=True):
            part = Moments()
            part.tokens, part.sums = self.tokens, (square, some, x, means)
            parts.append(part)
        return parts


def solve(problem: LeastSquares, settings: ObsSettings, counts: Tensor | None = None) -> Tensor:
    """Weight f32[N, K] of the pruned fit; `counts` s64[G] blocks stay in each row-block, by default as `settings` says."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.hessian))
    weight = (inverse @ problem.cross).T.float()
    inverse = inverse.float()
    if counts is None:
        counts = kept_counts({"": scores.obs(weight, settings.block, inverse)}, settings)[""]
    size = settings.block[0]
    rows = zip(torch.split(weight, size), torch.split(problem.cross, size, dim=1), counts.tolist(), strict=True)
    return torch.cat([_row_block(part, inverse, problem.hessian, cross, keep, settings) for part, cross, keep in rows])


def _row_block(weight: Tensor, inverse: Tensor, hessian: Tensor, cross: Tensor, keep: int, settings: ObsSettings) -> Tensor:
    """Prune one row-block f32[block[0], K] to `keep` blocks, whose weights solve the least squares on their inputs."""
    size = settings.block[1]
    total = weight.shape[1] // size
    alive, fitted = torch.arange(weight.shape[1]), weight
    for step in range(1, settings.rounds + 1):
        target = total - round((total - keep) * (1 - (1 - step / settings.rounds) ** 3))
        if target == len(alive) // size:
            continue
        score = scores.obs(fitted, (len(weight), size), inverse)
        mask = expand(select(score, torch.tensor([target])), (1, size))[0]
        gone, left = (~mask).nonzero()[:, 0], mask.nonzero()[:, 0]
        rows = inverse[left]
        # with inverse[gone, gone] = L L': removing `gone` takes (L^-1 ...)'(L^-1 ...) from the inverse and from the weight
        factor = torch.linalg.cholesky(inverse[gone][:, gone])
        across = torch.linalg.solve_triangular(factor, rows[:, gone].T, upper=False)
        removed = torch.linalg.solve_triangular(factor, fitted[:, gone].T, upper=False)
        fitted = fitted[:, left] - removed.T @ across
        inverse = torch.addmm(rows[:, left], across.T, across, alpha=-1)
        alive = alive[left]
    # the rounds add up rounding errors of float32; what they chose is solved once more, in float64
    result = torch.zeros_like(weight)
    exact = torch.cholesky_solve(cross[alive], torch.linalg.cholesky(hessian[alive][:, alive]))
    result[:, alive] = exact.T.float()
    return result


def prune(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    settings: ObsSettings,
    progress: Progress = lambda done, total: None,
) -> dict[str, Tensor]:
    """Prune the linears of a transformers encoder `model` in place; returns their masks by name.

    `batches` hold input_ids s64[batch, tokens] and, where there is padding, attention_mask of the same shape; some 100,000
    tokens or more. The hidden states of all of them are held twice in memory. Deterministic for given batches and threads.

    Raises InvalidInput for a block that does not fit, no batches or a problem that `damping` leaves singular, and
    UnsupportedModel for an unknown architecture.
    """
    training = model.training
    model.eval()
    sparse, dense = encoder_modules(model), encoder_modules(copy.deepcopy(model))
    chosen = prunable(sparse.linears, settings)
    names = {id(linear): name for name, linear in chosen.items()}
    done = 0

    def fit(linear: nn.Linear, moments: Moments) -> None:
        nonlocal done
        if (name := names.get(id(linear))) is not None:
            _fit(linear, moments, settings, counts.get(name))
            done += 1
            progress(done, len(chosen))

    with torch.no_grad():
        streams = [_Stream.embed(sparse.embeddings, batch) for batch in batches]
        if not streams:
            raise InvalidInput("no calibration text given; some 1,000 texts like those of the application work well")
        try:
            counts = _global_counts(dense, streams, chosen, settings) if settings.scope == "global" else {}
            for layer, reference in zip(sparse.layers, dense.layers, strict=True):
                _prune_layer(layer, reference, streams, fit)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # missing in the type stubs
            raise InvalidInput(
                f"after {done} of {len(chosen)} linears, inputs are singular or not finite at damping {settings.damping}; "
                "raise it, give more calibration text, or look for NaN in the checkpoint"
            ) from None
    model.train(training)
    return masks_of(chosen, settings.block)


def _fit(linear: nn.Linear, moments: Moments, settings: ObsSettings, counts: Tensor | None) -> None:
    problem = moments.problem(linear.weight, settings.damping)
    weight = solve(problem, settings, counts)
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(problem.outputs - weight.double() @ problem.inputs)


@dataclass
class _Stream:
    """Hidden states f32[batch, tokens, channels] of one batch, in the dense model and in the one being pruned."""

    mask: Tensor
    dense: Tensor
    sparse: Tensor

    @classmethod
    def embed(cls, embeddings: nn.Module, batch: Mapping[str, Tensor]) -> _Stream:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        types = {"token_type_ids": batch["token_type_ids"]} if "token_type_ids" in batch else {}
        states = embeddings(ids, **types)
        return cls(mask, states, states)


Fit = Callable[[nn.Linear, Moments], None]
"""Prunes a linear, given the moments of its inputs and targets."""


def _prune_layer(layer: LayerModules, dense: LayerModules, streams: Sequence[_Stream], fit: Fit) -> None:
    """Prune one layer part after part, each fed by the parts before it, and move `streams` to its outputs."""
    moments = Moments()
    for s in streams:
        x = s.dense[s.mask]
        moments.add(s.sparse[s.mask], torch.cat([dense.query(x), dense.key(x), dense.value(x)], 1))
    projections = (layer.query, layer.key, layer.value)
    for linear, part in zip(projections, moments.split([p.out_features for p in projections]), strict=True):
        fit(linear, part)

    moments = Moments()
    for s in streams:
        s.dense = s.dense + dense.output(dense.attend(s.dense, s.mask))
        context = layer.attend(s.sparse, s.mask)
        moments.add(context[s.mask], (s.dense - s.sparse)[s.mask])
    fit(layer.output, moments)

    moments = Moments()
    for s in streams:
        s.sparse = layer.attention_norm(s.sparse + layer.output(layer.attend(s.sparse, s.mask)))
        s.dense = dense.attention_norm(s.dense)
        moments.add(s.sparse[s.mask], dense.up(s.dense[s.mask]))
    fit(layer.up, moments)

    moments = Moments()
    for s in streams:
        s.dense = s.dense + dense.down(dense.inner(s.dense))
        moments.add(layer.inner(s.sparse[s.mask]), (s.dense - s.sparse)[s.mask])
    fit(layer.down, moments)

    for s in streams:
        s.sparse = layer.output_norm(s.sparse + layer.down(layer.inner(s.sparse)))
        s.dense = dense.output_norm(s.dense)


def _global_counts(
    dense: EncoderModules, streams: Sequence[_Stream], chosen: Mapping[str, nn.Linear], settings: ObsSettings
) -> dict[str, Tensor]:
    """Share one budget by the scores of the dense model, each in parts of the variance of its linear's outputs."""
    found: dict[str, Tensor] = {}
    names = {id(linear): name for name, linear in dense.linears.items() if name in chosen}

    def score(linear: nn.Linear, moments: Moments) -> None:
        if (name := names.get(id(linear))) is not None:
            hessian = moments.problem(linear.weight, settings.damping).hessian
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
            weight = linear.weight.double()
            variance = ((weight @ hessian) * weight).sum()
            found[name] = (scores.obs(weight, settings.block, inverse) / variance).float()

    copies = [_Stream(s.mask, s.dense, s.dense) for s in streams]
    for layer in dense.layers:
        _prune_layer(layer, layer, copies, score)
    return kept_counts({name: found[name] for name in chosen}, settings)
