"""A whole model whose linears decide otherwise for few tokens computes what it computes without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilewright
from tests import tiny
from tests.kernel_harness import level
from tests.test_extending import checkpoint
from tilewright import compiler
from tilewright.codegen.decisions import TokenBucket
from tilewright.codegen.plan import LinearPlan, Plan
from tilewright.schedules.choice import plan

FEW, MORE = 1, 3
"""Token groups of two buckets."""


def in_buckets(made: LinearPlan) -> LinearPlan:
    few, more = (replace(made.decisions, prefetch=prefetch) for prefetch in (0, 4096))
    return replace(made, buckets=(TokenBucket(FEW, replace(few, chunks=1)), TokenBucket(MORE, more)))


def bucketed(*arguments: Any, **named: Any) -> Plan:
    made = plan(*arguments, **named)
    slots = ("qkv", "output", "up", "down")
    layers = tuple(replace(layer, **{slot: in_buckets(getattr(layer, slot)) for slot in slots}) for layer in made.layers)
    return replace(made, layers=layers)


@pytest.mark.parametrize("isa", [level("avx2"), level("avx512vnni")])
def test_a_model_in_buckets_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    source = checkpoint(tmp_path, (4, 1))
    default = tilewright.compile(source, isa, tmp_path / "default.tw", sparse="always")
    monkeypatch.setattr(compiler, "plan", bucketed)
    made = tilewright.compile(source, isa, tmp_path / "buckets.tw", sparse="always")
    layer = made.manifest.levels[0].layers[0]
    assert layer.schedule.startswith("up to 16 tokens: family=gather") and "up to 48 tokens: " in layer.schedule
    parameters = [artifact.manifest.levels[0].parameters for artifact in (default, made)]
    assert parameters[0] == parameters[1]  # no weight is held twice
    engines = [tilewright.load(artifact.path, num_threads=1) for artifact in (default, made)]
    for lengths in ([5], [16], [17], [30, 18], [30, 19], [30, 30, 30]):
        ids = np.zeros((len(lengths), max(lengths)), np.int64)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(tiny.sequences(*lengths)):
            ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        expected, found = (engine(ids, mask) for engine in engines)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)
