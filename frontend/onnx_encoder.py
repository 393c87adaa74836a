"""ONNX graphs of BERT-like encoders, float or static QDQ, to `EncoderModel`.

The graph is recognised by its structure alone, backwards from its outputs: the head, then the LayerNorms along the
residual stream, and between two of them either an attention or a feed-forward network.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.codegen.model import (
    Activation,
    Attention,
    Embeddings,
    EncoderConfig,
    EncoderModel,
    Head,
    Layer,
    LayerNorm,
    Linear,
)
from tilewright.errors import InvalidModel, UnsupportedModel
from tilewright.frontend.config import read_json
from tilewright.frontend.families import FAMILIES
from tilewright.frontend.huggingface import problem_type
from tilewright.frontend.onnx_attention import Chain, read_attention
from tilewright.frontend.onnx_check import check
from tilewright.frontend.onnx_embeddings import read_embeddings
from tilewright.frontend.onnx_graph import read_graph
from tilewright.frontend.onnx_head import FoundHead, read_head, read_pooling
from tilewright.frontend.onnx_linear import Product, Walker
from tilewright.frontend.onnx_patterns import ACTIVATIONS, match
from tilewright.frontend.onnx_probe import check_inputs, fold_scalars
from tilewright.frontend.sentence_transformers import UNSTATED_POOLING, read_embedding

ONNX_FOLDER = "onnx"
"""Folder in which hubs put ONNX files, beneath the model's other files."""


def load_onnx(path: Path, self_check: bool = True) -> EncoderModel:
    """Read the ONNX file at `path`; what lies beside it (or above a folder `onnx`) is used if present.

    That is tokenizer.json, config.json for the labels, and modules.json for a pooling that the graph leaves out.

    What the graph's masks, positions, token types and reshapes are taken to be is checked on probes. With `self_check`, so is
    every layer of the model that was read, in float32, against the graph without its quantised activations.
    Raises UnsupportedModel for an opset, operator, architecture or head that is not supported, or if a check fails, and
    InvalidModel for a damaged file, values that are not finite, or a tensor that the recognised encoder has no use for.
    """
    try:
        return _read(path, self_check)
    except UnsupportedModel as error:
        family = _other_family(_home(path) / "config.json")
        if family is None:
            raise
        raise UnsupportedModel(f"{error} (config.json says {family}; families read so far: {', '.join(FAMILIES)})") from None


def _read(path: Path, self_check: bool) -> EncoderModel:
    graph = read_graph(path)
    check_inputs(graph)
    fold_scalars(graph)
    walker = Walker(graph)
    found = read_head(walker)
    stream = _residual_stream(walker, found.hidden)
    norms = [walker.layer_norm(norm) for norm in map(walker.norm, stream) if norm is not None]
    if len(stream) < 3 or len(stream) % 2 == 0:
        raise UnsupportedModel(
            f"{path.name} has {len(stream)} LayerNorms along its residual stream; supported: one after the embeddings "
            "and two per layer (post-norm encoders)"
        )
    embeddings, prober = read_embeddings(walker, stream[0], norms[0])
    reader = _LayerReader(walker, embeddings.word.shape[1])
    layers = tuple(
        reader.layer(i, stream[2 * i : 2 * i + 3], norms[2 * i + 1], norms[2 * i + 2]) for i in range(len(stream) // 2)
    )
    _check_all_used(walker)
    _check_uniform(layers)
    home = _home(path)
    settings = read_json(home / "config.json", dict) if (home / "config.json").is_file() else {}
    head = _stated(walker, read_pooling(prober, found), found, home, settings)
    _check_shapes(embeddings, layers, head)
    config = EncoderConfig(
        architecture="distilbert" if embeddings.token_type is None else "bert",
        hidden_size=reader.hidden,
        num_heads=reader.num_heads,
        intermediate_size=layers[0].up.weight.shape[0],
        vocab_size=embeddings.word.shape[0],
        max_positions=embeddings.position.shape[0],
        activation=reader.activation or "gelu",
        labels=_labels(settings, head),
    )
    tokenizer = home / "tokenizer.json"
    text = tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else None
    model = EncoderModel(config, embeddings, layers, head, text, walker.notes.report())
    check(model, walker, prober, stream, found.outputs, self_check)
    return model


def _other_family(config: Path) -> str | None:
    """The model_type that the file `config` states, if it is one of which nothing is known."""
    with suppress(InvalidModel):
        family = read_json(config, dict).get("model_type") if config.is_file() else None
        stated = isinstance(family, str) and len(family) < 40 and family.isprintable()
        return family if stated and family not in FAMILIES else None
    return None


def _home(path: Path) -> Path:
    """Where the tokenizer and settings of the ONNX file at `path` lie."""
    above = path.parent.parent
    return above if path.parent.name == ONNX_FOLDER and (above / "config.json").is_file() else path.parent


def _stated(walker: Walker, head: Head, found: FoundHead, home: Path, settings: Mapping[str, Any]) -> Head:
    """`head` with what is stated beside the graph: the meaning of its logits, or a pooling where the graph pools nothing."""
    if head.kind == "sequence_classification" and head.projection is not None:
        return replace(head, problem_type=problem_type(settings, len(head.projection.weight)))
    if head.kind != "none" or found.outputs:
        return head
    embedding = read_embedding(home)
    if embedding is None:
        walker.notes.lines.append(UNSTATED_POOLING)
        return head
    walker.notes.lines.extend(embedding.notes)
    return replace(head, pooling=embedding.pooling, normalize=embedding.normalize)


class _LayerReader:
    """Reads encoder layers, and holds what they must have in common."""

    def __init__(self, walker: Walker, hidden: int) -> None:
        self.walker = walker
        self.hidden = hidden
        self.num_heads = 0
        self.activation: Activation | None = None

    def layer(self, index: int, stream: list[str], attention_norm: LayerNorm, output_norm: LayerNorm) -> Layer:
        """Read layer `index`, which lies between the first and the last of three values of the residual stream."""
        where = f"layer {index}"
        start, middle, end = stream
        up, down = self._feed_forward(middle, end, where, f"layer.{index}.ffn")
        return Layer(self._attention(start, middle, where, f"layer.{index}.attention"), attention_norm, up, down, output_norm)

    def _attention(self, start: str, end: str, where: str, name: str) -> Attention:
        output = self._residual(start, end, f"{where} output")
        values = read_attention(self.walker, output.x, self.hidden, where)
        self.num_heads = self.num_heads or values.num_heads
        if self.num_heads != values.num_heads:
            raise UnsupportedModel(f"{where} has {values.num_heads} heads, other layers {self.num_heads}")
        linears = {}
        for part, chain in (("query", values.query), ("key", values.key), ("value", values.value)):
            product = self._product(chain, start, f"{where} {part}")
            linears[part] = self.walker.linear(product, f"{name}.{part}", f"{where} {part}")
        inputs = {linear.input for linear in linears.values()}
        if len(inputs) > 1:
            raise UnsupportedModel(f"{where}: query, key and value quantise their common input differently")
        return Attention(
            **linears,
            output=self.walker.linear(output, f"{name}.output", f"{where} output"),
            query_scale=values.query.scale,
            key_scale=values.key.scale,
            value_scale=values.value.scale,
        )

    def _product(self, chain: Chain, start: str, where: str) -> Product:
        found = self.walker.product(chain.value, where)
        if found is None or found[1] or not self._same(found[0].x, start):
            raise UnsupportedModel(f"{where} is not a Linear of the layer's input; supported: BERT-like encoders")
        return found[0]

    def _feed_forward(self, start: str, end: str, where: str, name: str) -> tuple[Linear, Linear]:
        down = self._residual(start, end, f"{where} down")
        source, _ = self.walker.graph.source(down.x)
        matches = ((kind, match(self.walker.graph, source, pattern)) for kind, pattern in ACTIVATIONS.items())
        activation, inner = next(((kind, m) for kind, m in matches if m is not None), (None, None))
        if inner is None or activation is None or self.activation not in (None, activation):
            raise UnsupportedModel(f"{where} has an unknown activation function; supported: {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.walker.notes.drop(inner.pairs, f"{where} activation")
        found = self.walker.product(inner.values["x"], f"{where} up")
        if found is None or found[1] or not self._same(found[0].x, start):
            raise UnsupportedModel(f"{where} up is not a Linear of the attention's output; supported: BERT-like encoders")
        up = self.walker.linear(found[0], f"{name}.up", f"{where} up")
        return up, self.walker.linear(down, f"{name}.down", f"{where} down")

    def _residual(self, start: str, end: str, where: str) -> Product:
        """Find the Linear in end = LayerNorm(linear + start)."""
        norm = self.walker.norm(end)
        found = self.walker.product(norm.values["x"], where) if norm else None
        if found is None or len(found[1]) != 1 or not self._same(found[1][0], start):
            raise UnsupportedModel(f"{where} is not one Linear added to the residual; supported: post-norm encoders")
        self.walker.notes.drop(self.walker.graph.source(found[1][0])[1], f"{where} residual")
        return found[0]

    def _same(self, value: str, other: str) -> bool:
        return self.walker.graph.source(value)[0] == self.walker.graph.source(other)[0]


def _residual_stream(walker: Walker, hidden: str) -> list[str]:
    """LayerNorm outputs from the embeddings to `hidden`: each is a term of the sum that the next one normalises."""
    stream = [hidden]
    while (norm := walker.norm(stream[-1])) is not None:
        residual = [term for term in walker.terms(norm.values["x"]) if walker.norm(term) is not None]
        if len(residual) != 1:
            break
        stream.append(walker.graph.source(residual[0])[0])
    return stream[::-1]


def _check_all_used(walker: Walker) -> None:
    """Raise InvalidModel if a float or quantised initializer of several values was not read; integers build shapes."""
    graph = walker.graph
    consumed = {name for node in graph.nodes for name in node.inputs}
    left = [n for n in sorted(graph.initializers - graph.read) if graph.constants[n].size > 1]
    dead = [name for name in left if name not in consumed]
    if dead:
        walker.notes.lines.append(f"unused tensors: {', '.join(dead)}")
    for name in left:
        if name in consumed and graph.constants[name].dtype in (np.float32, np.float16, np.int8, np.uint8):
            raise InvalidModel(f"tensor {name} has no place in a BERT-like encoder; the graph computes something else")


def _check_uniform(layers: tuple[Layer, ...]) -> None:
    """Raise UnsupportedModel if only some parts of the encoder are quantised; weights may be without their inputs."""
    inputs: dict[str, bool] = {}
    weights: dict[str, bool] = {}
    for index, layer in enumerate(layers):
        attention = layer.attention
        scales = (attention.query_scale, attention.key_scale, attention.value_scale)
        linears = (attention.query, attention.key, attention.value, attention.output, layer.up, layer.down)
        if any(linear.input is not None for linear in linears):
            inputs |= {
                f"layer {index} attention {n}": s is not None for n, s in zip(("query", "key", "value"), scales, strict=True)
            }
        inputs |= {f"the input of {linear.name}": linear.input is not None for linear in linears}
        weights |= {linear.name: linear.quantized for linear in linears}
    for states in (weights, inputs):
        if len(set(states.values())) > 1:
            missing = next(name for name, quantized in states.items() if not quantized)
            raise UnsupportedModel(
                f"{missing} is not quantised but other parts are; quantise every Linear and attention operand, or no activation"
            )


def _check_shapes(embeddings: Embeddings, layers: tuple[Layer, ...], head: Head) -> None:
    """Raise InvalidModel unless all parts have the width of the word table, and all layers one inner width."""
    hidden, inner = embeddings.word.shape[1], len(layers[0].up.weight)
    expected: list[tuple[str, Linear | None, tuple[int, int]]] = []
    norms: list[tuple[str, LayerNorm]] = []
    for index, layer in enumerate(layers):
        attention = layer.attention
        expected += [
            (f"layer {index} {n}", getattr(attention, n), (hidden, hidden)) for n in ("query", "key", "value", "output")
        ]
        expected += [(f"layer {index} up", layer.up, (inner, hidden)), (f"layer {index} down", layer.down, (hidden, inner))]
        norms += [(f"layer {index}", layer.attention_norm), (f"layer {index}", layer.output_norm)]
    outputs = 0 if head.projection is None else 2 if head.kind == "question_answering" else len(head.projection.weight)
    expected += [("the head's first Linear", head.pre, (hidden, hidden)), ("the head", head.projection, (outputs, hidden))]
    for name, linear, shape in expected:
        if linear is not None and (linear.weight.shape != shape or linear.bias.shape != shape[:1]):
            found = f"{list(linear.weight.shape)} with a bias of {linear.bias.size}"
            raise InvalidModel(f"{name} is {found}, expected {list(shape)} with a bias of {shape[0]}")
    for name, norm in norms:
        if norm.weight.shape != (hidden,) or norm.bias.shape != (hidden,):
            raise InvalidModel(f"a LayerNorm of {name} is not over {hidden} values")


def _labels(settings: Mapping[str, Any], head: Head) -> tuple[str, ...]:
    """Labels of a classifier from config.json beside the model, if it has them all."""
    if head.projection is None or "classification" not in head.kind:
        return ()
    try:
        return tuple(str(settings["id2label"][str(i)]) for i in range(len(head.projection.weight)))
    except (KeyError, TypeError):
        return ()
