"""ONNX graphs that look like an encoder and mean something else: each is read right, or refused with what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests import oracle, tiny
from tilewright.baseline import OnnxRuntime
from tilewright.errors import TilewrightError
from tilewright.frontend import load

SEQUENCES = tiny.sequences(1, 6, 9, 30)
LOWEST = torch.finfo(torch.float32).min

Masker = Callable[[torch.Tensor], torch.Tensor]
Edit = Callable[[onnx.ModelProto], None]


class Masked(torch.nn.Module):
    """An encoder whose [batch, tokens] mask `masker` turns into what is added to the logits."""

    def __init__(self, masker: Masker) -> None:
        super().__init__()
        self.model = tiny.build("BertModel")
        self.masker = masker

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=self.masker(mask.float())).last_hidden_state


def _distance(mask: torch.Tensor) -> torch.Tensor:
    steps = torch.arange(mask.shape[1])
    return steps[:, None] - steps[None]


def _added(keep: torch.Tensor) -> torch.Tensor:
    return (1 - keep.float()) * LOWEST


MASKS: dict[str, Masker] = {
    "causal": lambda mask: _added((_distance(mask) >= 0) * torch.ones_like(mask)[:, None, None]),
    "causal and padding": lambda mask: _added((_distance(mask) >= 0) * mask[:, None, None]),
    "sliding window": lambda mask: _added((_distance(mask).abs() <= 4) * mask[:, None, None]),
    "inverted": lambda mask: _added((1 - mask)[:, None, None]),
    "of queries": lambda mask: _added(mask[:, None, :, None].expand(-1, -1, -1, mask.shape[1])),
    "weak": lambda mask: (mask[:, None, None] - 1) * 2,
    "distance bias": lambda mask: _added(mask[:, None, None]) - _distance(mask).abs(),
    "none": lambda mask: torch.zeros_like(mask)[:, None, None],
    "last key left out": lambda mask: _added((torch.arange(mask.shape[1]) < mask.shape[1] - 1) * mask[:, None, None]),
}


def export(module: torch.nn.Module, path: Path) -> Path:
    arguments = tuple(torch.ones(2, 7, dtype=torch.long) for _ in range(2))
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "length"} for name in names}
    torch.onnx.export(
        module, arguments, path, input_names=names, output_names=["y"], dynamic_axes=axes, opset_version=17, dynamo=False
    )
    return path


def check_refused(path: Path, *parts: str) -> None:
    with pytest.raises(TilewrightError) as caught:
        load(path)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def check_equal(path: Path) -> None:
    """The model as it was read gives what ONNX Runtime makes of the graph."""
    model, run = load(path), OnnxRuntime(path, threads=1, unfused=True)
    for ids, found in zip(SEQUENCES, oracle.forward_float(model, SEQUENCES), strict=True):
        np.testing.assert_allclose(found["last_hidden_state"], next(iter(run(ids[None]).values()))[0], atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("self_check", [False, True])
def test_masks(name: str, self_check: bool, tmp_path: Path) -> None:
    path = export(Masked(MASKS[name]), tmp_path / "model.onnx")
    with pytest.raises(TilewrightError, match=r"layer 0 attention: .*(mask|minus infinity)"):
        load(path, self_check=self_check)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["none", "causal", "inverted"])
def test_masks_of_a_graph_for_one_shape(name: str, tmp_path: Path) -> None:
    path = export(Masked(MASKS[name]), tmp_path / "model.onnx")
    model = onnx.load(path)
    for value in model.graph.input:
        for dim, extent in zip(value.type.tensor_type.shape.dim, (1, 16), strict=True):
            dim.dim_value = extent
    onnx.save(model, path)
    check_refused(path, "mask")


@pytest.mark.filterwarnings("ignore")
def test_the_mask_of_padding_is_read(tmp_path: Path) -> None:
    check_equal(export(Masked(lambda mask: _added(mask[:, None, None])), tmp_path / "model.onnx"))


def nodes(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def insert_after(model: onnx.ModelProto, value: str, *added: onnx.NodeProto) -> None:
    """Let the readers of `value` read the last output of `added`, which start from it."""
    index = next(i for i, node in enumerate(model.graph.node) if value in node.output)
    for node in model.graph.node[index + 1 :]:
        for i, name in enumerate(node.input):
            if name == value:
                node.input[i] = added[-1].output[0]
    for node in reversed(added):
        model.graph.node.insert(index + 1, node)


def attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(a for a in node.attribute if a.name == name)


def position_gather(model: onnx.ModelProto) -> onnx.NodeProto:
    rows = {t.name: t.dims[0] for t in model.graph.initializer if len(t.dims) == 2}
    return next(node for node in nodes(model, "Gather") if rows.get(node.input[0]) == tiny.POSITIONS)


def reverse_positions(model: onnx.ModelProto) -> None:
    gather = position_gather(model)
    model.graph.initializer.append(numpy_helper.from_array(np.array(tiny.POSITIONS - 1), "last_position"))
    node = helper.make_node("Sub", ["last_position", gather.input[1]], ["reversed"])
    model.graph.node.insert(list(model.graph.node).index(gather), node)
    gather.input[1] = "reversed"


def last_position_twice(model: onnx.ModelProto) -> None:
    gather = position_gather(model)
    model.graph.initializer.append(numpy_helper.from_array(np.array(tiny.POSITIONS - 2), "last_but_one"))
    node = helper.make_node("Min", [gather.input[1], "last_but_one"], ["limited"])
    model.graph.node.insert(list(model.graph.node).index(gather), node)
    gather.input[1] = "limited"


def double_positions(model: onnx.ModelProto) -> None:
    gather = position_gather(model)
    model.graph.initializer.append(numpy_helper.from_array(np.array(2), "two_positions"))
    node = helper.make_node("Div", [gather.input[1], "two_positions"], ["halved"])
    model.graph.node.insert(list(model.graph.node).index(gather), node)
    gather.input[1] = "halved"


def norm_over_tokens(model: onnx.ModelProto) -> None:
    norm = nodes(model, "LayerNormalization")[1]
    attribute(norm, "axis").i = 1
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, tiny.HIDDEN), np.float32), "ones"))


def cast_to_int_and_back(model: onnx.ModelProto) -> None:
    value = nodes(model, "LayerNormalization")[1].output[0]
    down = helper.make_node("Cast", [value], ["whole"], to=TensorProto.INT32)
    insert_after(model, value, down, helper.make_node("Cast", ["whole"], ["back"], to=TensorProto.FLOAT))


def softmax_over_queries(model: onnx.ModelProto) -> None:
    attribute(nodes(model, "Softmax")[0], "axis").i = 2


def scaled_context(model: onnx.ModelProto) -> None:
    softmax = nodes(model, "Softmax")[0]
    context = next(node for node in nodes(model, "MatMul") if softmax.output[0] in node.input)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1.5), "scale_of_context"))
    insert_after(model, context.output[0], helper.make_node("Mul", [context.output[0], "scale_of_context"], ["scaled"]))


def other_epsilon_sign(model: onnx.ModelProto) -> None:
    attribute(nodes(model, "LayerNormalization")[1], "epsilon").f = -0.5


def transposed_sequences(model: onnx.ModelProto) -> None:
    """A reshape that takes tokens for sequences before heads are split."""
    split = {node.input[0] for node in nodes(model, "Transpose")}
    reshape = next(node for node in nodes(model, "Reshape") if node.output[0] in split)
    shape = helper.make_node("Shape", [reshape.input[0]], ["extents"])
    sizes = {"first": 0, "second": 1, "heads": tiny.HEADS, "channels": tiny.HIDDEN // tiny.HEADS}
    model.graph.initializer.extend(numpy_helper.from_array(np.array([size]), name) for name, size in sizes.items())
    batch = helper.make_node("Gather", ["extents", "first"], ["batch_extent"])
    tokens = helper.make_node("Gather", ["extents", "second"], ["token_extent"])
    target = helper.make_node("Concat", ["token_extent", "batch_extent", "heads", "channels"], ["target"], axis=0)
    index = list(model.graph.node).index(reshape)
    reshape.input[1] = "target"
    for node in (target, tokens, batch, shape):
        model.graph.node.insert(index, node)


def residual_of_elsewhere(model: onnx.ModelProto) -> None:
    first, second = (node.output[0] for node in nodes(model, "LayerNormalization")[:2])
    add = next(node for node in nodes(model, "Add") if second in node.input)
    add.input[list(add.input).index(second)] = first


def quick_gelu(model: onnx.ModelProto) -> None:
    for erf in nodes(model, "Erf"):
        erf.op_type = "Sigmoid"


def training_dropout(model: onnx.ModelProto) -> None:
    value = nodes(model, "LayerNormalization")[1].output[0]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "ratio"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "training"))
    insert_after(model, value, helper.make_node("Dropout", [value, "ratio", "training"], ["dropped"]))


@dataclass(frozen=True)
class Case:
    """An edit of an exported encoder, and words of the refusal."""

    edit: Edit
    words: tuple[str, ...] = ()


EDITS = [
    Case(reverse_positions, ("positions",)),
    Case(double_positions, ("positions",)),
    Case(last_position_twice, ("positions",)),
    Case(norm_over_tokens),
    Case(cast_to_int_and_back),
    Case(softmax_over_queries, ("softmax over the keys",)),
    Case(scaled_context, ("context",)),
    Case(other_epsilon_sign, ("eps",)),
    Case(transposed_sequences),
    Case(residual_of_elsewhere, ("residual",)),
    Case(quick_gelu, ("activation",)),
    Case(training_dropout),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "model.onnx"
    return tiny.export(tiny.build("BertModel"), path, ["last_hidden_state"])


@pytest.mark.parametrize("case", EDITS, ids=lambda case: case.edit.__name__)
@pytest.mark.parametrize("self_check", [False, True])
def test_edits_are_refused(case: Case, self_check: bool, exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported)
    case.edit(model)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(TilewrightError) as caught:
        load(tmp_path / "model.onnx", self_check=self_check)
    assert all(word in str(caught.value) for word in case.words), str(caught.value)


class Constant(torch.nn.Module):
    """An encoder with constant positions from `first` on and one token type."""

    def __init__(self, first: int, token_type: int) -> None:
        super().__init__()
        self.model = tiny.build("BertModel")
        self.first, self.token_type = first, token_type

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        types = torch.full_like(ids, self.token_type)
        positions = (torch.arange(ids.shape[1]) + self.first)[None]
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types, position_ids=positions).last_hidden_state


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("first", "token_type"), [(0, 0), (2, 0), (0, 1), (2, 1)])
def test_constant_positions_and_token_types_are_read(first: int, token_type: int, tmp_path: Path) -> None:
    path = export(Constant(first, token_type), tmp_path / "model.onnx")
    assert load(path).config.max_positions == tiny.POSITIONS - first
    check_equal(path)
