"""Block masks, scores and both pruning methods against brute force on small layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from tests import tiny
from tilewright.codegen.block_sparse import BLOCKS, block_density, detect_block
from tilewright.errors import InvalidInput, UnsupportedModel
from tilewright.pipeline.modules import encoder_modules
from tilewright.pipeline.pruning import masks, obs, scores
from tilewright.pipeline.pruning.magnitude import GradualMagnitude, MagnitudeSettings
from tilewright.pipeline.pruning.masks import BlockPattern
from tilewright.pipeline.pruning.obs import LeastSquares, Moments, ObsSettings

Array = NDArray[np.float64]
MODELS = ["BertModel", "BertForQuestionAnswering", "DistilBertModel", "DistilBertForTokenClassification"]


def batches(count: int = 6, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches of random tokens."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        lengths = random.integers(4, 21, 8)
        mask = torch.from_numpy(np.arange(20) < lengths[:, None])
        ids = torch.from_numpy(random.integers(1, tiny.VOCAB, (8, 20))) * mask
        yield {"input_ids": ids, "attention_mask": mask.long()}


# ---- the oracle: exact least squares, solved anew for every set of inputs


def fit(hessian: Array, cross: Array, inputs: list[int]) -> Array:
    """Best weight [N, K] that uses `inputs` only."""
    weight = np.zeros(cross.T.shape)
    if inputs:
        weight[:, inputs] = np.linalg.solve(hessian[np.ix_(inputs, inputs)], cross[inputs]).T
    return weight


def cost(hessian: Array, cross: Array, weight: Array) -> float:
    """Squared error of `weight`, less that of zero."""
    return float(((weight @ hessian) * weight).sum() - 2 * (weight.T * cross).sum())


def greedy(hessian: Array, cross: Array, size: int, keep: int, rounds: int) -> Array:
    """Prune one row-block: in each round, those blocks whose removal alone, with refit, costs least."""
    total = len(hessian) // size
    alive = list(range(total))

    def columns(blocks: list[int]) -> list[int]:
        return [block * size + i for block in blocks for i in range(size)]

    for step in range(1, rounds + 1):
        target = total - round((total - keep) * (1 - (1 - step / rounds) ** 3))
        costs = {}
        for block in alive:
            rest = columns([other for other in alive if other != block])
            costs[block] = cost(hessian, cross, fit(hessian, cross, rest))
        alive = sorted(sorted(alive, key=lambda block: costs[block])[len(alive) - target :])
    return fit(hessian, cross, columns(alive))


def problem(n: int, k: int, seed: int) -> LeastSquares:
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(200, k)) @ random.normal(size=(k, k))
    moments = Moments()
    for part in np.array_split(mixed, 3):
        x = torch.from_numpy(part + 2).float()
        moments.add(x, x @ torch.from_numpy(random.normal(size=(k, n))).float() * 0.3 + 1)
    return moments.problem(torch.from_numpy(random.normal(size=(n, k))).float(), damping=0.05)


@pytest.mark.parametrize("rounds", [1, 3, 40])
@pytest.mark.parametrize("block", BLOCKS)
def test_obs_is_exact_greedy_obs(block: tuple[int, int], rounds: int) -> None:
    case = problem(2 * block[0], 8 * block[1], seed=rounds)
    settings = ObsSettings(block=block, sparsity=0.6, balanced=True, rounds=rounds)
    found = obs.solve(case, settings).numpy()
    hessian, cross = case.hessian.numpy(), case.cross.numpy()
    parts = [slice(0, block[0]), slice(block[0], 2 * block[0])]
    expected = np.concatenate([greedy(hessian, cross[:, part], block[1], 3, rounds) for part in parts])
    np.testing.assert_array_equal(found != 0, expected != 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_obs_score_is_the_cost_of_removal(block: tuple[int, int]) -> None:
    case = problem(2 * block[0], 6 * block[1], seed=1)
    hessian, cross = case.hessian.numpy(), case.cross.numpy()
    weight = fit(hessian, cross, list(range(len(hessian))))
    found = scores.obs(torch.from_numpy(weight), block, torch.from_numpy(np.linalg.inv(hessian)))
    for row in range(2):
        outputs = slice(row * block[0], (row + 1) * block[0])
        for column in range(6):
            rest = [i for i in range(len(hessian)) if i // block[1] != column]
            more = cost(hessian, cross[:, outputs], fit(hessian, cross[:, outputs], rest))
            before = cost(hessian, cross[:, outputs], weight[outputs])
            assert float(found[row, column]) == pytest.approx(more - before, rel=1e-6)


def test_magnitude_score() -> None:
    weight = torch.tensor([[1.0, -3.0, 0.0, 0.0], [2.0, 2.0, 0.0, 8.0]])
    assert scores.magnitude(weight, (2, 2)).tolist() == [[2.0, 2.0]]
    assert scores.magnitude(weight, (1, 4)).tolist() == [[1.0], [3.0]]


@given(
    st.integers(1, 6),
    st.integers(1, 30),
    st.floats(0, 0.99),
    st.booleans(),
    st.sampled_from(["layer", "global"]),
    st.integers(),
)
def test_budgets_are_met(rows: int, columns: int, sparsity: float, balanced: bool, scope: str, seed: int) -> None:
    random = np.random.default_rng(abs(seed))
    grids = {name: torch.from_numpy(random.integers(0, 4, (rows, columns)) * scale) for name, scale in (("a", 1.0), ("b", 3.0))}
    pattern = BlockPattern.model_validate({"sparsity": sparsity, "scope": scope, "balanced": balanced})
    counts = masks.kept_counts(grids, pattern)
    kept = {name: masks.select(grids[name], counts[name]) for name in grids}
    totals = {name: int(grid.sum()) for name, grid in kept.items()}
    assert all((grid.sum(1) == counts[name]).all() for name, grid in kept.items())
    if balanced:
        assert all(len(set(count.tolist())) == 1 for count in counts.values())
    elif scope == "layer":
        assert set(totals.values()) == {round((1 - sparsity) * rows * columns)}
    else:
        assert sum(totals.values()) == round((1 - sparsity) * 2 * rows * columns)
    for name, grid in kept.items():
        for row in range(rows):
            inside, outside = grids[name][row][grid[row]], grids[name][row][~grid[row]]
            assert not len(inside) or not len(outside) or inside.min() >= outside.max()


@pytest.mark.parametrize("name", MODELS)
def test_obs_prunes_a_model(name: str) -> None:
    model = tiny.build(name)
    dense = copy.deepcopy(model)
    done: list[tuple[int, int]] = []
    settings = ObsSettings(sparsity=0.75, balanced=True)
    found = obs.prune(model, batches(), settings, lambda *step: done.append(step))
    linears = encoder_modules(model).linears
    assert len(linears) == 6 * tiny.LAYERS and done == [(i + 1, len(linears)) for i in range(len(linears))]
    for linear, mask in ((linears[key], found[key]) for key in linears):
        weight = linear.weight.detach().numpy()
        assert block_density(weight, (4, 1)) == 0.25 and detect_block(weight) == (4, 1)
        assert (mask[::4].sum(1) == mask.shape[1] // 4).all()
        assert torch.equal(mask, linear.weight != 0)
    others = {key for key in dense.state_dict() if key.rpartition(".")[0] not in linears}
    assert all(torch.equal(dense.state_dict()[key], model.state_dict()[key]) for key in others)


def hidden(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    encoder = getattr(model, "bert", model)
    with torch.no_grad():
        return encoder(**batch).last_hidden_state[batch["attention_mask"].bool()]


def error(model: nn.Module, dense: nn.Module) -> float:
    pairs = [(hidden(model, batch), hidden(dense, batch)) for batch in batches(seed=9)]
    return float(sum((a - b).square().sum() for a, b in pairs)) / float(sum((b - b.mean(0)).square().sum() for _, b in pairs))


@pytest.mark.parametrize("block", [(4, 1), (1, 4), (16, 4)])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_obs_stays_closer_than_magnitude(block: tuple[int, int], scope: str) -> None:
    dense = tiny.build("BertModel")
    pattern = {"block": block, "sparsity": 0.5, "scope": scope}
    second, first = copy.deepcopy(dense), copy.deepcopy(dense)
    found = obs.prune(second, batches(24), ObsSettings.model_validate(pattern))
    GradualMagnitude(first, MagnitudeSettings.model_validate(pattern | {"interval": 1}), 10).step(6)
    assert masks.block_sparsity(found) == pytest.approx(0.5, abs=1e-3)
    assert masks.block_sparsity(masks.masks_of(encoder_modules(first).linears, block)) == pytest.approx(0.5, abs=1e-3)
    assert error(second, dense) < 0.8 * error(first, dense)


def test_obs_without_pruning_changes_nothing_much() -> None:
    dense = tiny.build("BertModel")
    model = copy.deepcopy(dense)
    obs.prune(model, batches(), ObsSettings(sparsity=0.0, damping=1e-6))
    assert error(model, dense) < 1e-6


def test_obs_repeats_bit_for_bit() -> None:
    models = [tiny.build("BertModel") for _ in range(2)]
    for model in models:
        obs.prune(model, batches(), ObsSettings(scope="global"))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_masks_stay_frozen_in_training() -> None:
    model = tiny.build("BertModel")
    found = obs.prune(model, batches(), ObsSettings())
    linears = encoder_modules(model).linears
    before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    with masks.frozen(linears, found):
        for batch in batches(3):
            optimizer.zero_grad()
            model(**batch).last_hidden_state.square().sum().backward()
            assert all((linears[name].weight.grad[~mask] == 0).all() for name, mask in found.items())  # type: ignore[index]
            optimizer.step()
    for name, mask in found.items():
        assert torch.equal(linears[name].weight != 0, mask)
        assert not torch.equal(linears[name].weight, before[name])
    model(**batch).last_hidden_state.square().sum().backward()
    assert any(bool((linears[name].weight.grad[~mask] != 0).any()) for name, mask in found.items())  # type: ignore[index]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gradual_magnitude(scope: str) -> None:
    model = tiny.build("DistilBertModel")
    settings = MagnitudeSettings.model_validate({"sparsity": 0.8, "begin": 0.1, "end": 0.6, "interval": 2, "scope": scope})
    pruner = GradualMagnitude(model, settings, total_steps=20)
    assert [round(pruner.sparsity(step), 4) for step in (0, 2, 7, 12, 20)] == [0, 0, 0.7, 0.8, 0.8]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = []
    for step in range(1, 21):
        batch = next(batches(1, seed=step))
        optimizer.zero_grad()
        model(**batch).last_hidden_state.square().sum().backward()
        optimizer.step()
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
        pruner.step(step)
        assert all((before[name] | ~mask).all() for name, mask in pruner.masks.items())
        assert all((pruner.linears[name].weight[~mask] == 0).all() for name, mask in pruner.masks.items())
        seen.append(masks.block_sparsity(pruner.masks))
    assert seen[1] == 0 and seen[11:] == [seen[11]] * 9
    assert seen[11] == pytest.approx(0.8, abs=5e-3)
    assert seen[5] == pytest.approx(pruner.sparsity(6), abs=5e-3)


def test_indivisible_linears() -> None:
    model = tiny.build("BertModel", intermediate_size=36)
    with pytest.raises(InvalidInput, match=r"16x4 does not divide encoder.layer.0.intermediate.dense of 36 x 32.*indivisible"):
        obs.prune(model, batches(), ObsSettings(block=(16, 4)))
    before = copy.deepcopy(model.state_dict())
    found = obs.prune(model, batches(), ObsSettings(block=(16, 4), sparsity=0.5, indivisible="dense"))
    assert len(found) == 5 * tiny.LAYERS
    key = "encoder.layer.1.intermediate.dense.weight"
    assert torch.equal(model.state_dict()[key], before[key])


def test_what_is_refused() -> None:
    model = tiny.build("BertModel")
    with pytest.raises(InvalidInput, match="3x1 has no kernel"):
        obs.prune(model, batches(), ObsSettings(block=(3, 1)))
    with pytest.raises(InvalidInput, match="no calibration text"):
        obs.prune(model, [], ObsSettings())
    with pytest.raises(ValueError, match="begin"):
        MagnitudeSettings(begin=0.6, end=0.5)
    with pytest.raises(ValueError, match="sparsity"):
        ObsSettings(sparsity=1.0)
    with torch.no_grad():
        next(encoder_modules(model).embeddings.parameters())[3] = float("nan")
    for scope in ("layer", "global"):
        with pytest.raises(InvalidInput, match="after 0 of 12 linears, inputs are singular or not finite"):
            obs.prune(model, batches(), ObsSettings.model_validate({"scope": scope}))
    with pytest.raises(UnsupportedModel, match="gpt2"):
        encoder_modules(_other())


def _other() -> nn.Module:
    model = nn.Linear(1, 1)
    model.config = type("Config", (), {"model_type": "gpt2"})()  # type: ignore[assignment]
    return model
