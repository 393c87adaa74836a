"""Training: resuming gives the very same weights, masks stay, and what is not finite stops it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tilewright.errors import InvalidInput
from tilewright.pipeline.distillation import DistillationSettings
from tilewright.pipeline.modules import encoder_modules
from tilewright.pipeline.pruning.magnitude import MagnitudeSettings
from tilewright.pipeline.pruning.masks import block_sparsity, masks_of
from tilewright.pipeline.tasks.base import Feature
from tilewright.pipeline.training import (
    Job,
    LikeLengths,
    Progress,
    TrainingSettings,
    TrainingStopped,
    last_checkpoint,
    train,
)

SETTINGS = TrainingSettings(epochs=3, batch_size=4, learning_rate=1e-3, checkpoint_every=3)  # 10 steps an epoch


def features(count: int = 38) -> list[Feature]:
    random = np.random.default_rng(0)
    return [
        {"input_ids": ids.tolist(), "token_type_ids": [0] * len(ids), "labels": (ids % 3).tolist()}
        for ids in tiny.sequences(*random.integers(2, 12, count))
    ]


def model(seed: int = 0) -> torch.nn.Module:
    return tiny.build("BertForTokenClassification", seed)


def pruned(kind: str) -> Job:
    job = Job(model(), features(), SETTINGS, seed=3)
    if kind == "labels":
        return job
    if kind == "bfloat16":
        return replace(job, settings=SETTINGS.model_copy(update={"precision": "bfloat16"}))
    if kind == "magnitude":
        return replace(job, magnitude=MagnitudeSettings(block=(4, 1), sparsity=0.5, interval=2))
    linears = encoder_modules(job.model).linears
    with torch.no_grad():
        for linear in linears.values():
            linear.weight[:4, ::2] = 0
    distillation = DistillationSettings(logits=1.0, task=0.5)
    return replace(job, teacher=model(), distillation=distillation, masks=masks_of(linears, (4, 1)))


def weights(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("kind", ["labels", "bfloat16", "magnitude", "distil"])
@pytest.mark.parametrize("stops", [(7,), (10, 13)])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, kind: str, stops: tuple[int, ...]) -> None:
    whole = pruned(kind)
    before = weights(whole.model)
    result = train(whole, tmp_path / "whole")
    assert result["steps"] == 30 and weights(whole.model) != before
    steps: list[int] = []
    for stop in (*stops, None):
        parts = pruned(kind)
        seen: list[Progress] = []
        train(parts, tmp_path / "parts", seen.append, stop_after=stop)
        steps.append(seen[0].step)
    # each part begins after the last checkpoint of the one before
    assert steps == [1, *(stop // 3 * 3 + 1 for stop in stops)]
    assert weights(parts.model) == weights(whole.model)


def test_bfloat16_products_leave_weights_in_float32(tmp_path: Path) -> None:
    narrow, wide = pruned("bfloat16"), replace(pruned("labels"), settings=SETTINGS.model_copy(update={"precision": "float32"}))
    start = narrow.model.state_dict()["classifier.weight"].clone()
    results = [train(job, tmp_path / name) for name, job in (("narrow", narrow), ("wide", wide))]
    assert weights(narrow.model) != weights(wide.model)
    assert {parameter.dtype for parameter in narrow.model.parameters()} == {torch.float32}
    # products of 8 bits of mantissa lead to nearly the same place
    moved, apart = (wide.model.classifier.weight - other for other in (start, narrow.model.classifier.weight))
    assert float(apart.detach().norm()) < 0.3 * float(moved.detach().norm())
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=0.1)


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    first, second = pruned("labels"), replace(pruned("labels"), seed=4)
    train(first, tmp_path / "a")
    train(second, tmp_path / "b")
    assert weights(first.model) != weights(second.model)


@pytest.mark.parametrize("kind", ["magnitude", "distil"])
def test_what_is_pruned_stays_zero_through_training(tmp_path: Path, kind: str) -> None:
    job = pruned(kind)
    train(job, tmp_path)
    linears = encoder_modules(job.model).linears
    found = masks_of(linears, (4, 1))
    if kind == "magnitude":
        assert block_sparsity(found) == pytest.approx(0.5)
    else:
        assert job.masks is not None
        assert all(bool((found[name] == mask).all()) for name, mask in job.masks.items())
        assert block_sparsity(found) > 0


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path: Path) -> None:
    job = pruned("labels")
    train(job, tmp_path, stop_after=7)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    torn = tmp_path / "checkpoint-9"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert not torn.exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_training(tmp_path: Path, where: str) -> None:
    job = pruned("labels")
    calls = 0

    def spoil(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        nonlocal calls
        calls += 1
        if calls < 8:
            return None
        if where == "loss":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("inf"))
        return None

    job.model.classifier.register_forward_hook(spoil)  # type: ignore[union-attr, arg-type]
    with pytest.raises(TrainingStopped, match=r"step 8 of 30: .* is (nan|inf|-inf); .*checkpoint-6; lower learning_rate"):
        train(job, tmp_path)
    kept = last_checkpoint(tmp_path)
    assert kept == str(tmp_path / "checkpoint-6")
    assert json.loads((Path(kept) / "trainer_state.json").read_text())["global_step"] == 6


def test_rows_without_labels(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in features()]
    with pytest.raises(InvalidInput, match="the rows have no labels"):
        train(replace(pruned("labels"), features=rows), tmp_path)


def test_frozen_embeddings_and_dropout(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"freeze_embeddings": True, "dropout": 0.0})
    job = replace(pruned("labels"), settings=settings)
    before = weights(job.model)
    train(job, tmp_path)
    changed = {name for name, value in weights(job.model).items() if value != before[name]}
    assert changed and not any("embeddings" in name for name in changed)
    assert all(module.p == 0 for module in job.model.modules() if isinstance(module, torch.nn.Dropout))


def test_batches_of_like_lengths_hold_every_row_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 1003).tolist()
    sampler = LikeLengths(lengths, 16, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(1003)) and list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    spans = [np.ptp([lengths[i] for i in first[start : start + 16]]) for start in range(0, 992, 16)]
    assert np.mean(spans) < 15  # of 300: the widest of 50 batches span more, random ones some 265
