import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType

from tests import oracle, tiny
from tilewright.baseline import OnnxRuntime
from tilewright.errors import InvalidModel, TilewrightError, UnsupportedModel
from tilewright.frontend import load
from tilewright.frontend.family import ACTIVATIONS

SEQUENCES = tiny.sequences(1, 6, 9, 32)
EXPORTS = [
    ("DistilBertForTokenClassification", ("logits",), 17, False),
    ("DistilBertForSequenceClassification", ("logits",), 17, False),
    ("DistilBertForQuestionAnswering", ("start_logits", "end_logits"), 17, False),
    ("DistilBertModel", ("last_hidden_state",), 14, False),  # LayerNorm is decomposed below opset 17
    ("BertModel", ("last_hidden_state", "pooler_output"), 17, True),
    ("BertForSequenceClassification", ("logits",), 16, True),
    ("BertForTokenClassification", ("logits",), 18, False),  # token types are constant
]


def run_onnx(path: Path) -> list[dict[str, np.ndarray]]:
    run = OnnxRuntime(path, threads=1, unfused=True)
    return [{name: value[0] for name, value in run(ids[None]).items()} for ids in SEQUENCES]


@pytest.mark.parametrize(("name", "outputs", "opset", "types"), EXPORTS)
def test_float_graphs(name: str, outputs: tuple[str, ...], opset: int, types: bool, tmp_path: Path) -> None:
    path = tiny.export(tiny.build(name), tmp_path / "model.onnx", outputs, opset, types)
    model = load(path)
    assert (model.config.num_heads, model.config.max_positions) == (tiny.HEADS, tiny.POSITIONS)
    assert (model.embeddings.token_type is not None) == types
    for ours, theirs in zip(oracle.forward_float(model, SEQUENCES), run_onnx(path), strict=True):
        compared = ours.keys() & theirs.keys()
        assert compared
        for output in compared:
            np.testing.assert_allclose(ours[output], theirs[output], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("opset", [17, 20])  # Gelu is an operator from opset 20
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu"])
def test_activations(activation: str, opset: int, tmp_path: Path) -> None:
    reference = tiny.build("DistilBertModel", activation=activation)
    path = tiny.export(reference, tmp_path / "model.onnx", ["last_hidden_state"], opset)
    model = load(path)
    assert model.config.activation == ACTIVATIONS[activation]
    for ours, theirs in zip(oracle.forward_float(model, SEQUENCES), run_onnx(path), strict=True):
        np.testing.assert_allclose(ours["last_hidden_state"], theirs["last_hidden_state"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "outputs", "opset", "types"), [EXPORTS[0], EXPORTS[2], EXPORTS[4]])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("activations", [QuantType.QUInt8, QuantType.QInt8])
def test_qdq_graphs(
    name: str,
    outputs: tuple[str, ...],
    opset: int,
    types: bool,
    per_channel: bool,
    activations: QuantType,
    tmp_path: Path,
) -> None:
    path = tiny.export(tiny.build(name), tmp_path / "float.onnx", outputs, opset, types)
    quantized = tiny.quantize(path, tmp_path / "model.onnx", per_channel, activations)
    model = load(quantized)
    assert model.quantized
    assert all(np.abs(linear.weight.astype(int)).max() <= 127 for linear in model.linears())
    assert any(note.startswith("dropped ") and "layers 0-1" in note for note in model.notes)
    exact = load(path)
    for linear, original in zip(model.linears(), exact.linears(), strict=True):
        assert linear.scale is not None
        step = linear.scale[:, None]
        assert np.abs(linear.weight * step - original.weight).max() <= 0.51 * step.max()
    ours, theirs, real = (
        oracle.forward(model, SEQUENCES),
        run_onnx(quantized),
        oracle.forward_float(exact, SEQUENCES),
    )
    error = mean_error(ours, real, outputs[0])
    assert error <= 1.1 * mean_error(theirs, real, outputs[0])
    assert mean_error(ours, theirs, outputs[0]) < 0.2


def mean_error(first: list, second: list, output: str) -> float:
    """Relative to the mean magnitude of `second`."""
    a, b = (np.concatenate([np.ravel(result[output]) for result in results]) for results in (first, second))
    return float(np.abs(a - b).mean() / np.abs(b).mean())


@pytest.fixture(scope="module")
def qdq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qdq")
    exported = tiny.export(tiny.build("DistilBertForTokenClassification"), path / "float.onnx", ["logits"])
    return tiny.quantize(exported, path / "model.onnx")


def refused(model: onnx.ModelProto | bytes, path: Path, kind: type[TilewrightError], *parts: str) -> None:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    (path / "model.onnx").write_bytes(content)
    with pytest.raises(kind) as caught:
        load(path / "model.onnx")
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(qdq: Path, tmp_path: Path, keep: float) -> None:
    content = qdq.read_bytes()
    refused(content[: int(keep * len(content))], tmp_path, InvalidModel, "model.onnx")


def test_foreign_file(tmp_path: Path) -> None:
    refused(b"\x89PNG\r\n\x1a\n" + bytes(100), tmp_path, InvalidModel, "model.onnx")


def replace_initializer(model: onnx.ModelProto, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor).copy()), name))


def first_weight(model: onnx.ModelProto) -> onnx.NodeProto:
    """DequantizeLinear of the first Linear's weight."""
    producers = {output: node for node in model.graph.node for output in node.output}
    matmul = next(node for node in model.graph.node if node.op_type == "MatMul")
    return producers[matmul.input[1]]


def test_weights_of_minus_128_are_saturated_and_noted(qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)

    def lower(weight: np.ndarray) -> np.ndarray:
        weight[0, :2] = -128
        return weight

    replace_initializer(model, first_weight(model).input[0], lower)
    onnx.save(model, tmp_path / "model.onnx")
    loaded = load(tmp_path)
    assert "saturated 2 weights of -128 to -127 in layer 0 query" in loaded.notes
    assert loaded.layers[0].attention.query.weight[:2, 0].tolist() == [-127, -127]


def test_asymmetric_weights_are_requantised_and_noted(qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    node = first_weight(model)
    before = load(qdq).layers[0].attention.query
    zero_point = np.full(tiny.HIDDEN, 5, np.int8)
    replace_initializer(model, node.input[2], lambda _: zero_point)
    onnx.save(model, tmp_path / "model.onnx")
    loaded = load(tmp_path)
    after = loaded.layers[0].attention.query
    assert any("requantised the asymmetric weight of layer 0 query" in note for note in loaded.notes)
    assert before.scale is not None
    assert after.scale is not None
    expected = (before.weight.astype(int) - 5) * before.scale[:, None]
    assert np.abs(after.weight * after.scale[:, None] - expected).max() <= 0.51 * after.scale.max()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
def test_bad_scales_are_named(qdq: Path, tmp_path: Path, value: float) -> None:
    model = onnx.load(qdq)
    name = first_weight(model).input[1]
    replace_initializer(model, name, lambda scale: np.full_like(scale, value))
    refused(model, tmp_path, InvalidModel, name)


def test_nan_in_a_float_tensor_is_named(qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    bias = next(t.name for t in model.graph.initializer if t.data_type == 1 and list(t.dims) == [tiny.WIDE])
    replace_initializer(model, bias, lambda array: np.full_like(array, np.nan))
    refused(model, tmp_path, InvalidModel, bias, "NaN")


def test_operators_and_opsets_are_refused_by_name(qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    model.graph.node.append(helper.make_node("QAttention", ["logits"], ["q"], domain="com.microsoft"))
    refused(model, tmp_path, UnsupportedModel, "com.microsoft.QAttention", "before an optimizer")
    model = onnx.load(qdq)
    model.graph.node.append(helper.make_node("If", ["logits"], ["either"]))
    refused(model, tmp_path, UnsupportedModel, "uses If", "tracing")
    for version in (10, 23):
        model = onnx.load(qdq)
        next(o for o in model.opset_import if o.domain == "").version = version
        refused(model, tmp_path, UnsupportedModel, f"opset {version}", "11 to 22")


def test_another_activation_is_refused(tmp_path: Path) -> None:
    path = tiny.export(tiny.build("DistilBertModel"), tmp_path / "model.onnx", ["last_hidden_state"])
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "Erf":
            node.op_type = "Tanh"
    refused(model, tmp_path, UnsupportedModel, "layer 0 has an unknown activation", "gelu_tanh")


def test_an_unscaled_attention_is_refused(tmp_path: Path) -> None:
    path = tiny.export(tiny.build("DistilBertModel"), tmp_path / "model.onnx", ["last_hidden_state"])
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "Constant":
            array = numpy_helper.to_array(node.attribute[0].t)
            if array.dtype == np.float32 and array.size == 1 and 0.35 < float(array.reshape(())) < 0.36:
                node.attribute[0].t.CopyFrom(numpy_helper.from_array(np.full_like(array, 0.9)))
    refused(model, tmp_path, UnsupportedModel, "layer 0 attention", "1/sqrt(8)")


def test_a_relative_position_bias_is_refused(tmp_path: Path) -> None:
    path = tiny.export(tiny.build("DistilBertModel"), tmp_path / "model.onnx", ["last_hidden_state"])
    model = onnx.load(path)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((tiny.HEADS, 1, 1), np.float32), "relative_bias"))
    bias = helper.make_node("Add", [softmax.input[0], "relative_bias"], ["biased"])
    softmax.input[0] = "biased"
    model.graph.node.insert(list(model.graph.node).index(softmax), bias)
    refused(model, tmp_path, UnsupportedModel, "learnt position bias (relative_bias)")


def test_an_unknown_head_is_refused(tmp_path: Path) -> None:
    path = tiny.export(tiny.build("DistilBertModel"), tmp_path / "model.onnx", ["last_hidden_state"])
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("Softmax", ["last_hidden_state"], ["strange"]))
    model.graph.output[0].name = "strange"
    refused(model, tmp_path, UnsupportedModel, "output strange", "mean")


def test_a_partly_quantised_graph_is_refused(qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    producers = {output: node for node in model.graph.node for output in node.output}
    matmul = next(node for node in model.graph.node if node.op_type == "MatMul")
    dequantize = producers[matmul.input[0]]
    quantize = producers[dequantize.input[0]]
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == dequantize.output[0] and node.op_type == "MatMul":
                node.input[i] = quantize.input[0]
    refused(model, tmp_path, UnsupportedModel, "the input of layer.0.attention.query is not quantised but other parts")


def test_a_cyclic_graph_is_refused(qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == "input_ids":
                node.input[i] = "again"
    model.graph.node.append(helper.make_node("Identity", ["again"], ["again"]))
    refused(model, tmp_path, InvalidModel, "not a valid ONNX model")


def test_a_weight_of_another_shape_is_refused(qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    name = first_weight(model).input[0]
    replace_initializer(model, name, lambda weight: weight[1:])
    refused(model, tmp_path, InvalidModel, "layer 0 query is [32, 31]", "[32, 32]")


def test_a_name_that_is_no_text_is_refused(qdq: Path, tmp_path: Path) -> None:
    """Of an operator, which protobuf reads all the same; only making another operator of that name fails."""
    model = onnx.load(qdq)
    name = next(node.name for node in model.graph.node if node.op_type == "MatMul").encode()
    content = model.SerializeToString()
    refused(content.replace(name, b"\xbd" + name[1:]), tmp_path, InvalidModel, "holds a name that is not UTF-8")


@pytest.mark.parametrize("config", ["[]", "{", '{"model_type": 3}', '{"model_type": "bert"}', '{"model_type": "mobilebert"}'])
def test_a_graph_that_is_not_read_tells_its_family(config: str, qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    model.opset_import[0].version = 9
    (tmp_path / "config.json").write_text(config)
    said = "(config.json says mobilebert; families read so far: bert, " if "mobile" in config else "has opset 9; export it"
    refused(model, tmp_path, UnsupportedModel, said)


def test_without_the_onnx_package(qdq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UnsupportedModel, match=r"pip install tilewright\[pipeline\]"):
        load(qdq)


def test_the_frontend_imports_no_heavy_package() -> None:
    code = "import sys, tilewright.frontend; sys.exit(bool({'onnx', 'torch', 'transformers', 'tvm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unused_initializer_is_noted(qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(7, np.float32), "left_over"))
    onnx.save(model, tmp_path / "model.onnx")
    assert "unused tensors: left_over" in load(tmp_path).notes


def activation_pair(model: onnx.ModelProto) -> onnx.NodeProto:
    """QuantizeLinear of the first Linear's input."""
    producers = {output: node for node in model.graph.node for output in node.output}
    matmul = next(node for node in model.graph.node if node.op_type == "MatMul")
    return producers[producers[matmul.input[0]].input[0]]


def test_zero_points_per_channel_on_activations_are_refused(qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    replace_initializer(model, activation_pair(model).input[2], lambda zero: np.full(tiny.HIDDEN, 3, zero.dtype))
    refused(model, tmp_path, UnsupportedModel, "per channel", "activations are per tensor")


def test_zero_points_of_another_type_are_refused(qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    replace_initializer(model, first_weight(model).input[2], lambda zero: zero.astype(np.uint8))
    refused(model, tmp_path, InvalidModel, "zero point", "expected int8")


@pytest.mark.parametrize("size", [0, 3, tiny.HIDDEN + 1])
def test_scales_of_wrong_size_are_refused(size: int, qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    for name in first_weight(model).input[1:]:
        replace_initializer(model, name, lambda values: np.ones(size, values.dtype))
    refused(model, tmp_path, InvalidModel, first_weight(model).input[0])


def test_weights_with_fewer_zero_points_than_scales_are_refused(qdq: Path, tmp_path: Path) -> None:
    model = onnx.load(qdq)
    replace_initializer(model, first_weight(model).input[2], lambda zero: zero[:3])
    refused(model, tmp_path, InvalidModel, "32 scales but 3 zero points")


@pytest.mark.parametrize("rows", [tiny.POSITIONS, tiny.VOCAB])
def test_tables_of_another_width_are_refused(rows: int, tmp_path: Path) -> None:
    path = tiny.export(tiny.build("DistilBertModel"), tmp_path / "model.onnx", ["last_hidden_state"])
    model = onnx.load(path)
    table = next(t.name for t in model.graph.initializer if list(t.dims) == [rows, tiny.HIDDEN])
    replace_initializer(model, table, lambda values: values[:, 1:])
    refused(model, tmp_path, InvalidModel, "31]", "LayerNorm is over 32")


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    path = tiny.export(tiny.build("DistilBertForTokenClassification"), tmp_path / "model.onnx", ["logits"])
    model = onnx.load(path)
    name = next(t.name for t in model.graph.initializer if list(t.dims) == [tiny.HIDDEN, tiny.LABELS])
    replace_initializer(model, name, lambda values: values[1:])
    refused(model, tmp_path, InvalidModel, "the head is [3, 31]")
