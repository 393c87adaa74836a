"""What endpoints of several APIs have in common: choosing a model, unit vectors, documents by rank, tags."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import Request
from numpy.typing import NDArray

from tilewright.serving.errors import UNKNOWN_MODEL, UNSUITABLE, RequestError
from tilewright.serving.model import SCORES, Answer, ServedModel

Float32 = NDArray[np.float32]


def choose(request: Request, name: str | None, *uses: str) -> ServedModel:
    """The model called `name`, or without a name the first that has one of `uses`, tried in order; raises RequestError."""
    models: Mapping[str, ServedModel] = request.app.state.models
    served = ", ".join(models)
    if name is not None and name not in models:
        raise RequestError(UNKNOWN_MODEL, f"model {name[:100]!r} is not served; served: {served}")
    candidates = models.values() if name is None else [models[name]]
    for use in uses:
        for model in candidates:
            if use in model.uses:
                return model
    heads = ", ".join(f"{model.name} ({model.manifest.head.kind})" for model in candidates)
    raise RequestError(UNSUITABLE, f"this takes a model for {' or '.join(uses)}; served: {heads}")


def embeddings(answers: Sequence[Answer], normalize: bool) -> Float32:
    """f32[sequences, width], each of length 1 if `normalize`."""
    vectors = np.stack([answer.outputs["sentence_embedding"] for answer in answers]).astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12) if normalize else vectors


async def rank(
    model: ServedModel, query: str, documents: Sequence[str], truncate: bool, raw: bool = False
) -> tuple[list[tuple[int, float]], int]:
    """Documents by how well they fit the query, the best first, each with its score; and how many tokens that took.

    A model that scores pairs gives the sigmoid of its logit, or the logit itself if `raw`; an embedding model the cosine.
    """
    if SCORES in model.uses:
        answers = await model.run([(query, document) for document in documents], truncate)
        values = [float(answer.outputs["logits"].item()) for answer in answers]
    else:
        answers = await model.run([query, *documents], truncate)
        first, *others = embeddings(answers, normalize=True)
        values, raw = [float(other @ first) for other in others], True
    # by logits, for sigmoids of large ones are equal
    return [(index, values[index] if raw else _sigmoid(values[index])) for index in descending(values)], count_tokens(answers)


def descending(values: Sequence[float]) -> list[int]:
    """Indices, the highest value first, equal ones in their order."""
    return sorted(range(len(values)), key=lambda index: -values[index])


def tags(model: ServedModel, answer: Answer) -> list[dict[str, Any]]:
    """Label of each token of the text itself, with its place in characters."""
    return [
        {"token": tag["token"], "label": tag["label"], "score": tag["probability"], "start": tag["start"], "end": tag["end"]}
        for tag in model.interpret(answer)["labels"]
        if not tag["special"]
    ]


def count_tokens(answers: Sequence[Answer]) -> int:
    """Of all sequences."""
    return sum(len(answer.tokens.ids) for answer in answers)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else 1 - 1 / (1 + math.exp(logit))
