"""Losses of distillation against their definitions in NumPy, and a student that learns from its teacher."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import log_softmax

from tests import tiny
from tests.test_pruning import batches
from tilewright.errors import InvalidInput
from tilewright.pipeline import distillation
from tilewright.pipeline.distillation import DistillationSettings, Distiller
from tilewright.pipeline.modules import encoder_modules
from tilewright.pipeline.pruning import masks
from tilewright.pipeline.pruning.magnitude import GradualMagnitude, MagnitudeSettings

PARTS = {"attention": 1.0, "feed_forward": 2.0, "embedding": 3.0, "logits": 4.0, "task": 5.0}


def test_logits_loss() -> None:
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 5, 7))
    a, b = log_softmax(student / 3, axis=1), log_softmax(teacher / 3, axis=1)
    expected = 9 * (np.exp(b) * (b - a)).sum(1).mean()
    found = distillation.logits_loss(torch.from_numpy(student), torch.from_numpy(teacher), 3.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_hidden_states_loss_ignores_padding_and_scale() -> None:
    random = np.random.default_rng(0)
    student, teacher = (torch.from_numpy(random.normal(size=(2, 4, 3))).float() for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    s, t = student.numpy()[mask], teacher.numpy()[mask]
    expected = ((s - t) ** 2).sum() / ((t - t.mean(0)) ** 2).sum()
    for scale in (1, 10):
        found = distillation.hidden_states_loss([student * scale] * 2, [teacher * scale] * 2, mask)
        assert float(found) == pytest.approx(expected, rel=1e-5)
    student[~mask] = 1e6
    assert float(distillation.hidden_states_loss([student], [teacher], mask)) == pytest.approx(expected, rel=1e-5)


def test_embedding_loss_and_pooling() -> None:
    states = torch.tensor([[[2.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    pooled = distillation.mean_pool(states, torch.tensor([[True, True, False]]))
    assert pooled.tolist() == [[1.0, 2.0]]
    other = torch.tensor([[2.0, -1.0]])
    assert float(distillation.embedding_loss(pooled, other, "cosine")) == pytest.approx(1.0)
    assert float(distillation.embedding_loss(pooled, other, "mse")) == pytest.approx((1 + 9) / 2)


@pytest.mark.parametrize(
    "name",
    ["BertModel", "DistilBertForQuestionAnswering", "BertForTokenClassification", "DistilBertForSequenceClassification"],
)
def test_every_part_is_zero_for_the_teacher_itself(name: str) -> None:
    model = tiny.build(name)
    weights = {part: weight for part, weight in PARTS.items() if part != "task" and (part != "logits" or "For" in name)}
    batch = next(batches(1))
    with Distiller(model, copy.deepcopy(model), DistillationSettings.model_validate(weights)) as distiller:
        loss, parts = distiller(model(**batch), batch)
    assert set(parts) == set(weights)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_loss_is_the_weighted_sum() -> None:
    student, teacher = tiny.build("BertForTokenClassification", seed=1), tiny.build("BertForTokenClassification")
    batch = next(batches(1))
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"] % tiny.LABELS, -100)
    with Distiller(student, teacher, DistillationSettings.model_validate(PARTS)) as distiller:
        outputs = student(**batch, labels=labels)
        loss, parts = distiller(outputs, batch)
    assert parts["task"].item() == outputs.loss.item()
    assert loss.item() == pytest.approx(sum(PARTS[name] * float(part) for name, part in parts.items()), rel=1e-6)
    assert all(float(part) > 0 for part in parts.values())
    # the hooks see what transformers reports: hidden states after each layer
    with torch.no_grad():
        expected = [model(**batch, output_hidden_states=True).hidden_states[1:] for model in (student, teacher)]
    mask = batch["attention_mask"].bool()
    assert float(parts["feed_forward"]) == pytest.approx(float(distillation.hidden_states_loss(*expected, mask)), rel=1e-5)


def test_question_answering_logits_leave_out_padding() -> None:
    student, teacher = (tiny.build("DistilBertForQuestionAnswering", seed=seed) for seed in (0, 1))
    batch = next(batches(1))
    lengths = batch["attention_mask"].sum(1).tolist()
    with Distiller(student, teacher, DistillationSettings(attention=0, feed_forward=0, logits=1)) as distiller:
        ours = student(**batch)
        found, _ = distiller(ours, batch)
        theirs = teacher(**batch)
    rows = []
    for name in ("start_logits", "end_logits"):
        for i, length in enumerate(lengths):
            a, b = (log_softmax(out[name][i, :length].detach().numpy() / 2) for out in (ours, theirs))
            rows.append(4 * (np.exp(b) * (b - a)).sum())
    assert found.item() == pytest.approx(np.mean(rows), rel=1e-4)


def test_a_pruned_student_comes_closer() -> None:
    teacher = tiny.build("BertModel")
    student = copy.deepcopy(teacher)
    pruner = GradualMagnitude(student, MagnitudeSettings(sparsity=0.6), total_steps=10)
    pruner.step(6)
    kept = pruner.masks
    linears = encoder_modules(student).linears
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    unseen = next(batches(1, seed=99))
    with masks.frozen(linears, kept), Distiller(student, teacher, DistillationSettings(embedding=1.0)) as distiller:
        before, _ = distiller(student(**unseen), unseen)
        for step in range(40):
            batch = next(batches(1, seed=step))
            loss, _ = distiller(student(**batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after, _ = distiller(student(**unseen), unseen)
    assert after.item() < 0.7 * before.item()
    assert all(torch.equal(linears[name].weight != 0, mask) for name, mask in kept.items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_what_is_refused() -> None:
    with pytest.raises(InvalidInput, match="2 layers, the teacher 3"):
        Distiller(tiny.build("BertModel"), tiny.build("BertModel", num_hidden_layers=3), DistillationSettings())
    model = tiny.build("BertModel")
    batch = next(batches(1))
    settings = DistillationSettings(logits=1.0)
    with Distiller(model, copy.deepcopy(model), settings) as distiller, pytest.raises(InvalidInput, match="no logits"):
        distiller(model(**batch), batch)
    for wrong in ({"logits": -1}, {"temperature": 0}, {"hidden": 1}):
        with pytest.raises(ValidationError):
            DistillationSettings.model_validate(wrong)
    with pytest.raises(ValidationError, match="at least one"):
        DistillationSettings(attention=0, feed_forward=0)
