"""The official SQuAD v1.1 file: articles of paragraphs, each a context with questions and their answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from tilewright.errors import InvalidInput
from tilewright.pipeline.tasks.base import read_json_data, some


@dataclass(frozen=True)
class Answer:
    """An answer and the position in the context, in characters, at which it starts."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question on a context, and the answers that people gave; `paragraph` is the number of the context in the file."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    paragraph: int


class _Answer(BaseModel):
    text: str
    answer_start: int


class _Entry(BaseModel):
    id: str
    question: str
    answers: list[_Answer] = []


class _Paragraph(BaseModel):
    context: str
    qas: list[_Entry]


class _Article(BaseModel):
    paragraphs: list[_Paragraph]


class _File(BaseModel):
    data: list[_Article]


_SCHEMA = TypeAdapter(_File)


def read_squad(path: Path) -> list[Question]:
    """Questions of a SQuAD file in its order.

    Raises InvalidInput for another format, for a question without answers, and for an answer that is not in its context.
    """
    questions = []
    paragraphs = [paragraph for article in read_json_data(path, _SCHEMA).data for paragraph in article.paragraphs]
    for number, paragraph in enumerate(paragraphs):
        for entry in paragraph.qas:
            if not entry.answers:
                raise InvalidInput(f"{path}: question {entry.id} has no answers; remove it (SQuAD v1.1 answers every question)")
            for answer in entry.answers:
                found = paragraph.context[answer.answer_start : answer.answer_start + len(answer.text)]
                if answer.answer_start < 0 or found != answer.text:
                    raise InvalidInput(
                        f"{path}: question {entry.id}: the answer {answer.text[:40]!r} is not at {answer.answer_start} of its "
                        f"context, {found[:40]!r} is; correct answer_start, which counts characters"
                    )
            answers = tuple(Answer(answer.text, answer.answer_start) for answer in entry.answers)
            questions.append(Question(entry.id, entry.question.strip(), paragraph.context, answers, number))
    return some(questions, path)
