"""The models that the repository ships: whole, small, what their cards say, and fit to compile and run."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import tilewright
from tilewright.artifact import sha256
from tilewright.codegen.block_sparse import block_density
from tilewright.frontend import load

MODELS = sorted(path.parent for path in (Path(__file__).parent.parent / "models").glob("*/config.json"))


def test_all_are_small_and_have_cards() -> None:
    assert MODELS
    assert sum(file.stat().st_size for model in MODELS for file in model.rglob("*") if file.is_file()) < 40e6
    assert all((model / "README.md").is_file() for model in MODELS)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.name)
def test_files_are_those_of_the_last_step(path: Path) -> None:
    steps = json.loads((path / "provenance.json").read_text(encoding="utf-8"))["steps"]
    assert [step["step"] for step in steps] == ["prune", "distil", "quantize", "pack"]
    assert all(before["output_sha256"] == after["input_sha256"] for before, after in pairwise(steps))
    assert all(sha256(path / name) == digest for name, digest in steps[-1]["output_sha256"].items())


def test_the_sparse_embedder_is_as_sparse_as_it_says_and_answers(tmp_path: Path) -> None:
    (path,) = MODELS
    model = load(path)
    assert model.quantized and model.head.normalize
    for linear in model.linears():
        assert linear.block == (4, 1)
        assert block_density(linear.weight, (4, 1)) == pytest.approx(0.2, abs=2e-3)
    engine = tilewright.load(tilewright.compile(path, output=tmp_path / "model.tw").path, num_threads=1)
    texts = [
        "Where does the river Rhine rise?",
        "The Rhine begins in the Swiss Alps.",
        "The committee voted on the new budget.",
    ]
    vectors = engine(**engine.tokenize(texts))["sentence_embedding"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
