"""The QDQ file against ONNX Runtime run unfused and the NumPy oracle, and read back by the frontend."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests import oracle, tiny
from tilewright.baseline import OnnxRuntime
from tilewright.cli import app
from tilewright.codegen.model import Attention, EncoderModel
from tilewright.errors import InvalidInput
from tilewright.frontend import load, reference
from tilewright.frontend.reference import Array
from tilewright.pipeline import quantize
from tilewright.pipeline.qdq import export_onnx

CLASSES = [
    ("BertModel", {}),
    ("BertForSequenceClassification", {"hidden_act": "gelu_new"}),
    ("DistilBertForSequenceClassification", {"activation": "relu"}),
    ("DistilBertForQuestionAnswering", {}),
    ("BertForTokenClassification", {}),
]


@pytest.fixture(params=CLASSES, ids=lambda param: param[0])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> EncoderModel:
    name, settings = request.param
    return load(quantize(tiny.save(tiny.build(name, **settings), tmp_path / "float"), tiny.texts(30), tmp_path / "int8"))


def test_export(model: EncoderModel, tmp_path: Path) -> None:
    directory = export_onnx(model, tmp_path / "qdq")
    assert (directory / "tokenizer.json").read_text() == model.tokenizer

    runtime = OnnxRuntime(directory / "model.onnx", 1, unfused=True)
    sequences = tiny.sequences(5, 1, 12)
    ids, mask = np.zeros((3, 12), np.int64), np.zeros((3, 12), np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
    found = runtime(ids, mask)
    arithmetic = reference.Arithmetic(oracle._apply_int8, attend)
    for row, exact in enumerate(reference.forward(model, sequences, None, arithmetic)):
        for name, value in exact.items():
            ours = found[name][row, : len(sequences[row])] if name in oracle_per_token(model) else found[name][row]
            # sums in another order round a few activations to the next integer
            assert np.abs(ours - value).mean() < 0.01 * np.abs(value).mean()

    back = load(directory)
    for ours, theirs in zip(back.linears(), model.linears(), strict=True):
        assert np.array_equal(ours.weight, theirs.weight)
        np.testing.assert_allclose(ours.scale, theirs.scale)
        assert ours.input == theirs.input and ours.block == theirs.block
    # an s8 value may be -128 to ONNX, so the frontend covers 128 steps with 127
    for a, b in zip(back.layers, model.layers, strict=True):
        for scale in ("query_scale", "key_scale", "value_scale"):
            assert getattr(a.attention, scale) == pytest.approx(getattr(b.attention, scale), rel=1 / 126)
    assert (back.head.kind, back.head.pooling) == (model.head.kind, model.head.pooling)
    assert back.config.activation == model.config.activation and back.quantized


def attend(q: Array, k: Array, v: Array, attention: Attention) -> Array:
    """As the file says: s8 operands, softmax in float32. q, k, v are in units of their scales, [heads, tokens, channels]."""
    scales = attention.query_scale, attention.key_scale, attention.value_scale
    q, k, v = (oracle.round_s8(x) * np.float32(scale or 0) for x, scale in zip((q, k, v), scales, strict=True))
    logits = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    context: Array = (weights / weights.sum(-1, keepdims=True)) @ v
    return context


def oracle_per_token(model: EncoderModel) -> tuple[str, ...]:
    per_token = ("last_hidden_state", "start_logits", "end_logits")
    return (*per_token, "logits") if model.head.kind == "token_classification" else per_token


def test_float_models_and_outputs_that_exist_are_refused(tmp_path: Path) -> None:
    path = tiny.save(tiny.build("BertModel"), tmp_path / "float")
    with pytest.raises(InvalidInput, match="the model is not quantised"):
        export_onnx(path, tmp_path / "qdq")
    assert not (tmp_path / "qdq").exists()
    with pytest.raises(InvalidInput, match="exists; remove it"):
        export_onnx(path, path)


def test_command(tmp_path: Path) -> None:
    path = quantize(tiny.save(tiny.build("BertModel"), tmp_path / "float"), tiny.texts(30), tmp_path / "int8")
    result = CliRunner().invoke(app, ["export", str(path), "-o", str(tmp_path / "qdq"), "--json"])
    assert json.loads(result.stdout)["bytes"] == (tmp_path / "qdq" / "model.onnx").stat().st_size
