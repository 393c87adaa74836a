"""The documented examples of adding to the code generator, run as they stand in the document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tilewright
from tests import oracle, tiny
from tests.kernel_harness import LinearKernel, from_groups, group_shape, product, runs_here
from tilewright import frontend
from tilewright.codegen.block_sparse import BLOCKS
from tilewright.codegen.decisions import FAMILY_LANES, FAMILY_LAYOUT, Storage
from tilewright.codegen.epilogues import Raw
from tilewright.codegen.kernels.linear import PRODUCTS, WEIGHTS
from tilewright.codegen.model import EncoderModel, Linear
from tilewright.codegen.packing import PACKERS
from tilewright.codegen.workload import KernelSpec, Workload
from tilewright.errors import ScheduleMismatch
from tilewright.pipeline.checkpoint import write_checkpoint
from tilewright.pipeline.quantize import quantize
from tilewright.schedules.blocks import LEGAL, register_block
from tilewright.schedules.families import FamilyEntry, register_family
from tilewright.schedules.intrinsics import INTRINSICS
from tilewright.schedules.linear import FAMILY_RULES
from tilewright.schedules.space import LINEAR, candidates

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"
TABLES = (
    BLOCKS,
    FAMILY_LAYOUT,
    FAMILY_LANES,
    WEIGHTS,
    PRODUCTS,
    PACKERS,
    FAMILY_RULES,
    LEGAL,
    INTRINSICS,
    LINEAR,
    LINEAR["row"],
)


def code(section: str) -> str:
    """The program of a section of the document."""
    (found,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    return "".join(re.findall(r"```python\n(.*?)```", found, re.DOTALL))


@pytest.fixture
def untouched_tables() -> Iterator[None]:
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


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


def checkpoint(directory: Path, block: tuple[int, int]) -> Path:
    """A quantised model whose linears are pruned to `block`."""
    source = tiny.save(tiny.build("DistilBertForQuestionAnswering"), directory / "float")
    model = pruned(frontend.load(quantize(source, tiny.texts(8), directory / "int8")), block)
    (directory / "pruned").mkdir()
    write_checkpoint(model, directory / "pruned")
    return directory / "pruned"


def check_sums(spec: KernelSpec) -> None:
    """A kernel of 96 outputs and 64 inputs, without an epilogue, has the sums of NumPy."""
    if not runs_here(spec.isa):
        return
    kernel, random, lanes = LinearKernel(spec, Raw()), np.random.default_rng(0), spec.linear.storage.lanes
    mask = np.kron(random.random((24, 16)) < 0.5, np.ones((4, 4), int))
    weight = (random.integers(-127, 128, (96, 64)) * mask).astype(np.int8)
    x, zeros = random.integers(0, 256, (48, 64)), np.zeros(96, np.float32)
    inputs = kernel.arrays(x, weight, fold=np.zeros(96, np.int32), scale=zeros, bias=zeros)
    found = kernel(inputs, {"sums": group_shape(48, 96, lanes)})["sums"]
    np.testing.assert_array_equal(from_groups(found, lanes), product(x, weight))


@pytest.mark.usefixtures("untouched_tables")
@pytest.mark.parametrize(("section", "block"), [("A block shape", (2, 8)), ("A family of kernels", (2, 1))])
def test_models_of_a_documented_addition_compute_what_they_should(tmp_path: Path, section: str, block: tuple[int, int]) -> None:
    source, output = checkpoint(tmp_path, block), tmp_path / "model.tw"
    exec(code(section), {"checkpoint": source, "output": output})
    if not runs_here("avx2"):
        return
    sequences = tiny.sequences(5, 17, 30)
    engine = tilewright.load(output, num_threads=1)
    for ids, expected in zip(sequences, oracle.forward(frontend.load(source), sequences), strict=True):
        np.testing.assert_allclose(engine(input_ids=ids[None])["start_logits"][0], expected["start_logits"], atol=1e-3)


@pytest.mark.usefixtures("untouched_tables")
def test_the_documented_operands_give_exact_sums() -> None:
    names: dict[str, Any] = {}
    exec(code("A way to store operands"), names)
    check_sums(names["spec"])


@pytest.mark.usefixtures("untouched_tables")
def test_the_documented_decisions_are_compiled(tmp_path: Path) -> None:
    names: dict[str, Any] = {"checkpoint": checkpoint(tmp_path, (4, 1)), "output": tmp_path / "model.so"}
    exec(code("Other decisions"), names)
    assert (tmp_path / "model.so").read_bytes()[:4] == b"\x7fELF"
    chunks = {report.name: report.spec.linear.chunks for report in names["lowered"].kernels}
    assert chunks["layer0.up"] == 1 < chunks["layer0.qkv"]
    check_sums(names["spec"])
    default = replace(names["spec"].decisions, extra=())
    assert default in candidates(Workload("linear", 96, 64, "avx2"), default.storage)  # as it is called without the decision


@pytest.mark.usefixtures("untouched_tables")
def test_a_family_has_one_name() -> None:
    entry = FamilyEntry("columns", "columns", *[lambda *_: None] * 5)
    with pytest.raises(ScheduleMismatch, match="there is a family 'row' already"):
        register_family("row", entry)


@pytest.mark.usefixtures("untouched_tables")
def test_a_shape_some_level_cannot_run_is_refused() -> None:
    with pytest.raises(ScheduleMismatch, match=r"block \(2, 2\) has no kernel on avxvnni"):
        register_block((2, 2), Storage("column", (2, 2)))
    with pytest.raises(ScheduleMismatch, match=r"block \(2, 8\) cannot be stored as \(4, 8\)"):
        register_block((2, 8), Storage("column", (4, 8)))
    assert (2, 2) not in BLOCKS
