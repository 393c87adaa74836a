"""Heads of an ONNX graph: what computes its outputs from the last hidden state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.model import Head, Pooling
from tilewright.errors import UnsupportedModel
from tilewright.frontend.onnx_linear import Product, Walker
from tilewright.frontend.onnx_probe import Prober
from tilewright.frontend.probe import Probe
from tilewright.frontend.reference import pool

_PRE_ACTIVATIONS: dict[str, Literal["tanh", "relu"]] = {"Tanh": "tanh", "Relu": "relu"}
_WHERE = "head"


@dataclass(frozen=True)
class FoundHead:
    """A head, the value that holds the last hidden state, and the graph's outputs by the names that the model's have."""

    head: Head
    hidden: str
    outputs: Mapping[str, str]


def read_head(walker: Walker) -> FoundHead:
    """Recognise the head; raises UnsupportedModel if it is none of the supported ones.

    How a sentence embedding among the outputs is pooled is left to `read_pooling`.
    """
    graph = walker.graph
    first = graph.outputs[0]
    found = _question_answering(walker) or _classification(walker, first)
    if found is not None:
        if len(graph.outputs) > len(found.outputs):
            raise _unsupported(walker)
        return found
    kinds = {output: _embedding(walker, output) for output in graph.outputs}
    hidden = {kind[1] for kind in kinds.values() if kind is not None}
    only_poolers = all(kind is None or kind[0] == "pooler" for kind in kinds.values())
    if None in kinds.values() or len(hidden) != 1 or only_poolers:
        raise _unsupported(walker)
    pooled = [output for output, kind in kinds.items() if kind is not None and kind[0] == "pooled"]
    embedding = "sentence_embedding" if "sentence_embedding" in pooled else pooled[0] if pooled else None
    for output, kind in kinds.items():
        if kind is not None and kind[0] != "hidden":
            graph.read |= graph.initializers & (set(graph.ancestors(output)) - set(graph.ancestors(kind[1])))
            if output != embedding:
                walker.notes.lines.append(f"dropped output {output}")
    (value,) = hidden
    walker.notes.drop(graph.source(value)[1], _WHERE)
    return FoundHead(Head("none"), value, {} if embedding is None else {"sentence_embedding": embedding})


def read_pooling(prober: Prober, found: FoundHead) -> Head:
    """The head with the pooling of its sentence embedding, told from what the graph makes of the hidden state on probes.

    Raises UnsupportedModel if it is none of those that there are.
    """
    if "sentence_embedding" not in found.outputs:
        return found.head
    output = found.outputs["sentence_embedding"]
    values = prober.run([found.hidden, output])
    for pooling in get_args(Pooling):
        for normalize in (False, True):
            if all(
                _same_embeddings(probe, value[found.hidden], value[output], pooling, normalize)
                for probe, value in zip(prober.probes, values, strict=True)
            ):
                return replace(found.head, pooling=pooling, normalize=normalize)
    raise UnsupportedModel(
        f"output {output} is neither the mean, the first nor the largest of the tokens' hidden states, nor that normalised; "
        "export the model without this output"
    )


def _same_embeddings(probe: Probe, hidden: NDArray[Any], found: NDArray[Any], pooling: Pooling, normalize: bool) -> bool:
    if hidden.shape[:2] != probe.ids.shape or found.shape != (len(hidden), hidden.shape[-1]):
        return False
    expected = np.stack([pool(tokens, pooling, normalize) for tokens in probe.sequences(hidden)])
    return bool(np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max())


def _embedding(walker: Walker, output: str) -> tuple[Literal["hidden", "pooled", "pooler"], str] | None:
    """What an output of a model without a head is, and the hidden state it is made of; a pooler has a Linear."""
    graph = walker.graph
    if walker.norm(output) is not None:
        return "hidden", graph.source(output)[0]
    reached, open_values, seen = set(), [output], set()
    while open_values:
        value = graph.source(open_values.pop())[0]
        node = graph.producers.get(value)
        if value in seen or node is None:
            continue
        seen.add(value)
        if walker.norm(value) is not None:
            reached.add(value)
        elif node.op == "Gather" and graph.constant(node.inputs[0]) is not None:
            return None
        elif node.op in ("MatMul", "Gemm"):
            inner = _first_token(walker, output)
            return None if inner is None else ("pooler", graph.source(inner)[0])
        else:
            open_values += [name for name in node.inputs if name]
    return ("pooled", reached.pop()) if len(reached) == 1 else None


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
    names = dict(zip(("start_logits", "end_logits"), graph.outputs, strict=True))
    return _head(walker, Head("question_answering", walker.float_linear(found, "qa_outputs")), found.x, names)


def _classification(walker: Walker, output: str) -> FoundHead | None:
    found = _product(walker, output)
    if found is None:
        return None
    projection = walker.float_linear(found, "classifier")
    if walker.norm(found.x) is not None:
        return _head(walker, Head("token_classification", projection), found.x, {"logits": output})
    walker.notes.drop(walker.graph.source(found.x)[1], _WHERE)
    if (hidden := _first_token(walker, found.x)) is None:
        return None
    node = walker.graph.node(found.x)
    if node is None or node.op not in _PRE_ACTIVATIONS:
        return _head(walker, Head("sequence_classification", projection), hidden, {"logits": output})
    inner = _product(walker, node.inputs[0])
    assert inner is not None  # _first_token walked over it
    pre = walker.float_linear(inner, "pre_classifier")
    head = Head("sequence_classification", projection, pre, _PRE_ACTIVATIONS[node.op])
    return _head(walker, head, hidden, {"logits": output})


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


def _head(walker: Walker, head: Head, hidden: str, outputs: Mapping[str, str]) -> FoundHead:
    walker.notes.drop(walker.graph.source(hidden)[1], _WHERE)
    return FoundHead(head, hidden, outputs)


def _unsupported(walker: Walker) -> UnsupportedModel:
    return UnsupportedModel(
        f"outputs {', '.join(walker.graph.outputs)} are not those of a supported head; supported: question answering, "
        "sequence classification, token classification, last hidden state"
    )
