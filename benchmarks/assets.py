"""Pinned real models and texts for the quickstart, tests and benchmarks; `tilewright.assets` fetches them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from tilewright.assets import fetch


@dataclass(frozen=True)
class SquadQuestion:
    """A question, the sentences of its context, and the index of the sentence in which the answer starts."""

    question: str
    sentences: tuple[str, ...]
    answer: int


def distilbert_qdq() -> Path:
    """Path of the INT8 QDQ DistilBERT `tagger.onnx`; `tokenizer.json` lies beside it."""
    return fetch("distilbert_qdq") / "tagger.onnx"


def minilm() -> Path:
    """Hugging Face directory of all-MiniLM-L6-v2, float32."""
    return fetch("minilm")


def squad_dev() -> Path:
    """Path of the SQuAD v1.1 development set."""
    return fetch("squad") / "dev-v1.1.json"


def squad_train() -> Path:
    """Path of the SQuAD v1.1 training set."""
    return fetch("squad") / "train-v1.1.json"


def squad_sentences(count: int) -> list[str]:
    """Pick `count` sentences of 5 to 60 words, evenly spread over the contexts of the development set."""
    sentences = [
        context[start:end]
        for context, _ in _paragraphs(squad_dev())
        for start, end in _sentence_spans(context)
        if 5 <= len(context[start:end].split()) <= 60
    ]
    return [sentences[i * len(sentences) // count] for i in range(count)]


def squad_contexts(count: int) -> list[str]:
    """Pick `count` paragraphs, evenly spread over the training set: texts for calibration that no evaluation sees."""
    contexts = [context for context, _ in _paragraphs(squad_train())]
    return [contexts[i * len(contexts) // count] for i in range(count)]


def squad_questions(count: int) -> list[SquadQuestion]:
    """Pick `count` questions whose context has several sentences, evenly spread over the development set."""
    questions = []
    for context, entries in _paragraphs(squad_dev()):
        spans = _sentence_spans(context)
        sentences = tuple(context[start:end] for start, end in spans)
        for question, position in entries if len(spans) > 1 else ():
            answer = max(i for i, (start, _) in enumerate(spans) if start <= position)
            questions.append(SquadQuestion(question, sentences, answer))
    return [questions[i * len(questions) // count] for i in range(count)]


@cache
def _paragraphs(path: Path) -> tuple[tuple[str, list[tuple[str, int]]], ...]:
    """Each context of a SQuAD file with its (question, position of the first answer) pairs."""
    return tuple(
        (paragraph["context"], [(qa["question"].strip(), qa["answers"][0]["answer_start"]) for qa in paragraph["qas"]])
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]
        for paragraph in article["paragraphs"]
    )


def _sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) of each sentence; one ends at . ! ? (with closing quotes) before a capital, a digit or a quote."""
    bounds = [0, *(m.end() for m in re.finditer(r"[.!?][\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])", text)), len(text)]
    return [(start, start + len(text[start:end].rstrip())) for start, end in pairwise(bounds) if start < end]
