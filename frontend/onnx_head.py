"""Heads of an ONNX graph: what computes its outputs from the last hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tilewright.codegen.model import Head
from tilewright.errors import UnsupportedModel
from tilewright.frontend.onnx_linear import Product, Walker
from tilewright.frontend.sentence_transformers import UNSTATED_POOLING

_PRE_ACTIVATIONS: dict[str, Literal["tanh", "relu"]] = {"Tanh": "tanh", "Relu": "relu"}
_WHERE = "head"


@dataclass(frozen=True)
class FoundHead:
    """A head, and the value that holds the last hidden state."""

    head: Head
    hidden: str


def read_head(walker: Walker) -> FoundHead:
    """Recognise the head; raises UnsupportedModel if it is none of the supported ones."""
    graph = walker.graph
    first = graph.outputs[0]
    found = _question_answering(walker) or _classification(walker, first)
    if found is not None:
        if len(graph.outputs) > (2 if found.head.kind == "question_answering" else 1):
            raise _unsupported(walker)
        return found
    if walker.norm(first) is None:
        raise _unsupported(walker)
    for extra in graph.outputs[1:]:
        if _first_token(walker, extra) is None:
            raise _unsupported(walker)
        walker.notes.lines.append(f"dropped output {extra}")
        graph.read |= graph.initializers & set(graph.ancestors(extra))
    walker.notes.drop(graph.source(first)[1], _WHERE)
    walker.notes.lines.append(UNSTATED_POOLING)
    return FoundHead(Head("none"), first)


def _question_answering(walker: Walker) -> FoundHead | None:
    """Two outputs that are the two slices of one projection."""
    graph = walker.graph
    parts = []
    for output in graph.outputs:
        part = graph.source(output)[0]
        squeeze = graph.producers.get(part)
        if squeeze is not None and squeeze.op == "Squeeze" and squeeze.attributes["axes"] in ((-1,), (2,)):
            part = graph.source(squeeze.inputs[0])[0]
        parts.append(part)
    split = graph.producers.get(parts[0])
    if split is None or split.op != "Split" or parts != list(split.outputs) or split.attributes.get("axis") not in (-1, 2):
        return None
    found = _product(walker, split.inputs[0])
    if found is None or walker.norm(found.x) is None:
        return None
    return _head(walker, Head("question_answering", walker.float_linear(found, "qa_outputs")), found.x)


def _classification(walker: Walker, output: str) -> FoundHead | None:
    found = _product(walker, output)
    if found is None:
        return None
    projection = walker.float_linear(found, "classifier")
    if walker.norm(found.x) is not None:
        return _head(walker, Head("token_classification", projection), found.x)
    walker.notes.drop(walker.graph.source(found.x)[1], _WHERE)
    if (hidden := _first_token(walker, found.x)) is None:
        return None
    node = walker.graph.node(found.x)
    if node is None or node.op not in _PRE_ACTIVATIONS:
        return _head(walker, Head("sequence_classification", projection), hidden)
    inner = _product(walker, node.inputs[0])
    assert inner is not None  # _first_token walked over it
    pre = walker.float_linear(inner, "pre_classifier")
    return _head(walker, Head("sequence_classification", projection, pre, _PRE_ACTIVATIONS[node.op]), hidden)


def _first_token(walker: Walker, value: str) -> str | None:
    """Find the hidden state whose first token `value` is, directly or through one Linear and activation."""
    node = walker.graph.node(value)
    if node is not None and node.op in _PRE_ACTIVATIONS:
        inner = _product(walker, node.inputs[0])
        node = walker.graph.node(inner.x) if inner else None
    if node is None or node.op != "Gather" or node.attributes.get("axis") != 1:
        return None
    if walker.graph.scalar(node.inputs[1]) != 0 or walker.norm(node.inputs[0]) is None:
        return None
    return node.inputs[0]


def _product(walker: Walker, value: str) -> Product | None:
    found = walker.product(value, _WHERE)
    return found[0] if found is not None and not found[1] else None


def _head(walker: Walker, head: Head, hidden: str) -> FoundHead:
    walker.notes.drop(walker.graph.source(hidden)[1], _WHERE)
    return FoundHead(head, hidden)


def _unsupported(walker: Walker) -> UnsupportedModel:
    return UnsupportedModel(
        f"outputs {', '.join(walker.graph.outputs)} are not those of a supported head; supported: question answering, "
        "sequence classification, token classification, last hidden state"
    )
