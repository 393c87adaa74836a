"""Sentence embeddings, without labels: the dense model is the teacher; questions must find their paragraphs again.

Data is plain text, one text a line, or a SQuAD file, whose paragraphs and questions are texts; retrieval needs the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from tilewright.errors import InvalidInput
from tilewright.pipeline.distillation import DistillationSettings
from tilewright.pipeline.tasks.base import Context, Feature, Predict, Task, feature, read_texts, tokenize
from tilewright.pipeline.tasks.squad import Question, read_squad

OUTPUT = "sentence_embedding"


def read(path: Path) -> list[str | Question]:
    """Texts of a plain text file, or questions of a SQuAD file (`.json`)."""
    return list(read_squad(path)) if path.suffix == ".json" else list(read_texts(path))


def texts(records: Sequence[str | Question]) -> list[str | tuple[str, str]]:
    """Every text; of a SQuAD file its paragraphs and questions in turns, as they stand there."""
    found: dict[str, None] = {}
    for record in records:
        if isinstance(record, Question):
            found.setdefault(record.context)
            found.setdefault(record.question)
        else:
            found.setdefault(record)
    return list(found)


def features(records: Sequence[str | Question], context: Context) -> list[Feature]:
    """A feature for every text."""
    return [feature(encoding) for encoding in tokenize(texts(records), context)]


def embed(predict: Predict, given: Sequence[str], context: Context) -> NDArray[np.float32]:
    """Embeddings f32[texts, channels] of L2 norm 1."""
    outputs = predict([feature(encoding) for encoding in tokenize(given, context)])
    if OUTPUT not in outputs[0]:
        raise InvalidInput(f"the model has no output {OUTPUT}; give one that ends with its pooling")
    rows = np.stack([output[OUTPUT] for output in outputs]).astype(np.float32)
    return cast(NDArray[np.float32], rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def ranks(questions: NDArray[np.float32], paragraphs: NDArray[np.float32], expected: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rank, from 1, of each question's paragraph `expected` s64[questions] by cosine; of equals the expected one comes last.

    `questions` f32[questions, channels] and `paragraphs` f32[paragraphs, channels] have L2 norm 1.
    """
    found = []
    for start in range(0, len(questions), 1024):
        scores = questions[start : start + 1024] @ paragraphs.T
        own = scores[np.arange(len(scores)), expected[start : start + 1024]]
        found.append((scores >= own[:, None]).sum(1))
    return np.concatenate(found).astype(np.int64)


def evaluate(
    predict: Predict, records: Sequence[str | Question], context: Context, reference: Predict | None = None
) -> dict[str, float]:
    """recall_at_10, recall_at_1 and mrr (0 to 1) of finding each question's paragraph among all of the file.

    With a `reference` also the mean cosine to its embeddings, which is all that plain texts can tell.
    """
    metrics: dict[str, float] = {}
    questions = [record for record in records if isinstance(record, Question)]
    given = cast("list[str]", texts(records))
    if not questions and reference is None:
        raise InvalidInput("plain texts have no labels; give a SQuAD file, or the dense model to compare with")
    rows = embed(predict, given, context)
    if questions:
        place = {text: index for index, text in enumerate(given)}
        paragraphs = list(dict.fromkeys(question.context for question in questions))
        number = {text: index for index, text in enumerate(paragraphs)}
        rank = ranks(
            rows[[place[question.question] for question in questions]],
            rows[[place[text] for text in paragraphs]],
            np.array([number[question.context] for question in questions]),
        )
        metrics |= {
            "recall_at_10": float((rank <= 10).mean()),
            "recall_at_1": float((rank <= 1).mean()),
            "mrr": float((1 / rank).mean()),
        }
    if reference is not None:
        metrics["cosine"] = float((rows * embed(reference, given, context)).sum(1).mean())
    return metrics


TASK = Task(
    name="embedding",
    model="AutoModel",
    read=read,
    features=features,
    texts=texts,
    evaluate=evaluate,
    metric="recall_at_10",
    distillation=DistillationSettings(attention=0.5, feed_forward=0.5, embedding=1.0),
    trains=False,
)
