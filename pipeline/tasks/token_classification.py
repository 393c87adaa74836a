"""A class for every word; agreement and F1. Rows have words and tags, or are plain texts, which the dense model tags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, model_validator

from tilewright.errors import InvalidInput
from tilewright.pipeline.distillation import DistillationSettings
from tilewright.pipeline.tasks.base import IGNORED, Context, Feature, Predict, Task, feature, read_rows, read_texts, tokenize
from tilewright.pipeline.tasks.sequence_classification import label_number


class Row(BaseModel):
    """Words and a tag for each: names of the model's classes, or their numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[str, ...]
    tags: tuple[str | int, ...]

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if len(self.tokens) != len(self.tags):
            raise ValueError(f"{len(self.tokens)} tokens have {len(self.tags)} tags; give one for each")
        return self


_SCHEMA = TypeAdapter(Row)


def read(path: Path) -> list[Row | str]:
    """Rows of a `.jsonl` file with the keys tokens and tags, or texts of a plain text file."""
    if path.suffix == ".jsonl":
        return [*read_rows(path, _SCHEMA)]
    return [*read_texts(path)]


def texts(records: Sequence[Row | str]) -> list[str | tuple[str, str]]:
    """Texts; words are joined by blanks."""
    return [" ".join(record.tokens) if isinstance(record, Row) else record for record in records]


def features(records: Sequence[Row | str], context: Context) -> list[Feature]:
    """A feature for every row; its tags are the labels of the first tokens of the words."""
    rows = []
    for record in records:
        words = isinstance(record, Row)
        (encoding,) = tokenize([list(record.tokens) if isinstance(record, Row) else record], context, is_pretokenized=words)
        row = feature(encoding)
        if isinstance(record, Row):
            labels, before = [IGNORED] * len(encoding.ids), None
            for index, word in enumerate(encoding.word_ids):
                if word is not None and word != before:
                    labels[index] = label_number(record.tags[word], context.labels)
                before = word
            row["labels"] = labels
        rows.append(row)
    return rows


def evaluate(
    predict: Predict, records: Sequence[Row | str], context: Context, reference: Predict | None = None
) -> dict[str, float]:
    """agreement and f1 (0 to 1) with the given tags, or where texts have none, with the tags of a `reference` for all tokens.

    F1 is that of all classes but the most frequent one, which for tags is the one outside of everything.
    """
    rows = features(records, context)
    found = _classes(predict, rows)
    labelled = all("labels" in row for row in rows)
    if not labelled and reference is None:
        raise InvalidInput("the texts have no tags; give rows with tags, or the dense model to compare with")
    expected = [np.array(row["labels"]) for row in rows] if labelled else _classes(reference, rows) if reference else []
    return scores(np.concatenate(found), np.concatenate(expected))


def scores(found: NDArray[np.int64], expected: NDArray[np.int64]) -> dict[str, float]:
    """Agreement and F1 of classes s64[tokens], where `expected` is not IGNORED."""
    taken = expected != IGNORED
    found, expected = found[taken], expected[taken]
    outside = Counter(expected.tolist()).most_common(1)[0][0]
    hits = int(((found == expected) & (expected != outside)).sum())
    marked = int((found != outside).sum()) + int((expected != outside).sum())
    return {"agreement": float((found == expected).mean()), "f1": 2 * hits / marked if marked else 1.0}


def _classes(predict: Predict, rows: Sequence[Feature]) -> list[NDArray[np.int64]]:
    return [output["logits"].argmax(-1).astype(np.int64) for output in predict(rows)]


TASK = Task(
    name="token_classification",
    model="AutoModelForTokenClassification",
    read=read,
    features=features,
    texts=texts,
    evaluate=evaluate,
    metric="agreement",
    distillation=DistillationSettings(attention=0.5, feed_forward=0.5, logits=1.0),
)
