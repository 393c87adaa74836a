"""Parts of the frontier that need no real model: ranks, quality, the picture; and the order of batches of a training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import frontier
from benchmarks.compress_minilm import Batches, Progress

Array = NDArray[Any]


def test_ranks_of_padded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    table = random.normal(size=(50, 6))
    questions, paragraphs = ([list(random.integers(1, 50, random.integers(1, 9))) for _ in range(n)] for n in (70, 40))
    expected = random.integers(0, 40, 70)
    monkeypatch.setattr(frontier, "texts", lambda: (questions, paragraphs, expected))
    monkeypatch.setattr(frontier, "BATCH", 7)

    def embed(ids: Array, mask: Array) -> Array:
        assert (ids[mask == 0] == 0).all()
        return frontier.mean_pool(table[ids], mask)

    found = frontier.ranks(embed)
    alone = [
        np.stack([table[text].mean(0) / np.linalg.norm(table[text].mean(0)) for text in texts])
        for texts in (questions, paragraphs)
    ]
    for question, place, rank in zip(alone[0], expected, found, strict=True):
        order = np.argsort(-(alone[1] @ question))
        assert order[rank - 1] == place


def test_quality_is_paired() -> None:
    dense, found = np.array([1, 5, 10, 11]), np.array([1, 11, 10, 9])
    row = frontier.quality(found, dense)
    assert (row["recall_at_1"], row["recall_at_10"]) == (0.25, 0.75)
    assert row["mrr"] == pytest.approx((1 + 1 / 11 + 1 / 10 + 1 / 9) / 4)
    assert row["points"] == 0
    assert row["interval"] == pytest.approx(1.96 * np.std([0, -100, 0, 100]) / 2)


def test_picture_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = frontier.quality(np.array([1, 20]), np.array([1, 2])) | {"milliseconds": 2.0}
    results = {
        "models": {frontier.FLOAT: row, "sparse": row},
        "curves": {"a": {"dense": row, "points": [{"tokens": 0, "minutes": 0.0, **row}]}},
    }
    frontier.show(results)
    assert "-50.00 ±" in capsys.readouterr().out
    for models in ("models", "none"):
        picture = tmp_path / f"{models}.png"
        frontier.plot({"models": results.get(models, {}), "curves": results["curves"]}, picture)
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_batches_go_on_where_they_stopped() -> None:
    random = np.random.default_rng(0)
    texts = [[int(i)] * int(random.integers(1, 5)) for i in range(200)]
    whole = Batches(texts, 12, seed=1)
    seen = [next(whole).tolist() for _ in range(60)]
    assert all(
        len({len(row) for row in batch}) == 1 and 12 - len(batch[0]) < len(batch) * len(batch[0]) <= 12 for batch in seen
    )
    epoch = [row[0] for batch in seen[: len(whole.order)] for row in batch]
    assert len(set(epoch)) == len(epoch) > 180
    first = Batches(texts, 12, seed=1)
    for _ in range(50):
        next(first)
    later = Batches(texts, 12, 1, first.epoch, first.at)
    assert first.epoch > 0 and [next(later).tolist() for _ in range(10)] == seen[50:]
    assert Progress(**vars(Progress(step=3))).step == 3
