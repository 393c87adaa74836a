"""A quantised `EncoderModel` as a static QDQ ONNX file, which ONNX Runtime, OpenVINO and this package's frontend read.

Inputs of linears are u8, weights s8 per output channel, query, key and value s8 per tensor: the integers of the checkpoint. All
else is float32, softmax weights included. Run unfused, ONNX Runtime computes these very products; its fused kernels saturate on
CPUs without VNNI.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tilewright.codegen.model import EncoderModel, Layer, LayerNorm, Linear, Quantization
from tilewright.errors import InvalidInput
from tilewright.frontend import load
from tilewright.pipeline.disk import scratch_directory

OPSET = 20
"""The first with Gelu as one operator."""

_IR_VERSION = 9
_MASKED = -1e4
FILE = "model.onnx"


def export_onnx(model: str | PathLike[str] | EncoderModel, output: str | PathLike[str]) -> Path:
    """Write the quantised `model` as model.onnx, with its tokenizer.json, into the new directory `output`.

    Raises InvalidInput for a float model or an output that exists or cannot be written, and what `load` raises.
    """
    target = Path(output)
    if target.exists():
        raise InvalidInput(f"output {target} exists; remove it or choose another")
    source = model if isinstance(model, EncoderModel) else load(model)
    if not source.quantized:
        raise InvalidInput("the model is not quantised; a QDQ file holds s8 weights: quantise it first")
    with scratch_directory(target) as scratch:
        onnx.save(build(source), scratch / FILE)
        if source.tokenizer is not None:
            (scratch / "tokenizer.json").write_text(source.tokenizer, encoding="utf-8")
    return target


def build(model: EncoderModel) -> onnx.ModelProto:
    """The graph of a quantised `model`, of inputs s64[batch, length] and its outputs by the engine's names."""
    graph = _Graph()
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if model.embeddings.token_type is not None else [])]
    mask = graph.op("Cast", "attention_mask", to=TensorProto.FLOAT)
    added = graph.op("Mul", graph.op("Sub", graph.number(1), mask), graph.number(_MASKED))
    added = graph.op("Unsqueeze", added, graph.integers(1, 2))
    x = _embeddings(graph, model)
    for layer in model.layers:
        x = _layer(graph, model, layer, x, added)
    outputs = _head(graph, model, x, mask)
    for name, (value, _) in outputs.items():
        graph.nodes.append(helper.make_node("Identity", [value], [name]))
    proto = helper.make_graph(
        graph.nodes,
        "encoder",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, (_, shape) in outputs.items()],
        graph.initializers,
    )
    made = helper.make_model(proto, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="tilewright")
    made.ir_version = _IR_VERSION
    onnx.checker.check_model(made)
    return made


class _Graph:
    """Nodes and constants as they are added; values are named by their numbers."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output, and return that."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, array: NDArray[Any]) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def pair(self, value: str, scale: float, zero_point: int, dtype: type[np.uint8] | type[np.int8]) -> str:
        """Quantise and dequantise `value`."""
        operands = self.number(scale), self.constant(np.array(zero_point, dtype))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", value, *operands), *operands)

    def quantized(self, value: str, quantization: Quantization | None) -> str:
        assert quantization is not None
        return self.pair(value, quantization.scale, quantization.zero_point, np.uint8)

    def linear(self, x: str, linear: Linear) -> str:
        """The product of `x`, quantised already where the linear is, with the weight, and the bias."""
        weight = self.constant(linear.weight.T)
        if linear.scale is not None:
            zeros = np.zeros(len(linear.scale), np.int8)
            weight = self.op("DequantizeLinear", weight, self.constant(linear.scale), self.constant(zeros), axis=1)
        return self.op("Add", self.op("MatMul", x, weight), self.constant(linear.bias))

    def norm(self, x: str, norm: LayerNorm) -> str:
        operands = self.constant(norm.weight), self.constant(norm.bias)
        return self.op("LayerNormalization", x, *operands, axis=-1, epsilon=norm.eps)


def _embeddings(graph: _Graph, model: EncoderModel) -> str:
    embeddings = model.embeddings
    length = graph.op("Squeeze", graph.op("Shape", "input_ids", start=1, end=2), graph.integers(0))
    zero, one = (graph.constant(np.array(value, np.int64)) for value in (0, 1))
    positions = graph.op("Unsqueeze", graph.op("Range", zero, length, one), graph.integers(0))
    x = graph.op("Gather", graph.constant(embeddings.word), "input_ids")
    if embeddings.token_type is not None:
        x = graph.op("Add", x, graph.op("Gather", graph.constant(embeddings.token_type), "token_type_ids"))
    x = graph.op("Add", x, graph.op("Gather", graph.constant(embeddings.position), positions))
    return graph.norm(x, embeddings.norm)


def _layer(graph: _Graph, model: EncoderModel, layer: Layer, x: str, mask: str) -> str:
    attention, heads, hidden = layer.attention, model.config.num_heads, model.config.hidden_size
    given = graph.quantized(x, attention.query.input)
    operands = []
    for linear, scale, order in (
        (attention.query, attention.query_scale, (0, 2, 1, 3)),
        (attention.key, attention.key_scale, (0, 2, 3, 1)),
        (attention.value, attention.value_scale, (0, 2, 1, 3)),
    ):
        assert scale is not None
        value = graph.pair(graph.linear(given, linear), scale, 0, np.int8)
        value = graph.op("Reshape", value, graph.integers(0, 0, heads, hidden // heads))
        operands.append(graph.op("Transpose", value, perm=order))
    query, key, value = operands
    scores = graph.op("Mul", graph.op("MatMul", query, key), graph.number(1 / math.sqrt(hidden // heads)))
    weights = graph.op("Softmax", graph.op("Add", scores, mask), axis=-1)
    context = graph.op("Transpose", graph.op("MatMul", weights, value), perm=(0, 2, 1, 3))
    context = graph.quantized(graph.op("Reshape", context, graph.integers(0, 0, hidden)), attention.output.input)
    x = graph.norm(graph.op("Add", graph.linear(context, attention.output), x), layer.attention_norm)
    inner = _activation(graph, model, graph.linear(graph.quantized(x, layer.up.input), layer.up))
    down = graph.linear(graph.quantized(inner, layer.down.input), layer.down)
    return graph.norm(graph.op("Add", down, x), layer.output_norm)


def _activation(graph: _Graph, model: EncoderModel, x: str) -> str:
    if model.config.activation == "relu":
        return graph.op("Relu", x)
    return graph.op("Gelu", x, approximate="tanh" if model.config.activation == "gelu_tanh" else "none")


def _head(graph: _Graph, model: EncoderModel, x: str, mask: str) -> dict[str, tuple[str, Sequence[str | int]]]:
    """Outputs by name with their shapes."""
    head, hidden = model.head, model.config.hidden_size
    if head.projection is None:
        return {
            "last_hidden_state": (x, ("batch", "length", hidden)),
            "sentence_embedding": (_pooled(graph, model, x, mask), ("batch", hidden)),
        }
    classes = len(head.projection.bias)
    if head.kind == "question_answering":
        names = ("start_logits", "end_logits")
        halves = [f"{name}_column" for name in names]
        graph.nodes.append(helper.make_node("Split", [graph.linear(x, head.projection)], halves, axis=-1, num_outputs=2))
        columns = [graph.op("Squeeze", half, graph.integers(-1)) for half in halves]
        return {name: (column, ("batch", "length")) for name, column in zip(names, columns, strict=True)}
    if head.kind == "token_classification":
        return {"logits": (graph.linear(x, head.projection), ("batch", "length", classes))}
    first = graph.op("Gather", x, graph.constant(np.array(0, np.int64)), axis=1)
    if head.pre is not None:
        first = graph.linear(first, head.pre)
    if head.pre_activation is not None:
        first = graph.op({"tanh": "Tanh", "relu": "Relu"}[head.pre_activation], first)
    return {"logits": (graph.linear(first, head.projection), ("batch", classes))}


def _pooled(graph: _Graph, model: EncoderModel, x: str, mask: str) -> str:
    pooling = model.head.pooling
    each = graph.op("Unsqueeze", mask, graph.integers(2))
    if pooling == "cls":
        row = graph.op("Gather", x, graph.constant(np.array(0, np.int64)), axis=1)
    elif pooling == "max":
        low = graph.op("Mul", graph.op("Sub", graph.number(1), each), graph.number(-1e9))
        row = graph.op("ReduceMax", graph.op("Add", x, low), graph.integers(1), keepdims=0)
    else:
        total = graph.op("ReduceSum", graph.op("Mul", x, each), graph.integers(1), keepdims=0)
        row = graph.op("Div", total, graph.op("ReduceSum", each, graph.integers(1), keepdims=0))
    if not model.head.normalize:
        return row
    length = graph.op("ReduceL2", row, graph.integers(1), keepdims=1)
    return graph.op("Div", row, graph.op("Max", length, graph.number(1e-12)))
