"""The last word: the whole encoder, tuned against default, in turns."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

import tilewright
from tilewright.codegen.model import EncoderModel
from tilewright.errors import TilewrightError
from tilewright.measure import random_ids
from tilewright.tuning.statistics import Gain, gain

ROUNDS = 21
TURN = 0.05
"""Seconds of one engine's turn, at least one call."""

ALIKE = 0.25
"""How far outputs may lie apart, in standard deviations of the default's.

Kernels sum integers exactly; LayerNorms sum floats in an order that follows layouts, which may turn a rounding tie.
"""


def compare(
    model: EncoderModel, target: str, log: Path, tokens: Sequence[int], threads: int, rounds: int = ROUNDS
) -> Mapping[int, Gain]:
    """How many times faster the encoder is when compiled by `log`, for one call of so many tokens each.

    Raises TilewrightError if it gives other results.
    """
    with tempfile.TemporaryDirectory(prefix="tilewright-compare-") as scratch:
        empty = Path(scratch, "empty.jsonl")
        empty.write_text("")

        def engine(name: str, records: Path) -> tilewright.Engine:
            path = Path(scratch, f"{name}.tw")
            tilewright.compile(model, target, path, tuning_records=records, tuned_threads=threads)
            return tilewright.load(path, num_threads=threads)

        default, tuned = engine("default", empty), engine("tuned", log)
        with _pinned(threads):
            return {count: _in_turns(default, tuned, count, rounds) for count in tokens}


def _in_turns(default: tilewright.Engine, tuned: tilewright.Engine, tokens: int, rounds: int) -> Gain:
    limits = default.manifest.limits
    length = min(tokens, limits.max_positions)
    ids = random_ids(limits.vocab_size, -(-tokens // length), length)
    expected = default(ids)
    for name, found in tuned(ids).items():
        if float(np.abs(found - expected[name]).max()) > ALIKE * max(float(expected[name].std()), 1e-6):
            raise TilewrightError(f"the tuned encoder gives another {name} than the default; please report this log")
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for engine, samples in zip((default, tuned), seconds, strict=True):
            samples.append(_turn(partial(engine, ids)))
    return gain(*seconds)


def _turn(call: Callable[[], object]) -> float:
    """Seconds of a call, the mean over a turn."""
    calls, started = 0, time.perf_counter()
    while (took := time.perf_counter() - started) < TURN:
        call()
        calls += 1
    return took / calls


@contextmanager
def _pinned(threads: int) -> Iterator[None]:
    """Run on the last cores only, as kernels were measured."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-threads:])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
