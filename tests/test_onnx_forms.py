"""Forms in which the same encoder comes as an ONNX graph: old opsets, dynamic INT8, weights only, pooling, other exporters."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import helper, numpy_helper

from benchmarks import exports
from tests import oracle, tiny
from tests.test_onnx_meaning import SEQUENCES, check_equal, export, nodes
from tilewright.baseline import OnnxRuntime
from tilewright.errors import UnsupportedModel
from tilewright.frontend import load
from tilewright.pipeline import quantize

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "model.onnx"
    return tiny.export(tiny.build("BertModel"), path, ["last_hidden_state"], types=True)


@pytest.mark.parametrize("opset", [11, 12])
@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
def test_old_opsets(name: str, opset: int, tmp_path: Path) -> None:
    """The exporter writes 13 or later, which onnx's converter takes back."""
    path = tiny.export(tiny.build(name), tmp_path / "new.onnx", ["last_hidden_state"], 13)
    onnx.save(downgraded(onnx.load(path), opset), tmp_path / "model.onnx")
    check_equal(tmp_path / "model.onnx")


def downgraded(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """`model` with axes of Unsqueeze and its like as attributes, as operator sets before 13 have them."""
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    values |= {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in nodes(model, "Constant")}
    if opset == 11:  # which has no GreaterOrEqual
        for node in nodes(model, "GreaterOrEqual"):
            less = helper.make_node("Less", node.input, [f"{node.output[0]}/less"])
            model.graph.node.insert(list(model.graph.node).index(node), less)
            node.op_type = "Not"
            node.ClearField("input")
            node.input.append(less.output[0])
    for node in model.graph.node:
        if node.op_type in ("Unsqueeze", "Squeeze", "ReduceSum") and len(node.input) > 1:
            axes = values[node.input[1]].reshape(-1).tolist()
            del node.input[1:]
            node.attribute.append(helper.make_attribute("axes", axes))
    model.opset_import[0].version = opset
    onnx.checker.check_model(model)
    return model


def test_scales_computed_from_extents(tmp_path: Path) -> None:
    """torch's scaled dot products are exported with 1/sqrt(channels) computed by the graph."""
    model = tiny.build("BertModel")
    model.set_attn_implementation("sdpa")
    check_equal(tiny.export(model, tmp_path / "model.onnx", ["last_hidden_state", "pooler_output"]))


def test_dynamic_int8_takes_the_weights(bert: Path, tmp_path: Path) -> None:
    path = exports.quantize_dynamic(bert, tmp_path / "model.onnx")
    assert "MatMulInteger" in {node.op_type for node in onnx.load(path).graph.node}
    model, real = load(path), load(bert)
    assert not model.quantized
    weights = {tuple(t.dims): numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.data_type == 3}
    assert all(linear.weight.dtype == np.int8 and linear.input is None for linear in model.linears())
    up = weights[tiny.HIDDEN, tiny.WIDE]
    assert any(np.array_equal(up, layer.up.weight.T) for layer in model.layers)
    for ours, theirs in zip(oracle.forward_float(model, SEQUENCES), oracle.forward_float(real, SEQUENCES), strict=True):
        assert np.corrcoef(ours["last_hidden_state"].ravel(), theirs["last_hidden_state"].ravel())[0, 1] > 0.98


def test_dynamic_int8_is_calibrated_on_texts(bert: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny.save(tiny.build("BertModel"), source)
    (source / "model.safetensors").unlink()
    path = exports.quantize_dynamic(bert, source / "model.onnx")
    before, after = load(path), load(quantize(path, tiny.texts(20), tmp_path / "int8"))
    assert after.quantized
    for first, second in zip(before.linears(), after.linears(), strict=True):
        np.testing.assert_array_equal(first.weight, second.weight)


def test_weights_only_int8(bert: Path, tmp_path: Path) -> None:
    """Cast and Mul of integer weights, with a scale for each row of a table and each output of a matrix."""
    model = onnx.load(bert)
    for tensor in list(model.graph.initializer):
        if len(tensor.dims) == 2:
            array, axis = numpy_helper.to_array(tensor), 1 if tensor.dims[0] == tiny.VOCAB else 0
            scale = (np.abs(array).max(axis=axis, keepdims=True) / 127).astype(np.float32)
            stored = (np.rint(array / scale).astype(np.int8), f"{tensor.name}_q"), (scale, f"{tensor.name}_scale")
            model.graph.initializer.extend(numpy_helper.from_array(values, name) for values, name in stored)
            widened = helper.make_node("Cast", [stored[0][1]], [f"{tensor.name}_f"], to=1)
            model.graph.node.insert(0, helper.make_node("Mul", [widened.output[0], stored[1][1]], [tensor.name]))
            model.graph.node.insert(0, widened)
            model.graph.initializer.remove(tensor)
    onnx.save(model, tmp_path / "model.onnx")
    assert all(linear.weight.dtype == np.int8 for linear in load(tmp_path / "model.onnx").linears())
    check_equal(tmp_path / "model.onnx")


def test_weights_quantised_in_training(bert: Path, tmp_path: Path) -> None:
    """Float weights behind Q/DQ pairs."""
    feeds = [{"input_ids": ids[None], "attention_mask": np.ones_like(ids[None]), "token_type_ids": np.zeros_like(ids[None])}
             for ids in tiny.sequences(*[9] * 8)]  # fmt: skip
    path = exports.quantize_static(bert, tmp_path / "model.onnx", iter(feeds), per_channel=True, float_weights=True)
    model, run = load(path), OnnxRuntime(path, threads=1, unfused=True)
    assert model.quantized
    for ids, ours in zip(SEQUENCES, oracle.forward(model, SEQUENCES), strict=True):
        theirs = run(ids[None])["last_hidden_state"]
        assert np.corrcoef(ours["last_hidden_state"].ravel(), theirs.ravel())[0, 1] > 0.98


def test_folder_of_a_hub(bert: Path, tmp_path: Path) -> None:
    """The graph in a folder `onnx`, settings and tokenizer above it."""
    tiny.save(tiny.build("BertModel"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "onnx").mkdir()
    shutil.copy(bert, tmp_path / "onnx" / "model.onnx")
    model = load(tmp_path)
    assert model.tokenizer is not None
    assert model.tokenizer == load(tmp_path / "onnx" / "model.onnx").tokenizer
    shutil.copy(bert, tmp_path / "onnx" / "model_other.onnx")
    with pytest.raises(UnsupportedModel, match=r"onnx/model\.onnx, onnx/model_other\.onnx"):
        load(tmp_path)


Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
POOLINGS: dict[str, Pool] = {
    "mean": lambda hidden, mask: (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9),
    "cls": lambda hidden, mask: hidden[:, 0],
    "max": lambda hidden, mask: hidden.masked_fill(mask == 0, -1e9).max(1).values,
}


class Pooled(torch.nn.Module):
    """An encoder with its embedding among the outputs."""

    def __init__(self, pool: Pool, normalize: bool) -> None:
        super().__init__()
        self.model = tiny.build("BertModel")
        self.pool, self.normalize = pool, normalize

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        embedding = self.pool(hidden, mask[..., None].expand(hidden.shape).float())
        return torch.nn.functional.normalize(embedding) if self.normalize else embedding


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_in_the_graph(pooling: str, normalize: bool, tmp_path: Path) -> None:
    path = export(Pooled(POOLINGS[pooling], normalize), tmp_path / "model.onnx")
    model, run = load(path), OnnxRuntime(path, threads=1, unfused=True)
    assert (model.head.pooling, model.head.normalize) == (pooling, normalize)
    for ids, ours in zip(SEQUENCES, oracle.forward_float(model, SEQUENCES), strict=True):
        np.testing.assert_allclose(ours["sentence_embedding"], run(ids[None])["y"][0], atol=1e-4)


def test_a_pooler_alone_is_refused(bert: Path, tmp_path: Path) -> None:
    """Its Linear of the first token is no sentence embedding that there is."""
    path = tiny.export(tiny.build("BertModel"), tmp_path / "model.onnx", ["last_hidden_state", "pooler_output"])
    model = onnx.load(path)
    del model.graph.output[0]
    onnx.save(model, path)
    with pytest.raises(UnsupportedModel, match="outputs pooler_output are not"):
        load(path)


def test_another_pooling_is_refused(tmp_path: Path) -> None:
    wrong: Pool = lambda hidden, mask: hidden.mean(1)  # noqa: E731  # padding counts as well
    path = export(Pooled(wrong, False), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedModel, match="output y is neither the mean"):
        load(path)


def test_roberta_counts_positions_from_ids(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(
        vocab_size=tiny.VOCAB, hidden_size=tiny.HIDDEN, intermediate_size=tiny.WIDE, num_attention_heads=tiny.HEADS,
        num_hidden_layers=tiny.LAYERS, max_position_embeddings=tiny.POSITIONS + 2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.RobertaModel(config, add_pooling_layer=False).eval()
    path = tiny.export(reference, tmp_path / "model.onnx", ["last_hidden_state"])
    model, run = load(path), OnnxRuntime(path, threads=1, unfused=True)
    assert model.config.max_positions == tiny.POSITIONS
    sequences = [np.where(ids == config.pad_token_id, 5, ids) for ids in SEQUENCES]
    for ids, ours in zip(sequences, oracle.forward_float(model, sequences), strict=True):
        np.testing.assert_allclose(ours["last_hidden_state"], run(ids[None])["last_hidden_state"][0], atol=1e-4)


def test_without_onnxruntime(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX's own evaluator takes its place."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    load(bert)
