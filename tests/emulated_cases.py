"""Small kernels of an ISA level with calls of them and what NumPy expects, for emulated CPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import tvm
from tvm.s_tir import Schedule
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tests.kernel_harness import Array, from_stored, linear_cases, product, read_as, to_groups, to_stored
from tests.test_intrinsics import expected, loop_nest, operands
from tilewright.codegen import tiles
from tilewright.codegen.decisions import FAMILY_LANES, FAMILY_LAYOUT, Family, Storage
from tilewright.codegen.epilogues import Raw
from tilewright.codegen.formats import Layout
from tilewright.codegen.kernels.attention import attention
from tilewright.codegen.packing import pack_linear
from tilewright.codegen.tiles import LEFT, RIGHT, ROW_BYTES, TILE, TILE_SPECS, TILE_TASKS, TileSpec, configure_tiles
from tilewright.codegen.workload import KernelSpec
from tilewright.schedules.apply import schedule
from tilewright.schedules.blocks import COLUMNS, sums_in_16_bits
from tilewright.schedules.decide import decide_attention
from tilewright.schedules.intrinsics import INTRINSICS, intrinsic
from tilewright.schedules.isa import Isa
from tilewright.schedules.single import linear_spec, single_linear

N, K, TOKENS, CALLS = 96, 72, 112, 6  # seven groups: a tile of four, of two and of one
HEADS, CHANNELS, LENGTHS = 2, 16, (1, 17, 41, 47)
Call = tuple[list[Array], Callable[[Array], None]]
"""Arrays of a call, the output last, and the check of what it holds afterwards."""


@dataclass(frozen=True)
class Case:
    """A function to compile and calls of it."""

    func: tvm.tirx.PrimFunc
    calls: list[Call]


def cases(isa: Isa) -> dict[str, Callable[[], Case]]:
    """Name of each case of a level to what makes it: every intrinsic, every kind of linear kernel, attention."""
    named: dict[str, Callable[[], Case]] = {}
    for name, spec in INTRINSICS.items():
        if spec.isa == isa.name:
            named[name.split(".")[1]] = partial(dot, name)
    if isa.tiles:
        for spec in TILE_SPECS.values():
            for quads in (16, 5):
                named[f"{spec.instruction}_{quads}"] = partial(tile_product, spec, quads)
        for k in (64, 96, 128, 136):  # one step, two of 12 quads, two of 16, 17 of 2
            named[f"tile_row_dense_{k}"] = partial(sums, isa, "tile_row", None, k)
    for family, block in linear_cases(isa.name):
        label = "dense" if block is None else f"{block[0]}x{block[1]}"
        named[f"{family}_{label}"] = partial(sums, isa, family, block)
    if sums_in_16_bits(COLUMNS, isa):
        named["gather_4x1_depth_2"] = partial(sums, isa, COLUMNS.family, COLUMNS.block, depth=2)
    for consumer in FAMILY_LAYOUT.values():
        named[f"attention_{consumer}"] = partial(context, isa, consumer)
    return named


def dot(name: str) -> Case:
    """Random and extreme operands of an intrinsic."""
    spec = INTRINSICS[name]
    intrinsic(spec.isa, spec.form, spec.vector, spec.scalar, spec.pack, spec.depth)
    sch = Schedule(tvm.IRModule({"main": loop_nest(spec)}))
    sch.tensorize(sch.get_loops(sch.get_sblock("dot"))[1], name)

    def call(seed: int, extreme: float) -> Call:
        vector, scalar, acc = operands(spec, seed, extreme, 40)
        return [vector, scalar, acc], partial(np.testing.assert_array_equal, expected(spec, vector, scalar, acc))

    return Case(sch.mod["main"], [call(seed, extreme) for seed, extreme in enumerate((0.0, 0.5, 1.0))])


def tile_product(spec: TileSpec, quads: int) -> Case:
    """Random and extreme operands of a product of tiles, sums that wrap around too."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("tile_product")
        left = T.arg("left", T.Buffer((CALLS, TILE, quads, 4), spec.left))
        right = T.arg("right", T.Buffer((CALLS, quads, TILE, 4), spec.right))
        acc = T.arg("acc", T.Buffer((CALLS, TILE, TILE), "int32"))
        with T.parallel(0, CALLS, annotations={TILE_TASKS: quads}) as call:
            T.evaluate(tiles.load(0, acc[call, 0, 0], ROW_BYTES))
            T.evaluate(tiles.load(LEFT[0], left[call, 0, 0, 0], 4 * quads))
            T.evaluate(tiles.load(RIGHT[0], right[call, 0, 0, 0], ROW_BYTES))
            T.evaluate(tiles.multiply(spec.instruction, 0, LEFT[0], RIGHT[0]))
            T.evaluate(tiles.save(0, acc[call, 0, 0], ROW_BYTES))
    random = np.random.default_rng(quads)
    drawn = []
    for dtype, shape in ((spec.left, (TILE, quads, 4)), (spec.right, (quads, TILE, 4)), ("int32", (TILE, TILE))):
        limits = np.iinfo(dtype)
        inner = random.integers(limits.min, limits.max + 1, (CALLS, *shape))
        ends = random.choice([limits.min, limits.max], (CALLS, *shape))
        drawn.append(np.where(np.arange(CALLS).reshape(-1, *[1] * len(shape)) % 2, ends, inner).astype(dtype))
    wide = drawn[2] + np.einsum("cmkp,cknp->cmn", drawn[0].astype(np.int64), drawn[1].astype(np.int64))
    want = (wide + 2**31) % 2**32 - 2**31

    def check(found: Array) -> None:
        np.testing.assert_array_equal(found, want)
        reference = [spec.reference(acc, left, right) for left, right, acc in zip(*drawn, strict=True)]
        np.testing.assert_array_equal(found, reference)

    return Case(configure_tiles(builder.get()), [(drawn, check)])


def sums(isa: Isa, family: Family, block: tuple[int, int] | None, inputs: int = K, **decided: int) -> Case:
    """Integer sums of a linear kernel: random values and an empty row-block, all at the ends of their ranges, no blocks."""
    spec = linear_spec(isa, Storage(family, block), N, inputs, Raw(), **decided)

    def call(seed: int, density: float, extreme: bool) -> Call:
        random = np.random.default_rng(seed)
        bn, bk = block or (4, 4)
        mask = random.random((N // bn, inputs // bk)) < density
        mask[1] &= extreme
        weight = random.choice([-127, 127], (N, inputs)) if extreme else random.integers(-127, 128, (N, inputs))
        weight = (weight * np.kron(mask, np.ones((bn, bk), int))).astype(np.int8)
        x = random.integers(255 if extreme else 0, 256, (TOKENS, inputs))
        fold = random.integers(-(2**20), 2**20, N).astype(np.int32)
        want = to_groups((product(x, weight) + fold).astype(np.int32), FAMILY_LANES[family])
        real = np.full(N, np.nan, np.float32)
        packed = pack_linear(spec.linear, weight).arguments().values()
        stored = to_stored(x, spec.linear.input)
        return [stored, *packed, fold, real, real, np.full_like(want, -1)], partial(np.testing.assert_array_equal, want)

    return Case(single_linear(spec, Raw()).scheduled, [call(0, 0.3, False), call(1, 1.0, True), call(2, 0.0, False)])


def context(isa: Isa, consumer: Layout) -> Case:
    """Attention over sequences of several lengths; the reference rounds float64, so a value may differ by one."""
    held, hidden, stored = isa.attention, HEADS * CHANNELS, read_as(isa.name, consumer)
    spec = KernelSpec("attention", HEADS, CHANNELS, isa.name, stored.label, decide_attention(CHANNELS, isa))
    random = np.random.default_rng(0)
    q, k, v = random.integers(-127, 128, (3, TOKENS, hidden))
    quant = np.array([0.0003, 0.8, 120], np.float32)
    offsets = np.cumsum([0, *LENGTHS]).astype(np.int32)
    want = np.zeros((TOKENS, hidden))
    for start, end in pairwise(offsets):
        for head in np.split(np.arange(hidden), HEADS):
            scores = q[start:end, head] @ k[start:end, head].T
            p = np.rint(255 * np.exp((scores - scores.max(-1, keepdims=True)) * np.float64(quant[0])))
            real = p @ v[start:end, head] / p.sum(-1, keepdims=True) * np.float64(quant[1])
            want[start:end, head] = np.clip(np.rint(real) + quant[2], 0, 255)

    def check(found: Array) -> None:
        difference = np.abs(from_stored(found, stored) - want)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.002

    inputs = [
        to_groups(q.astype(held.query), "packed", held.pack),
        to_groups((k + held.key_offset).astype(held.key), "packed", held.pack),
        to_groups(v.astype(held.query), "columns"),
        offsets,
        quant,
    ]
    output = to_stored(np.full((TOKENS, hidden), 85), stored)
    return Case(schedule(attention(spec, stored, max(LENGTHS)), spec), [([*inputs, output], check)])
