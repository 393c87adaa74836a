"""Classes of whole texts; accuracy. Rows have a label, or are plain texts, which the dense model labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from pydantic import BaseModel, ConfigDict, TypeAdapter

from tilewright.errors import InvalidInput
from tilewright.pipeline.distillation import DistillationSettings
from tilewright.pipeline.tasks.base import Context, Feature, Predict, Task, feature, read_rows, read_texts, tokenize


class Row(BaseModel):
    """A text, or two, and its label: the name of a class, or its number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    text_pair: str | None = None
    label: str | int | None = None


_SCHEMA = TypeAdapter(Row)


def read(path: Path) -> list[Row]:
    """Rows of a `.jsonl` file with the keys text, text_pair and label, or of a plain text file."""
    return read_rows(path, _SCHEMA) if path.suffix == ".jsonl" else [Row(text=text) for text in read_texts(path)]


def label_number(label: str | int, labels: Sequence[str]) -> int:
    """Number of a class; raises InvalidInput where the model does not have it."""
    if isinstance(label, str) and label in labels:
        return labels.index(label)
    if isinstance(label, int) and 0 <= label < len(labels):
        return label
    raise InvalidInput(f"label {label!r} is not one of the model's: {', '.join(labels)}")


def texts(records: Sequence[Row]) -> list[str | tuple[str, str]]:
    """Texts, and pairs of texts."""
    return [row.text if row.text_pair is None else (row.text, row.text_pair) for row in records]


def features(records: Sequence[Row], context: Context) -> list[Feature]:
    """A feature for every row, labelled if all rows are."""
    rows = [feature(encoding) for encoding in tokenize(texts(records), context)]
    if any(record.label is None for record in records):
        return rows
    return [
        row | {"labels": label_number(cast("str | int", record.label), context.labels)}
        for row, record in zip(rows, records, strict=True)
    ]


def evaluate(predict: Predict, records: Sequence[Row], context: Context, reference: Predict | None = None) -> dict[str, float]:
    """accuracy (0 to 1) against labels, and agreement with a `reference`; one of the two is needed."""
    rows = features(records, context)
    found = _classes(predict, rows)
    metrics = {}
    if all("labels" in row for row in rows):
        metrics["accuracy"] = float((found == [row["labels"] for row in rows]).mean())
    elif reference is None:
        raise InvalidInput("the texts have no labels; give rows with labels, or the dense model to compare with")
    if reference is not None:
        metrics["agreement"] = float((found == _classes(reference, rows)).mean())
    return metrics


def _classes(predict: Predict, rows: Sequence[Feature]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([int(output["logits"].argmax()) for output in predict(rows)])


TASK = Task(
    name="sequence_classification",
    model="AutoModelForSequenceClassification",
    read=read,
    features=features,
    texts=texts,
    evaluate=evaluate,
    metric="accuracy",
    distillation=DistillationSettings(attention=0.5, feed_forward=0.5, logits=1.0),
)
