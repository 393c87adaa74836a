"""What a model's outputs mean: the answer, class, labels or embedding of each sequence, according to its head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tilewright.manifest import Head, Manifest

if TYPE_CHECKING:
    from tokenizers import Encoding

Array = NDArray[Any]
Result = dict[str, Any]

_LONGEST_ANSWER = 30  # tokens


@dataclass(frozen=True)
class Tokens:
    """One sequence of a batch: the columns that hold its tokens, their ids and, if it came from text, how it was encoded."""

    columns: NDArray[np.intp]
    ids: list[int]
    texts: tuple[str, ...] = ()
    encoding: Encoding | None = None


def read(manifest: Manifest, outputs: Mapping[str, Array], sequences: Sequence[Tokens]) -> list[Result]:
    """One JSON-ready result per sequence of a batch."""
    results = []
    for row, sequence in enumerate(sequences):
        own = {
            output.name: outputs[output.name][row][sequence.columns] if output.per == "token" else outputs[output.name][row]
            for output in manifest.outputs
        }
        results.append(interpret(manifest, own, sequence))
    return results


def interpret(manifest: Manifest, own: Mapping[str, Array], sequence: Tokens) -> Result:
    """What the head says about one sequence: `own` holds its outputs, [tokens, ...] or [...] each."""
    given = {"texts": list(sequence.texts)} if sequence.texts else {}
    reader = READERS[manifest.head.problem_type or manifest.head.kind]
    return {**given, "tokens": len(sequence.ids), **reader(own, sequence, manifest.labels)}


def label(labels: Sequence[str], index: int) -> str:
    """Name of a class, as transformers names those without one."""
    return labels[index] if index < len(labels) else f"LABEL_{index}"


def probabilities(head: Head, logits: Array) -> Array:
    """Of the classes of a sequence, [classes]; of regression, which has none, the values as they are."""
    if head.problem_type == "regression":
        return logits
    return _sigmoid(logits) if head.problem_type == "multi_label_classification" else _softmax(logits)


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _sigmoid(logits: Array) -> Array:
    return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))


def _answer(outputs: Mapping[str, Array], sequence: Tokens, _: Sequence[str]) -> Result:
    """The span with the largest sum of logits; of the second text, if there are two."""
    starts, ends = outputs["start_logits"], outputs["end_logits"]
    allowed = np.ones(len(starts), bool)
    if sequence.encoding is not None:
        wanted = len(sequence.texts) - 1
        allowed = np.array([part == wanted for part in sequence.encoding.sequence_ids])
        allowed = allowed if allowed.any() else np.ones(len(starts), bool)
    spans = starts[:, None] + ends[None, :]
    inside = np.triu(np.ones_like(spans, bool)) & ~np.triu(np.ones_like(spans, bool), _LONGEST_ANSWER)
    spans = np.where(inside & allowed[:, None] & allowed[None, :], spans, -np.inf)
    first, last = map(int, np.unravel_index(spans.argmax(), spans.shape))
    probability = float(_softmax(starts)[first] * _softmax(ends)[last])
    result: Result = {"start_token": first, "end_token": last, "probability": probability}
    if sequence.encoding is not None:
        begin, end = sequence.encoding.offsets[first][0], sequence.encoding.offsets[last][1]
        result |= {"answer": sequence.texts[-1][begin:end], "start": begin, "end": end}
    return result


def _class(outputs: Mapping[str, Array], _: Tokens, labels: Sequence[str]) -> Result:
    probabilities = _softmax(outputs["logits"])
    index = int(probabilities.argmax())
    named = {label(labels, i): float(p) for i, p in enumerate(probabilities)}
    return {"label": label(labels, index), "index": index, "probability": float(probabilities[index]), "probabilities": named}


def _classes(outputs: Mapping[str, Array], _: Tokens, labels: Sequence[str]) -> Result:
    """Every label on its own: those that are more likely than not, and the probability of each."""
    probabilities = _sigmoid(outputs["logits"])
    named = {label(labels, i): float(p) for i, p in enumerate(probabilities)}
    return {"labels": [label for label, p in named.items() if p > 0.5], "probabilities": named}


def _scores(outputs: Mapping[str, Array], _: Tokens, labels: Sequence[str]) -> Result:
    """The logits as they are: a score, or one for each of several labels."""
    values = outputs["logits"]
    if len(values) == 1:
        return {"score": float(values[0])}
    return {"scores": {label(labels, i): float(value) for i, value in enumerate(values)}}


def _tags(outputs: Mapping[str, Array], sequence: Tokens, labels: Sequence[str]) -> Result:
    probabilities = _softmax(outputs["logits"])
    tags = []
    for position, index in enumerate(map(int, probabilities.argmax(axis=-1))):
        tag: Result = {"id": sequence.ids[position]}
        if (encoding := sequence.encoding) is not None:
            start, end = encoding.offsets[position]
            special = bool(encoding.special_tokens_mask[position])
            tag |= {"token": encoding.tokens[position], "start": start, "end": end, "special": special}
        tags.append(
            {**tag, "label": label(labels, index), "index": index, "probability": float(probabilities[position, index])}
        )
    return {"labels": tags}


def _embedding(outputs: Mapping[str, Array], _: Tokens, labels: Sequence[str]) -> Result:
    return {"embedding": outputs["sentence_embedding"].tolist()}


def _raw(outputs: Mapping[str, Array], _: Tokens, labels: Sequence[str]) -> Result:
    return {name: array.tolist() for name, array in outputs.items()}


READERS: dict[str, Callable[[Mapping[str, Array], Tokens, Sequence[str]], Result]] = {
    "question_answering": _answer,
    "single_label_classification": _class,
    "multi_label_classification": _classes,
    "regression": _scores,
    "token_classification": _tags,
    "embedding": _embedding,
    "raw": _raw,
}
"""Kind of head, or what it is used for where it can be several things, to the function that reads one sequence's outputs."""
