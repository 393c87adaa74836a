"""The tools that load and torment the server."""

import asyncio
import itertools
from pathlib import Path

import numpy as np
import torch

from benchmarks.http_load import closed_loop
from benchmarks.onnx_engine import OnnxEngine
from tests import served, tiny, toy
from tests.soak import Seen, verdict
from tilewright.instances import Launch


def test_load_is_answered(tmp_path: Path, toy_library: Path) -> None:
    model = toy.write(tmp_path / "embed.tw", toy_library, served.MODELS["embed"])
    with served.process(model, "--instances", "1") as running:
        good = asyncio.run(closed_loop(running.url, "/embed", itertools.repeat(b'{"inputs": "a b"}'), 3, 0.2))
        bad = asyncio.run(closed_loop(running.url, "/embed", itertools.repeat(b"{"), 1, 0.05))
    assert len(good.seconds) >= 3 and not good.others and good.elapsed >= 0.2
    assert bad.others and not bad.seconds


def test_onnxruntime_behind_the_server_pools_as_the_model_does(tmp_path: Path, toy_library: Path) -> None:
    artifact = toy.write(tmp_path / "embed.tw", toy_library, served.MODELS["embed"])  # says: the mean
    model = tiny.build("BertModel")
    engine = OnnxEngine(Launch(artifact), tiny.export(model, tmp_path / "model.onnx", ["last_hidden_state", "pooler_output"]))
    short, long = tiny.sequences(3, 7)
    ids, mask = np.zeros((2, 7), np.int32), np.array([[1] * 3 + [0] * 4, [1] * 7], np.int32)
    ids[0, :3], ids[1] = short, long
    outputs = engine(input_ids=ids, attention_mask=mask)
    np.testing.assert_allclose(outputs["sentence_embedding"][0], outputs["last_hidden_state"][0, :3].mean(0), atol=1e-5)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(long)[None]).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(outputs["sentence_embedding"][1], expected.numpy(), atol=1e-4)


def test_verdict_of_the_soak() -> None:
    flat = [100] * 8
    assert verdict(Seen(memory=flat, killed=2), restarts=2) == []
    assert verdict(Seen(memory=flat, killed=2), restarts=1) == ["2 instances were killed, 1 replaced"]
    assert "memory grew" in verdict(Seen(memory=[100] * 6 + [120] * 2), restarts=0)[0]
    assert verdict(Seen(memory=flat, wrong=["an answer"]), restarts=0) == ["an answer"]
