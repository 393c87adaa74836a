"""Ranges of activations over calibration texts, and the quantisation that covers them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from tilewright.codegen.model import EncoderModel, Quantization
from tilewright.errors import InvalidInput
from tilewright.pipeline.encoder import Batch, run

Method = Literal["minmax", "percentile"]
Range = tuple[float, float]
Text = str | tuple[str, str]
"""A text, or a pair of texts, which is one sequence."""
Progress = Callable[[int, int], None]
"""Called with the number of batches done and their total."""

_BINS = 4096
_BATCH = 16


def calibrate(
    model: EncoderModel, texts: Sequence[Text], method: Method, percentile: float, max_length: int, progress: Progress
) -> Mapping[str, Range]:
    """Range of every value that will be quantised, over `texts` cut to `max_length` tokens.

    minmax: the smallest and largest value. percentile: the values that (100 - percentile) % of all lie below, and
    above; found from a histogram of 4096 bins, in a second pass.
    """
    batches = list(_batches(model, texts, max_length))
    passes = 2 if method == "percentile" else 1
    limits: dict[str, Range] = {}

    def widen(name: str, values: Tensor) -> None:
        low, high = torch.aminmax(values)
        before = limits.get(name, (float(low), float(high)))
        limits[name] = (min(before[0], float(low)), max(before[1], float(high)))

    for done, batch in enumerate(batches):
        run(model, batch, widen)
        progress(done + 1, passes * len(batches))
    if method == "minmax":
        return limits

    counts = {name: torch.zeros(_BINS, dtype=torch.float64) for name in limits}

    def count(name: str, values: Tensor) -> None:
        low, high = limits[name]
        counts[name] += torch.histc(values, _BINS, low, high).double()

    for done, batch in enumerate(batches):
        run(model, batch, count)
        progress(len(batches) + done + 1, passes * len(batches))
    return {name: _percentile(counts[name], limits[name], percentile) for name in limits}


def asymmetric(limits: Range) -> Quantization:
    """Return the u8 quantisation that covers `limits` and represents 0 exactly."""
    low, high = min(limits[0], 0.0), max(limits[1], 0.0)
    scale = _float32((high - low) / 255 or 1.0)
    return Quantization(scale, min(255, max(0, round(-low / scale))))


def symmetric(limits: Range) -> float:
    """Return the scale of the s8 quantisation with zero point 0 that covers `limits`."""
    return _float32(max(abs(limits[0]), abs(limits[1])) / 127 or 1.0)


def _float32(scale: float) -> float:
    """Round to what the checkpoint will hold."""
    return float(np.float32(scale))


def _percentile(counts: Tensor, limits: Range, percentile: float) -> Range:
    low, high = limits
    width = (high - low) / _BINS
    below = counts.cumsum(0) / counts.sum()
    tail = 1 - percentile / 100
    first = int((below <= tail).sum())
    last = int((below < 1 - tail).sum())
    return low + first * width, low + (last + 1) * width


def _batches(model: EncoderModel, texts: Sequence[Text], max_length: int) -> Iterator[Batch]:
    """Batches of texts of similar length, so that little is padded."""
    if model.tokenizer is None:
        raise InvalidInput("the model has no tokenizer.json, which calibration on text needs; add it to the model")
    tokenizer = Tokenizer.from_str(model.tokenizer)
    tokenizer.enable_truncation(min(max_length, model.config.max_positions))
    tokenizer.no_padding()
    encodings = sorted(tokenizer.encode_batch(list(texts)), key=lambda encoding: len(encoding.ids))
    largest = max((max(encoding.ids, default=0) for encoding in encodings), default=0)
    if largest >= model.config.vocab_size:
        raise InvalidInput(
            f"tokenizer.json yields id {largest}, the model has {model.config.vocab_size}; use its own tokenizer"
        )
    for start in range(0, len(encodings), _BATCH):
        part = encodings[start : start + _BATCH]
        length = len(part[-1].ids)
        columns = [[row + [0] * (length - len(row)) for row in rows] for rows in zip(*map(_rows, part), strict=True)]
        ids, types, mask = (torch.tensor(column, dtype=torch.int64) for column in columns)
        yield Batch(ids, types, mask.bool())


def _rows(encoding: Encoding) -> tuple[list[int], list[int], list[int]]:
    """Ids, token types and mask."""
    ids, types = encoding.ids, encoding.type_ids
    return ids, types, [1] * len(ids)
