"""Mutated JSON files of checkpoints and artifacts, and what must come of each: the answer of the whole file, or one line."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import tilewright
from tests import oracle, tiny, toy
from tests.test_artifact import sign
from tilewright.errors import TilewrightError
from tilewright.frontend import load

MUTATED = ("config.json", "tokenizer.json")
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 16, 2**31, 2**40, 2**70, -(2**63), 0.5, 1e-12, 1e308, -0.0, "", "x", "0", "a\0b", "../x",
    "\ud800",
    [], [[]], [0], ["x"], {}, {"x": 1}, {"0": "x"}, "é" * 300,
]  # fmt: skip
TEXTS = (b"", b"{", b"null", b"[]", b"[" * 50_000, b'{"a":' * 50_000, b"\xff", b"NaN", b"9" * 5000)


def mutated(value: Any, random: Random) -> Any:
    """A copy of the JSON `value` with one to three places changed, removed, doubled or swapped."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, 3)):
        places = list(_places(value))
        holder, key = random.choice(places)
        action = random.randrange(5)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[random.choice(["x", "", "a\0b", str(key) + "_"])] = holder[key]
        elif action == 2:
            other, its = random.choice(places)
            holder[key] = copy.deepcopy(other[its]) if its in other or (isinstance(other, list) and its < len(other)) else None
        else:
            holder[key] = copy.deepcopy(random.choice(VALUES))
        if not value:
            break
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for key, item in items:
        yield value, key
        yield from _places(item)


def write(file: Path, random: Random, signed: bool = False) -> None:
    """Replace the JSON `file` by a mutant of it, now and then by what is no JSON of its kind at all."""
    kind = random.randrange(12)
    if kind == 0:
        file.write_bytes(random.choice(TEXTS))
        return
    if kind == 1:
        data = bytearray(file.read_bytes())
        for _ in range(random.randint(1, 4)):
            data[random.randrange(len(data))] = random.randrange(256)
        file.write_bytes(data)
        return
    value = mutated(json.loads(file.read_text()), random)
    if signed and isinstance(value, dict):
        sign(value)
    file.write_text(json.dumps(value))


def judge_checkpoint(source: Path, name: str, place: Path, random: Random) -> str:
    """Load `source` with its JSON file `name` mutated: what is not refused must compute what the file as it was does.

    Of config.json, labels and what is printed may change; the computation may only with settings that are meant to change it.
    """
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    write(place / name, random)
    try:
        model = load(place)
    except TilewrightError as error:
        assert "\n" not in str(error), str(error)
        return "refused"
    whole = load(source)
    assert model.config.hidden_size == whole.config.hidden_size
    if _arithmetic(model) == _arithmetic(whole):
        ids = tiny.sequences(7)
        for output, expected in oracle.forward_float(whole, ids)[0].items():
            if output in (found := oracle.forward_float(model, ids)[0]):
                np.testing.assert_array_equal(found[output], expected)
    return "answered"


def _arithmetic(model: Any) -> tuple[Any, ...]:
    """The settings that config.json is free to choose."""
    return (model.config.activation, model.config.num_heads, model.embeddings.norm.eps, model.head.kind)


def judge_manifest(source: Path, place: Path, random: Random) -> str:
    """Load and run the toy's artifact at `source` with its manifest mutated and mostly signed again.

    A program that was altered and signed again says what is computed, as the library's code does: its answer is not judged.
    """
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(source, place)
    write(place / "manifest.json", random, signed=random.random() < 0.9)
    ids = [[1, 2, 3]]
    try:
        engine = tilewright.load(place, 1)
        outputs = engine(ids)
    except TilewrightError as error:
        assert "\n" not in str(error), str(error)
        return "refused"
    if _programs(place) != _programs(source):
        return "answered otherwise"
    expected = list(toy.expected(ids[0]).values())
    for output, values in zip(engine.manifest.outputs, expected, strict=False):
        found = outputs[output.name][0]
        if found.shape == values.shape:
            np.testing.assert_array_equal(found, values)
    return "answered"


def _programs(artifact: Path) -> list[Any]:
    return [level["program"] for level in json.loads((artifact / "manifest.json").read_text())["levels"]]
