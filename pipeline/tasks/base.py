"""What every task states, and what all tasks share: text files, tokenising, and batches padded to their longest row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt, TypeAdapter, ValidationError
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from tilewright.errors import InvalidInput
from tilewright.files import parse_json, read_text
from tilewright.pipeline.distillation import DistillationSettings

Record = Any
"""One row of a task's data, a frozen dataclass of its own."""

Feature = dict[str, Any]
"""What a model takes for one sequence: input_ids and token_type_ids, lists of its length, and labels where there are any."""

Outputs = Mapping[str, NDArray[np.float32]]
"""A model's outputs for one sequence by name: f32[tokens] or f32[tokens, classes] per token, f32[classes] per sequence."""

Predict = Callable[[Sequence[Feature]], Sequence[Outputs]]
"""Runs a model, however it runs, on sequences; returns their outputs in the same order."""

IGNORED = -100
"""The label of what takes no part in a loss, as in PyTorch's cross entropy."""

T = TypeVar("T")


class TextSettings(BaseModel):
    """How texts become sequences of at most `max_length` tokens.

    The context of a question that is too long for that is read in windows that share `stride` tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_length: PositiveInt = 128
    stride: PositiveInt = 64


@dataclass(frozen=True)
class Context:
    """What turning records into features needs: the model's tokenizer, its labels, and the settings."""

    tokenizer: Tokenizer
    settings: TextSettings
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One row of the table of tasks.

    model: transformers' class of models for it, which returns the task's loss where it is given labels. read: records of a
    file. features: of records, with labels where the records have them. texts: of records, to calibrate on. evaluate: metrics
    of a model's answers to records; `reference` answers as well, where labels are missing. metric: the most important one.
    distillation: the losses of `distil` where a recipe does not say. trains: whether labels give a loss at all. compares:
    whether `evaluate` makes anything of a reference.
    """

    name: str
    model: str
    read: Callable[[Path], list[Record]]
    features: Callable[[Sequence[Record], Context], list[Feature]]
    texts: Callable[[Sequence[Record]], list[str | tuple[str, str]]]
    evaluate: Callable[[Predict, Sequence[Record], Context, Predict | None], dict[str, float]]
    metric: str
    distillation: DistillationSettings
    trains: bool = True
    compares: bool = True


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer.json of a checkpoint or an artifact; raises InvalidInput."""
    file = directory / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(read_text(file))
    except OSError as error:
        raise InvalidInput(f"{file} cannot be read ({error.strerror}); the tokenizer must lie beside the model") from None
    except Exception as error:  # tokenizers raises no class of its own
        raise InvalidInput(f"{file} is no tokenizer: {error}; copy the model's own") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenize(texts: Sequence[Any], context: Context, **options: Any) -> list[Encoding]:
    """Encodings of texts, or of pairs of texts, cut to the settings' length."""
    context.tokenizer.enable_truncation(context.settings.max_length)
    return list(context.tokenizer.encode_batch(list(texts), **options))


def feature(encoding: Encoding) -> Feature:
    """Ids and token types of one sequence."""
    return {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}


def check_tokenizer(features: Sequence[Feature], vocab_size: int) -> None:
    """Raises InvalidInput where the tokenizer yields ids that the model's embedding has no row for."""
    largest = max((max(row["input_ids"], default=0) for row in features), default=0)
    if largest >= vocab_size:
        raise InvalidInput(f"tokenizer.json yields id {largest}, the model has {vocab_size}; use the model's own tokenizer")


def pad(features: Sequence[Feature]) -> dict[str, Tensor]:
    """Batch s64 of `features`: lists are padded at their right to the longest, single values stacked; with attention_mask."""
    length = max(len(row["input_ids"]) for row in features)
    batch: dict[str, Tensor] = {
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in features]
        )
    }
    for name, first in features[0].items():
        values = [row[name] for row in features]
        if isinstance(first, list) and name in ("input_ids", "token_type_ids", "labels"):
            filler = IGNORED if name == "labels" else 0
            values = [value + [filler] * (length - len(value)) for value in values]
        batch[name] = torch.tensor(values)
    return batch


def read_rows(path: Path, schema: TypeAdapter[T]) -> list[T]:
    """Rows of a file with one JSON object a line (`.jsonl`); raises InvalidInput that names the line."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            rows.append(schema.validate_python(parse_json(line)))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise InvalidInput(f"{path}, line {number}: {place or 'the row'}: {first['msg']}") from None
        except ValueError as error:
            raise InvalidInput(f"{path}, line {number} is no JSON: {error}; give one JSON object a line") from None
    return some(rows, path)


def read_texts(path: Path) -> list[str]:
    """Lines of a plain text file that are not blank."""
    return some([line.strip() for line in read_lines(path) if line.strip()], path)


def some(rows: list[T], path: Path) -> list[T]:
    """`rows`, if there are any; raises InvalidInput."""
    if not rows:
        raise InvalidInput(f"{path} holds no rows; give a file with some")
    return rows


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file; raises InvalidInput."""
    yield from read_data(path).splitlines()


def read_data(path: Path) -> str:
    """The text of a data file; raises InvalidInput."""
    try:
        return read_text(path)
    except OSError as error:
        raise InvalidInput(f"data {path} cannot be read: {error.strerror}; give a file that exists") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"data {path} is not UTF-8 text; convert it") from None


def read_json_data(path: Path, schema: TypeAdapter[T]) -> T:
    """The value of a JSON file as `schema` says; raises InvalidInput that names the first field that is wrong."""
    text = read_data(path)
    try:
        return schema.validate_python(parse_json(text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidInput(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, json.JSONDecodeError) as error:
        raise InvalidInput(f"{path} is no JSON: {error}") from None
