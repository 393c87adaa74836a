"""Extractive question answering: an answer is a span of the context, which is read in windows; exact match and F1.

The metric is torchmetrics' SQuAD, which equals the official script: answers in lower case, without punctuation and articles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding
from torchmetrics.functional.text import squad

from tilewright.errors import InvalidInput
from tilewright.pipeline.distillation import DistillationSettings
from tilewright.pipeline.tasks.base import Context, Feature, Outputs, Predict, Task, feature
from tilewright.pipeline.tasks.squad import Question, read_squad

N_BEST = 20
"""Starts and ends of which all pairs are candidates, in each window."""

MAX_ANSWER = 30
"""Tokens of the longest answer; N_BEST and MAX_ANSWER are those of the BERT paper's script."""


def windows(question: Question, context: Context) -> Iterator[Encoding]:
    """Encodings of the question with each window of its context, which share `stride` tokens."""
    settings, tokenizer = context.settings, context.tokenizer
    asked, told = (tokenizer.encode(text, add_special_tokens=False) for text in (question.question, question.context))
    room = settings.max_length - len(asked.ids) - tokenizer.num_special_tokens_to_add(is_pair=True)
    if room <= settings.stride:
        raise InvalidInput(
            f"max_length {settings.max_length} leaves {room} tokens to the context of question {question.id}, of which stride "
            f"{settings.stride} are shared; raise max_length, or lower stride"
        )
    # the tokenizer could cut the pair, but without a post-processor it would not say what in a window is question or context
    told.truncate(room, stride=settings.stride)
    for part in (told, *told.overflowing):
        yield tokenizer.post_process(asked, part)


def answer_span(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """First and last token of the characters `start` to `end` of the context; (0, 0) where the window holds not all of them."""
    tokens = [
        index
        for index, (segment, (low, high)) in enumerate(zip(encoding.sequence_ids, encoding.offsets, strict=True))
        if segment == 1 and low < end and high > start
    ]
    if not tokens or encoding.offsets[tokens[0]][0] > start or encoding.offsets[tokens[-1]][1] < end:
        return 0, 0
    return tokens[0], tokens[-1]


def features(records: Sequence[Question], context: Context) -> list[Feature]:
    """A feature for every window, labelled with the first answer of its question; (0, 0) where it lies in another window."""
    rows = []
    for question in records:
        answer = question.answers[0]
        for encoding in windows(question, context):
            start, end = answer_span(encoding, answer.start, answer.start + len(answer.text))
            rows.append(feature(encoding) | {"start_positions": start, "end_positions": end})
    return rows


def best_answer(candidates: Sequence[tuple[Encoding, Outputs]], text: str) -> str:
    """The span of the context `text` with the largest sum of start and end logits f32[tokens], over all its windows."""
    best, span = -np.inf, (0, 0)
    for encoding, outputs in candidates:
        inside = np.array([segment == 1 for segment in encoding.sequence_ids])
        start, end = (np.where(inside, outputs[name], -np.inf) for name in ("start_logits", "end_logits"))
        starts, ends = (np.argsort(-logits, kind="stable")[:N_BEST] for logits in (start, end))
        length = ends[None, :] - starts[:, None] + 1
        score = np.where((length > 0) & (length <= MAX_ANSWER), start[starts][:, None] + end[ends][None, :], -np.inf)
        row, column = np.unravel_index(int(score.argmax()), score.shape)
        if score[row, column] > best:
            best = float(score[row, column])
            span = encoding.offsets[starts[row]][0], encoding.offsets[ends[column]][1]
    return text[span[0] : span[1]]


def answers(predict: Predict, records: Sequence[Question], context: Context) -> list[str]:
    """A model's answer to every question."""
    found = [(index, encoding) for index, question in enumerate(records) for encoding in windows(question, context)]
    outputs = predict([feature(encoding) for _, encoding in found])
    candidates: list[list[tuple[Encoding, Outputs]]] = [[] for _ in records]
    for (index, encoding), output in zip(found, outputs, strict=True):
        candidates[index].append((encoding, output))
    return [best_answer(some, question.context) for some, question in zip(candidates, records, strict=True)]


def metric(given: Sequence[str], records: Sequence[Question]) -> dict[str, float]:
    """F1 and exact match, 0 to 100, of the answers `given`, each against the best of its question's."""
    predictions: Any = [{"id": str(i), "prediction_text": text} for i, text in enumerate(given)]
    targets: Any = [
        {"id": str(i), "answers": {"text": [a.text for a in q.answers], "answer_start": [a.start for a in q.answers]}}
        for i, q in enumerate(records)
    ]
    scores = squad(predictions, targets)
    return {"f1": float(scores["f1"]), "exact_match": float(scores["exact_match"])}


def evaluate(
    predict: Predict, records: Sequence[Question], context: Context, reference: Predict | None = None
) -> dict[str, float]:
    """F1 and exact match of the model's answers."""
    return metric(answers(predict, records, context), records)


def texts(records: Sequence[Question]) -> list[str | tuple[str, str]]:
    """Questions with their contexts."""
    return [(question.question, question.context) for question in records]


TASK = Task(
    name="question_answering",
    model="AutoModelForQuestionAnswering",
    read=read_squad,
    features=features,
    texts=texts,
    evaluate=evaluate,
    metric="f1",
    distillation=DistillationSettings(attention=0.5, feed_forward=0.5, logits=1.0),
    compares=False,
)
