"""What the schedules make of the kernels: which instructions, which registers; and the table of block shapes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm.s_tir import Schedule

from tests.kernel_harness import (
    FAMILIES,
    LinearKernel,
    from_groups,
    group_shape,
    innermost_loops,
    level,
    linear_cases,
    linear_kernel,
    product,
    vector_stack_accesses,
)
from tilewright.codegen.block_sparse import BLOCK_SHAPES, detect_block
from tilewright.codegen.kernels.epilogue import Activate, Raw
from tilewright.codegen.kernels.linear import linear, row_block
from tilewright.codegen.model import (
    Attention,
    Embeddings,
    EncoderConfig,
    EncoderModel,
    Head,
    Layer,
    LayerNorm,
    Linear,
    Quantization,
)
from tilewright.codegen.plan import LinearPlan
from tilewright.codegen.trim import trim
from tilewright.codegen.workload import ATTRIBUTE, FAMILY_LANES, FAMILY_LAYOUT, GROUP, Workload
from tilewright.errors import ScheduleMismatch
from tilewright.schedules.apply import apply, describe
from tilewright.schedules.blocks import BLOCKS, DENSE, DENSE_TILES, choose, plan, register_block
from tilewright.schedules.isa import ISAS, Isa
from tilewright.schedules.linear import LinearDecisions, default_decisions, schedule_linear

MULTIPLY = {
    "portable": r"\bpmaddwd\b.*%xmm",
    "avx2": r"\bvpmaddwd\b.*%ymm",
    "avxvnni": r"\{vex\}\s+vpdpbusd\b.*%ymm",
    "avx512": r"\bvpmaddwd\b.*%zmm",
    "avx512vnni": r"\bvpdpbusd\b.*%zmm",
    "amx": r"\bvpdpbusd\b.*%zmm|\btdpb\w+\b",
}


def kernel(isa: str, family, block) -> LinearKernel:
    """Large enough that nothing is unrolled whole; the tests of sums run the same kernels."""
    return linear_kernel(isa, family, block, 192, 768, Raw())


EVERY = [(isa, *case) for isa in ISAS for case in linear_cases(isa)]


@pytest.mark.parametrize(("isa", "family", "block"), EVERY)
def test_the_levels_instruction_does_the_work(isa: str, family, block) -> None:
    loops = list(innermost_loops(kernel(isa, family, block).assembly, MULTIPLY[isa]))
    assert loops
    for body in loops:
        assert not [line for line in body if re.match(r"v?(pmul|imul|mulps)", line)]  # none is left to scalars


def fits(isa: str, family, block) -> bool:
    """Whether accumulators leave a register free: (8, 4) on AVX2 does not, and is faster than (4, 4) all the same."""
    if family == "row":
        return True
    registers = 32 if ISAS[isa].lanes == 16 else 16
    tile = ISAS[isa].operands.columns if family == "gather" else 1
    return tile * block[0] * GROUP // ISAS[isa].lanes < registers


# tile kernels have accumulators of their own (test_tiles.py)
@pytest.mark.parametrize(
    ("isa", "family", "block"),
    [case for case in EVERY if case[0] != "portable" and not case[1].startswith("tile") and fits(*case)],
)
def test_accumulators_stay_in_registers(isa: str, family, block) -> None:
    """No load or store of a vector on the stack in the loop that multiplies. SSE2's sixteen registers are too few."""
    for body in innermost_loops(kernel(isa, family, block).assembly, MULTIPLY[isa]):
        assert vector_stack_accesses(body) == []
        assert not [line for line in body if re.match(r"v?mov\w+\s+%[xyz]mm\d+, .*\(", line)]  # nor a store elsewhere


@pytest.mark.parametrize("isa", ["avxvnni", "avx512vnni"])
def test_single_outputs_have_two_sums(isa: str) -> None:
    """A chain of vpdpbusd waits for each; two accumulators for every vector of a tile halve that."""
    vectors = GROUP // ISAS[isa].lanes
    loops = innermost_loops(kernel(isa, "column", (1, 4)).assembly, "vpdpbusd")
    sums = {len({line.split()[-1] for line in body if "vpdpbusd" in line}) for body in loops}
    assert sums == {2 * vectors * tile for tile in ((4, 2, 1) if vectors == 1 else (1,))}


@pytest.mark.parametrize(("family", "block"), [*FAMILIES, ("column", (1, 4)), ("row", (32, 4))])
def test_code_does_not_grow_with_the_matrix(family, block) -> None:
    small, large = (linear_kernel("avx2", family, block, n, n, Activate("relu", FAMILY_LAYOUT[family])) for n in (192, 1536))
    assert len(large.assembly) < 1.25 * len(small.assembly)


@pytest.mark.parametrize(("family", "block"), FAMILIES)
def test_portable_has_no_avx(family, block) -> None:
    assembly = kernel("portable", family, block).assembly
    assert "pmaddwd" in assembly
    assert not re.search(r"^\s+(\{vex\}\s+)?v[a-z0-9]+\s.*%xmm|%[yz]mm\d", assembly, re.MULTILINE)


DECISIONS = {"rows": (1, 8, 16), "chunks": (1, 2)}


@pytest.mark.parametrize(("isa", "family", "block"), [level(isa, *case) for isa in ISAS for case in FAMILIES])
def test_every_decision_gives_the_same_sums(isa: str, family, block) -> None:
    """A tuner may choose any: each field is varied from the default."""
    n, k = 192, 64
    random = np.random.default_rng(0)
    bn, bk = block or (1, 1)
    mask = np.kron(random.random((n // bn, k // bk)) < 0.5, np.ones((bn, bk), int))
    weight = (random.integers(-127, 128, (n, k)) * mask).astype(np.int8)
    x = random.integers(0, 256, (48, k)).astype(np.uint8)
    workload = Workload("linear", n, k, isa, ISAS[isa].operands, "raw", family, block)
    layout = FAMILY_LANES[family]
    for field, values in DECISIONS.items():
        for value in values if field != "rows" or family == "row" else ():
            decisions = dataclasses.replace(default_decisions(workload), **{field: value})
            kernel = LinearKernel(workload, Raw(), partial(scheduled, workload, decisions))
            zeros = np.zeros(n, np.float32)
            inputs = kernel.arrays(x, weight, fold=np.zeros(n, np.int32), scale=zeros, bias=zeros)
            found = kernel(inputs, {"sums": group_shape(len(x), n, layout)})["sums"]
            np.testing.assert_array_equal(from_groups(found, layout), product(x, weight), err_msg=f"{field}={value}")


def scheduled(workload: Workload, decisions: LinearDecisions, func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    sch = Schedule(tvm.IRModule({"main": func}))
    schedule_linear(sch, workload, decisions)
    return trim(sch.mod["main"])


def test_every_field_that_a_tuner_may_choose_is_varied_above() -> None:
    assert set(DECISIONS) == {field.name for field in dataclasses.fields(LinearDecisions)}


@pytest.mark.parametrize(("isa", "family", "block"), EVERY)
@pytest.mark.parametrize("n", [96, 768, 2304, 3072])
def test_default_decisions_divide_the_kernel(isa: str, family, block, n: int) -> None:
    workload = Workload("linear", n, 768, isa, ISAS[isa].operands, "", family, block)
    decisions = default_decisions(workload)
    assert GROUP % decisions.rows == 0
    assert (n // row_block(workload)) % decisions.chunks == 0


def test_apply_leaves_other_functions_alone() -> None:
    own = linear(Workload("linear", 64, 64, "avx2", ISAS["avx2"].operands, "raw", "gather", (4, 1)), Raw())
    foreign = own.without_attr(ATTRIBUTE)
    module = tvm.IRModule({"own": own, "foreign": foreign})
    done = apply(module)
    assert tvm_ffi.structural_equal(done["foreign"], foreign)
    assert not tvm_ffi.structural_equal(done["own"], own)
    assert tvm_ffi.structural_equal(module["own"], own)  # the argument is not changed


def test_describe_names_every_decision() -> None:
    workload = Workload("linear", 768, 768, "avx2", ISAS["avx2"].operands, "", "row", (16, 4))
    assert all(f"{field}=" in describe(workload) for field in DECISIONS)


def linear_of(n: int, k: int, block: tuple[int, int] | None = None) -> Linear:
    return Linear("w", np.zeros((n, k), np.int8), np.zeros(n, np.float32), np.ones(n, np.float32), Quantization(1.0, 0), block)


def model_of(*blocks: tuple[tuple[int, int] | None, ...]) -> EncoderModel:
    """A model of 32 channels whose layer i has `blocks[i]` as the blocks of query, key, value, output, up and down."""
    norm = LayerNorm(np.ones(32, np.float32), np.zeros(32, np.float32), 1e-12)
    layers = []
    for found in blocks:
        query, key, value, output = (linear_of(32, 32, block) for block in found[:4])
        attention = Attention(query, key, value, output, 1.0, 1.0, 1.0)
        layers.append(Layer(attention, norm, linear_of(64, 32, found[4]), linear_of(32, 64, found[5]), norm))
    table = np.zeros((4, 32), np.float32)
    config = EncoderConfig("distilbert", 32, 4, 64, 4, 4, "gelu")
    return EncoderModel(config, Embeddings(table, table, None, norm), tuple(layers), Head("none"))


def test_every_block_shape_that_is_looked_for_has_plans() -> None:
    assert set(BLOCKS) == set(BLOCK_SHAPES)
    for found, plans in BLOCKS.items():
        for candidate in plans:
            assert candidate.block is not None
            assert found[0] % candidate.block[0] == found[1] % candidate.block[1] == 0  # a block splits into stored ones


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
@pytest.mark.parametrize("block", BLOCK_SHAPES)
def test_every_block_shape_has_a_sparse_kernel_at_every_level(isa: Isa, block: tuple[int, int]) -> None:
    chosen = choose(block, isa)
    assert chosen.block is not None
    assert (chosen.family, chosen.block) in linear_cases(isa.name)  # which the other tests compile and run
    assert bool(chosen.reason) == (chosen.block != block)  # the manifest says why


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
def test_plan_of_a_model(isa: Isa) -> None:
    fine, square, coarse = (4, 1), (4, 4), (16, 4)
    made = plan(model_of((fine,) * 6, (coarse, coarse, coarse, None, fine, (64, 64))), isa)
    assert (made.isa, made.operands) == (isa.name, isa.operands)
    assert made.residual == "columns"  # at least five of eight kernels have tokens for lanes
    assert set(made.layers[0].linears()) == {LinearPlan("gather", fine)}
    second = made.layers[1]
    wide, dense = (LinearPlan("tile_column", coarse), DENSE_TILES) if isa.tiles else (LinearPlan("row", coarse), DENSE)
    assert (second.qkv, second.output, second.up) == (wide, dense, LinearPlan("gather", fine))
    assert (second.down.family, second.down.block) == (dense.family, None)
    assert "no kernel for block (64, 64)" in second.down.reason
    assert plan(model_of((coarse,) * 6), isa).residual == FAMILY_LANES[wide.family]
    assert plan(model_of((square,) * 6), isa).residual == "columns"


def test_query_key_and_value_share_one_kernel() -> None:
    fine, coarse = (4, 1), (16, 4)
    isa = ISAS["avx2"]
    same, mixed, half = (
        plan(model_of((*first, None, None, None)), isa).layers[0].qkv
        for first in ((fine,) * 3, (fine, coarse, fine), (fine, fine, None))
    )
    assert same == LinearPlan("gather", fine)
    for merged in (mixed, half):
        assert (merged.family, merged.block) == ("row", None)
        assert "q, k and v" in merged.reason


@pytest.fixture
def registry() -> Iterator[None]:
    """Puts back what a test registers."""
    plans, shapes = dict(BLOCKS), list(BLOCK_SHAPES)
    yield
    BLOCKS.clear()
    BLOCKS.update(plans)
    BLOCK_SHAPES[:] = shapes


@pytest.mark.usefixtures("registry")
def test_a_registered_block_shape_is_found_and_planned() -> None:
    shape, stored = (64, 4), LinearPlan("row", (32, 4))
    weight = np.kron(np.eye(4, 64), np.ones(shape)).astype(np.int8)
    assert detect_block(weight) != shape
    register_block(shape, stored)
    assert detect_block(weight) == shape
    for isa in ISAS.values():
        assert choose(shape, isa).block == (32, 4)


@pytest.mark.usefixtures("registry")
def test_block_shapes_without_a_kernel_are_not_registered() -> None:
    before = dict(BLOCKS)
    for candidate, message in (
        (LinearPlan("row", (16, 4)), r"block \(24, 4\) cannot be stored as \(16, 4\)"),
        (LinearPlan("row", None), "cannot be stored as None"),
        (LinearPlan("row", (24, 2)), r"block \(24, 4\) has no kernel on \w+"),
    ):
        with pytest.raises(ScheduleMismatch, match=message):
            register_block((24, 4), candidate)
    assert before == BLOCKS


def test_a_model_without_layers_has_a_plan() -> None:
    assert plan(model_of(), ISAS["avx2"]).layers == ()


def test_chunks_that_do_not_divide_the_row_blocks_are_refused() -> None:
    own = Workload("linear", 64, 64, "avx2", ISAS["avx2"].operands, "raw", "gather", (4, 1))
    with pytest.raises(ScheduleMismatch, match="16 row-blocks and 64 parts do not divide into 3 chunks"):
        schedule_linear(Schedule(linear(own, Raw())), own, LinearDecisions(chunks=3))
