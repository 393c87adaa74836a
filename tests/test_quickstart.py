"""Parts of the quickstart that need no real model; `make quickstart` runs the whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import exports, quickstart
from benchmarks.assets import SquadQuestion
from tests import tiny
from tilewright.baseline import OnnxRuntime, time_in_turns


def test_exports_run_like_the_model(tmp_path: Path) -> None:
    model = tiny.build("BertModel")
    exported = exports.export(tiny.save(model, tmp_path / "hf"), tmp_path / "float.onnx")
    (ids,) = tiny.sequences(11)
    expected = model(torch.from_numpy(ids)[None]).last_hidden_state.detach().numpy()
    found = OnnxRuntime(exported, threads=1)(ids[None])["last_hidden_state"]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    dynamic = OnnxRuntime(exports.quantize_dynamic(exported, tmp_path / "int8.onnx", reduce_range=True), threads=1)
    assert quickstart.cosine(dynamic(ids[None])["last_hidden_state"], expected).mean() > 0.98
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "float.onnx", "int8.onnx"}


def test_engines_take_turns() -> None:
    order = ""

    def call(name: str) -> None:
        nonlocal order
        order += name

    samples = time_in_turns({"a": lambda: call("a"), "b": lambda: call("b")}, duration=0)
    assert order == "aaaabbbb"
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}


def test_pick_is_the_nearest_sentence() -> None:
    vectors = {"q": [1.0, 0.1], "x": [0.0, 2.0], "y": [3.0, 0.0]}
    question = SquadQuestion("q", ("x", "y"), answer=0)
    assert quickstart.pick(lambda texts: np.array([vectors[text] for text in texts]), question) == 1


def test_sizes_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").write_bytes(b"123")
    assert quickstart.size(tmp_path) == quickstart.size(tmp_path / "a") == 3
    row = {"p50": 2.0, "p90": 3.0, "calls": 5, "ratio": 0.5}
    results = {
        "agreement": {"tags_equal": 0.75, "tag_logits_cosine": 0.75},
        "embedding": {"float32": {"cosine": 1.0, "cosine_least": 1.0, "answers_right": 0.625}},
        "latency": {"M": {"tilewright": row, "other": row}},
        "bytes": {"M": {"source": 10**6, "artifact": 2}},
    }
    quickstart.show(results)
    shown = capsys.readouterr().out
    assert shown.count("0.50 of it") == 1 and "62.5%" in shown
    json.dumps(results)
