"""What the schedules make of the kernels: which instructions, which registers; and the table of block shapes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi

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
    read_as,
    vector_stack_accesses,
)
from tilewright.codegen.block_sparse import BLOCKS, detect_block
from tilewright.codegen.decisions import FAMILY_LANES, LinearDecisions, Storage
from tilewright.codegen.epilogues import Activate, Raw
from tilewright.codegen.kernels.linear import linear
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
from tilewright.codegen.plan import LayerPlan
from tilewright.codegen.workload import GROUP, describe
from tilewright.errors import ScheduleMismatch
from tilewright.schedules.apply import apply
from tilewright.schedules.blocks import COLUMNS, DENSE, DENSE_TILES, operands, register_block, sums_in_16_bits
from tilewright.schedules.choice import Choice, choose, plan, sparse_storage
from tilewright.schedules.intrinsics import INTRINSICS
from tilewright.schedules.isa import ISAS, Isa
from tilewright.schedules.rates import AttentionRate, Kind, LevelRates, LinearRate, find
from tilewright.schedules.single import linear_spec, single_linear

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
    tile = read_as(isa, "columns").together if family == "gather" else 1
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


@pytest.mark.parametrize(("family", "block"), FAMILIES)
def test_weights_are_fetched_ahead_where_it_is_decided(family, block) -> None:
    """One prefetch for each line of an entry's weights, and one for its indices, in each copy of a loop that LLVM unrolls."""
    for bytes_ahead in (0, 2048):
        made = linear_kernel("avx512vnni", family, block, 192, 768, Raw(), prefetch=bytes_ahead)
        counts = {sum("prefetch" in line for line in body) for body in innermost_loops(made.assembly, "vpdpbusd")}
        entry = 4 * made.spec.linear.row_block  # bytes of an entry: four inputs
        each = -(-entry // 64) + (block is not None)
        assert counts <= {each, 2 * each} if bytes_ahead else counts == {0}


@pytest.mark.parametrize("isa", ["avxvnni", "avx512vnni"])
def test_single_outputs_have_two_sums(isa: str) -> None:
    """A chain of vpdpbusd waits for each; two accumulators for every vector of a tile halve that."""
    vectors = GROUP // ISAS[isa].lanes
    loops = innermost_loops(kernel(isa, "column", (1, 4)).assembly, "vpdpbusd")
    sums = {len({line.split()[-1] for line in body if "vpdpbusd" in line}) for body in loops}
    assert sums == {2 * vectors * tile for tile in ((4, 2, 1) if vectors == 1 else (1,))}


@pytest.mark.parametrize(("family", "block"), [*FAMILIES, ("column", (1, 4)), ("row", (32, 4))])
def test_code_does_not_grow_with_the_matrix(family, block) -> None:
    own = linear_spec(ISAS["avx2"], Storage(family, block), 64, 64, Raw()).linear.input
    small, large = (linear_kernel("avx2", family, block, n, n, Activate("relu", own)) for n in (192, 1536))
    assert len(large.assembly) < 1.25 * len(small.assembly)


@pytest.mark.parametrize(("family", "block"), FAMILIES)
def test_portable_has_no_avx(family, block) -> None:
    assembly = kernel("portable", family, block).assembly
    assert "pmaddwd" in assembly
    assert not re.search(r"^\s+(\{vex\}\s+)?v[a-z0-9]+\s.*%xmm|%[yz]mm\d", assembly, re.MULTILINE)


DECISIONS = {"rows": (1, 8, 16), "chunks": (1, 2), "token_tiles": ((1,), (4, 2, 1)), "prefetch": (0, 1, 1 << 20)}
SPARSE = ("row", "column", "gather")
"""Values of each field that a tuner may choose, for the families that it means something to."""
MEANT = {"rows": ("row",), "chunks": SPARSE, "token_tiles": ("column",), "prefetch": SPARSE}


@pytest.mark.parametrize(("isa", "family", "block"), [level(isa, *case) for isa in ISAS for case in FAMILIES])
def test_every_decision_gives_the_same_sums(isa: str, family, block) -> None:
    """A tuner may choose any: each field is varied from the default."""
    n, k = 192, 64
    random = np.random.default_rng(0)
    bn, bk = block or (1, 1)
    mask = np.kron(random.random((n // bn, k // bk)) < 0.5, np.ones((bn, bk), int))
    weight = (random.integers(-127, 128, (n, k)) * mask).astype(np.int8)
    x = random.integers(0, 256, (48, k)).astype(np.uint8)
    layout = FAMILY_LANES[family]
    for field, values in DECISIONS.items():
        for value in values if family in MEANT[field] else ():
            spec = linear_spec(ISAS[isa], Storage(family, block), n, k, Raw(), **{field: value})
            kernel = LinearKernel(spec, Raw())
            zeros = np.zeros(n, np.float32)
            inputs = kernel.arrays(x, weight, fold=np.zeros(n, np.int32), scale=zeros, bias=zeros)
            found = kernel(inputs, {"sums": group_shape(len(x), n, layout)})["sums"]
            np.testing.assert_array_equal(from_groups(found, layout), product(x, weight), err_msg=f"{field}={value}")


def test_every_field_that_a_tuner_may_choose_is_varied_above() -> None:
    """What is not: how weights and activations are stored, and what goes with single outputs only."""
    fixed = {"storage", "operands", "row_block", "together", "depth", "halves", "rows_at_once", "partial_sums", "extra"}
    assert set(DECISIONS) | fixed == {field.name for field in dataclasses.fields(LinearDecisions)}


@pytest.mark.parametrize(("isa", "family", "block"), EVERY)
@pytest.mark.parametrize("n", [96, 768, 2304, 3072])
def test_default_decisions_divide_the_kernel(isa: str, family, block, n: int) -> None:
    decisions = linear_spec(ISAS[isa], Storage(family, block), n, 768, Raw()).linear
    assert GROUP % decisions.rows == 0
    assert (n // decisions.row_block) % decisions.chunks == 0


def test_apply_leaves_other_functions_alone() -> None:
    spec = linear_spec(ISAS["avx2"], Storage("row", (16, 4)), 64, 64, Raw())
    own = foreign = linear(spec, Raw())
    module = tvm.IRModule({"own": own, "foreign": foreign})
    done = apply(module, {"own": spec})
    assert tvm_ffi.structural_equal(done["foreign"], foreign)
    assert not tvm_ffi.structural_equal(done["own"], own)
    assert tvm_ffi.structural_equal(module["own"], own)  # the argument is not changed


def test_describe_names_every_decision() -> None:
    spec = linear_spec(ISAS["avx2"], Storage("row", (16, 4)), 768, 768, Raw())
    assert all(f"{field}=" in describe(spec.decisions) for field in DECISIONS)
    assert describe(spec.decisions) in spec.key()


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


def test_blocks_split_into_those_they_are_stored_as() -> None:
    for found, plans in BLOCKS.items():
        for candidate in plans:
            assert candidate.block is not None
            assert found[0] % candidate.block[0] == found[1] % candidate.block[1] == 0


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_shape_has_a_sparse_kernel_at_every_level(isa: Isa, block: tuple[int, int]) -> None:
    chosen = choose(768, 768, "qkv", block, 0.02, isa, find(isa.name, None))
    assert chosen.storage == sparse_storage(block, isa)
    assert (chosen.storage.family, chosen.storage.block) in linear_cases(isa.name)  # which the other tests compile and run
    assert bool(chosen.reason) == (chosen.storage.block != block)  # the manifest says why


def test_sparse_is_chosen_where_the_rates_say_that_it_takes_less_time() -> None:
    """A dense kernel takes 64 * 64 / 16 = 256 cycles; (4, 1) blocks at 8 products a cycle and a cost of 64 cycles more."""
    isa = ISAS["avx2"]
    known = (LinearRate("row", None, 16.0, 0.0, 0.0, 0.0), LinearRate("gather", (4, 1), 8.0, 1.0, 9.0, 0.0))
    rates = LevelRates("avx2", "any", "measured", "made up", 1.0, known, AttentionRate(8.0, 0.5, 2.0), 0.25)

    def chosen(density: float, kind: Kind = "qkv", block: tuple[int, int] | None = (4, 1), known: Any = rates) -> Choice:
        return choose(64, 64, kind, block, density, isa, known)

    even = (256 - 64) * 8 / 4096  # the density at which both take as long
    assert chosen(even - 0.01).storage == Storage("gather", (4, 1))
    assert chosen(even + 0.01).storage == DENSE
    assert chosen(even + 0.01).reason == "computed as dense: block (4, 1) pays on avx2 from 62% of zero blocks on"
    assert chosen(0.49, "activate").storage.block == (4, 1) and chosen(0.51, "activate").storage == DENSE
    assert "never pays" in chosen(0.0, "add_norm").reason
    assert chosen(0.0, block=None) == Choice(DENSE)
    assert chosen(0.99, block=(1, 4)).storage.block == (1, 4)  # of which the rates know nothing
    assert chosen(0.99, known=None).storage.block == (4, 1)


def test_weights_out_of_range_of_a_product_are_not_given_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    isa = ISAS["avx2"]
    model = model_of(((4, 1),) * 6)
    model.layers[0].up.weight[0, 0] = -128
    assert plan(model, isa, sparse="always").layers[0].up.decisions.block == (4, 1)  # any byte is taken
    name = next(name for name, spec in INTRINSICS.items() if (spec.isa, spec.vector, spec.depth) == ("avx2", "uint8", 1))
    monkeypatch.setitem(INTRINSICS, name, dataclasses.replace(INTRINSICS[name], scalar_range=(-127, 127)))
    narrow = plan(model, isa, sparse="always").layers[0]
    assert (narrow.up.decisions.storage, narrow.down.decisions.block) == (DENSE, (4, 1))
    assert "out of the range" in narrow.up.reason


def stored(layer: LayerPlan) -> list[Storage]:
    return [linear.decisions.storage for linear in layer.linears()]


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
def test_plan_of_a_model(isa: Isa) -> None:
    fine, square, coarse = (4, 1), (4, 4), (16, 4)
    made = plan(model_of((fine,) * 6, (coarse, coarse, coarse, None, fine, (64, 64))), isa, sparse="always")
    assert made.isa == isa.name
    assert {linear.decisions.operands for linear in made.layers[0].linears()} == {operands("gather", isa)}
    assert made.residual == "columns"  # at least five of eight kernels have tokens for lanes
    assert stored(made.layers[0]) == [Storage("gather", fine)] * 4
    second = made.layers[1]
    wide, dense = (Storage("tile_column", coarse), DENSE_TILES) if isa.tiles else (Storage("row", coarse), DENSE)
    if sums_in_16_bits(COLUMNS, isa):  # the one way to multiply bytes there
        wide = dense = COLUMNS
    assert stored(second) == [wide, dense, Storage("gather", fine), dense]
    assert "no kernel for block (64, 64)" in second.down.reason
    assert plan(model_of((coarse,) * 6), isa, sparse="always").residual == FAMILY_LANES[wide.family]
    assert plan(model_of((square,) * 6), isa, sparse="always").residual == "columns"


def test_query_key_and_value_share_one_kernel() -> None:
    fine, coarse = (4, 1), (16, 4)
    isa = ISAS["avx2"]
    same, mixed, half = (
        plan(model_of((*first, None, None, None)), isa, sparse="always").layers[0].qkv
        for first in ((fine,) * 3, (fine, coarse, fine), (fine, fine, None))
    )
    assert same.decisions.storage == Storage("gather", fine)
    for merged in (mixed, half):
        assert merged.decisions.storage == COLUMNS  # dense at this level
        assert "q, k and v" in merged.reason


@pytest.fixture
def registry() -> Iterator[None]:
    """Puts back what a test registers."""
    before = dict(BLOCKS)
    yield
    BLOCKS.clear()
    BLOCKS.update(before)


@pytest.mark.usefixtures("registry")
def test_a_registered_block_shape_is_found_and_planned() -> None:
    shape, way = (64, 4), Storage("row", (32, 4))
    weight = np.kron(np.eye(4, 64), np.ones(shape)).astype(np.int8)
    assert detect_block(weight) != shape
    register_block(shape, way)
    assert detect_block(weight) == shape
    for isa in ISAS.values():
        assert sparse_storage(shape, isa) == way


@pytest.mark.usefixtures("registry")
def test_block_shapes_without_a_kernel_are_not_registered() -> None:
    before = dict(BLOCKS)
    for candidate, message in (
        (Storage("row", (16, 4)), r"block \(24, 4\) cannot be stored as \(16, 4\)"),
        (Storage("row", None), "cannot be stored as None"),
        (Storage("row", (24, 2)), r"block \(24, 4\) has no kernel on \w+"),
    ):
        with pytest.raises(ScheduleMismatch, match=message):
            register_block((24, 4), candidate)
    assert before == BLOCKS


def test_blocks_are_not_skipped_if_never_is_asked_for() -> None:
    made = plan(model_of(((4, 1),) * 6), ISAS["avx2"], sparse="never")
    assert {linear.decisions.storage for linear in made.layers[0].linears()} == {DENSE}


def test_a_model_without_layers_has_a_plan() -> None:
    assert plan(model_of(), ISAS["avx2"]).layers == ()


def test_chunks_that_do_not_divide_the_row_blocks_are_refused() -> None:
    own = linear_spec(ISAS["avx2"], Storage("gather", (4, 1)), 64, 64, Raw(), chunks=3)
    with pytest.raises(ScheduleMismatch, match="16 row-blocks and 64 parts do not divide into 3 chunks"):
        single_linear(own, Raw())
