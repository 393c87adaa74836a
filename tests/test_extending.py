"""The documented example of adding a block shape, run as it stands in the document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tilewright
from tests import oracle, tiny
from tilewright import frontend
from tilewright.codegen.block_sparse import BLOCKS
from tilewright.codegen.decisions import Storage
from tilewright.codegen.model import EncoderModel, Linear
from tilewright.errors import ScheduleMismatch
from tilewright.pipeline.checkpoint import write_checkpoint
from tilewright.pipeline.quantize import quantize
from tilewright.schedules.blocks import register_block

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture
def untouched_tables() -> Iterator[None]:
    blocks = dict(BLOCKS)
    yield
    BLOCKS.clear()
    BLOCKS.update(blocks)


def pruned(model: EncoderModel, block: tuple[int, int]) -> EncoderModel:
    """Zero three of four blocks of every encoder Linear."""
    random = np.random.default_rng(0)

    def prune(linear: Linear) -> Linear:
        rows, columns = (size // unit for size, unit in zip(linear.weight.shape, block, strict=True))
        keep = random.permutation(rows * columns).reshape(rows, columns) % 4 == 0
        return replace(linear, weight=(linear.weight * np.kron(keep, np.ones(block))).astype(np.int8))

    layers = []
    for layer in model.layers:
        names = ("query", "key", "value", "output")
        attention = replace(layer.attention, **{name: prune(getattr(layer.attention, name)) for name in names})
        layers.append(replace(layer, attention=attention, up=prune(layer.up), down=prune(layer.down)))
    return replace(model, layers=tuple(layers))


@pytest.mark.usefixtures("untouched_tables")
def test_the_documented_example(tmp_path: Path) -> None:
    source = tiny.save(tiny.build("DistilBertForQuestionAnswering"), tmp_path / "float")
    model = pruned(frontend.load(quantize(source, tiny.texts(8), tmp_path / "int8")), (2, 8))
    checkpoint, output = tmp_path / "pruned", tmp_path / "model.tw"
    checkpoint.mkdir()
    write_checkpoint(model, checkpoint)
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    exec(code, {"checkpoint": checkpoint, "output": output})

    sequences = tiny.sequences(5, 17, 30)
    engine = tilewright.load(output, num_threads=1)
    for ids, expected in zip(sequences, oracle.forward(frontend.load(checkpoint), sequences), strict=True):
        np.testing.assert_allclose(engine(input_ids=ids[None])["start_logits"][0], expected["start_logits"], atol=1e-3)


@pytest.mark.usefixtures("untouched_tables")
def test_a_shape_some_level_cannot_run_is_refused() -> None:
    with pytest.raises(ScheduleMismatch, match=r"block \(2, 2\) has no kernel on avxvnni"):
        register_block((2, 2), Storage("column", (2, 2)))
    with pytest.raises(ScheduleMismatch, match=r"block \(2, 8\) cannot be stored as \(4, 8\)"):
        register_block((2, 8), Storage("column", (4, 8)))
    assert (2, 2) not in BLOCKS
