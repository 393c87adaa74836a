"""Every tensor intrinsic against its NumPy reference, over random and extreme operands."""

import re
from functools import cache

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from tests.kernel_harness import EXAMPLES, Array, level
from tilewright.errors import ScheduleMismatch
from tilewright.schedules.intrinsics import INTRINSICS, IntrinSpec, intrinsic
from tilewright.schedules.isa import ISAS

SPECS = [pytest.param(name, id=name, marks=level(spec.isa).marks) for name, spec in INTRINSICS.items()]
NAME = re.compile(r"tw\.dot_(?P<left>[su](8|16))(?P<right>[su](8|16))s32_(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)\.(?P<isa>[a-z0-9]+)")
SHORT = {"int8": "s8", "uint8": "u8", "int16": "s16"}


def loop_nest(spec: IntrinSpec) -> tvm.tirx.PrimFunc:
    """`count` dot products in the form in which kernels write them."""
    lanes, pack, depth = spec.lanes, spec.pack, spec.depth

    @T.prim_func(s_tir=True)
    def deep(vector_: T.handle, scalar_: T.handle, acc_: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        count = T.int32()
        vector = T.match_buffer(vector_, (count, depth, lanes, pack), spec.vector)
        scalar = T.match_buffer(scalar_, (count, depth, pack), spec.scalar)
        acc = T.match_buffer(acc_, (count, lanes), "int32")
        for c, i, d, p in T.grid(count, lanes, depth, pack):
            with T.sblock("dot"):
                vc, vi, vd, vp = T.axis.remap("SSRR", [c, i, d, p])
                acc[vc, vi] = acc[vc, vi] + T.cast(vector[vc, vd, vi, vp], "int32") * T.cast(scalar[vc, vd, vp], "int32")

    @T.prim_func(s_tir=True)
    def tokens(vector_: T.handle, scalar_: T.handle, acc_: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        count = T.int32()
        vector = T.match_buffer(vector_, (count, lanes, pack), spec.vector)
        scalar = T.match_buffer(scalar_, (count, pack), spec.scalar)
        acc = T.match_buffer(acc_, (count, lanes), "int32")
        for c, i, p in T.grid(count, lanes, pack):
            with T.sblock("dot"):
                vc, vi, vp = T.axis.remap("SSR", [c, i, p])
                acc[vc, vi] = acc[vc, vi] + T.cast(vector[vc, vi, vp], "int32") * T.cast(scalar[vc, vp], "int32")

    @T.prim_func(s_tir=True)
    def outputs(vector_: T.handle, scalar_: T.handle, acc_: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        count = T.int32()
        vector = T.match_buffer(vector_, (count, lanes, pack), spec.vector)
        scalar = T.match_buffer(scalar_, (count, pack), spec.scalar)
        acc = T.match_buffer(acc_, (count, lanes), "int32")
        for c, i, p in T.grid(count, lanes, pack):
            with T.sblock("dot"):
                vc, vi, vp = T.axis.remap("SSR", [c, i, p])
                acc[vc, vi] = acc[vc, vi] + T.cast(scalar[vc, vp], "int32") * T.cast(vector[vc, vi, vp], "int32")

    if spec.form == "outputs":
        return outputs
    return deep if spec.depth > 1 else tokens


@cache
def compiled(name: str, tensorized: bool) -> tvm.runtime.Module:
    """The loop nest with the intrinsic in its place, or the plain description."""
    spec = INTRINSICS[name]
    sch = Schedule(tvm.IRModule({"main": loop_nest(spec)}))
    if tensorized:
        assert intrinsic(spec.isa, spec.form, spec.vector, spec.scalar, spec.pack, spec.depth) is spec
        sch.tensorize(sch.get_loops(sch.get_sblock("dot"))[1], name)
    return tvm.compile(sch.mod, target=ISAS[spec.isa].target()).mod


def run(name: str, vector: Array, scalar: Array, acc: Array, tensorized: bool = True) -> NDArray[np.int32]:
    result = tvm.runtime.tensor(acc)
    compiled(name, tensorized)["main"](tvm.runtime.tensor(vector), tvm.runtime.tensor(scalar), result)
    return result.numpy()


def expected(spec: IntrinSpec, vector: Array, scalar: Array, acc: Array) -> NDArray[np.int64]:
    """In 64 bits and written apart from `spec.reference`, whose correctness is tested too."""
    lanes = vector.reshape(len(vector), spec.depth, spec.lanes, spec.pack).astype(np.int64)
    products = np.einsum("cdlp,cdp->cl", lanes, scalar.reshape(len(scalar), spec.depth, spec.pack).astype(np.int64))
    return acc.astype(np.int64) + products


def within_budget(spec: IntrinSpec, scalar: Array) -> Array:
    """`scalar` with values set to 0 that exceed the budget of the 16-bit lane which sums them, in turn."""
    if spec.budget is None:
        return scalar
    kept = scalar.reshape(len(scalar), spec.depth, 2, 2).astype(np.int64)  # [count, depth, lane, pair]
    for sign in (1, -1):
        left = np.full((len(kept), 2), spec.budget)
        for d in range(spec.depth):
            for pair in range(2):
                taken = np.maximum(sign * kept[:, d, :, pair], 0)
                kept[:, d, :, pair][taken > left] = 0
                left -= np.maximum(sign * kept[:, d, :, pair], 0)
    return kept.reshape(scalar.shape).astype(scalar.dtype)


def operands(spec: IntrinSpec, seed: int, extreme: float, count: int) -> tuple[Array, Array, Array]:
    """Random operands, a share `extreme` of which is at an end of its declared range; sums stay within 32 bits."""
    random = np.random.default_rng(seed)

    def draw(limits: tuple[int, int], shape: tuple[int, ...], dtype: str) -> Array:
        values = random.integers(limits[0], limits[1] + 1, shape)
        ends = np.array([*limits, 0])[random.integers(0, 3, shape)]
        return np.where(random.random(shape) < extreme, ends, values).astype(dtype)

    depth = (spec.depth,) if spec.depth > 1 else ()
    vector = draw(spec.vector_range, (count, *depth, spec.lanes, spec.pack), spec.vector)
    scalar = within_budget(spec, draw(spec.scalar_range, (count, *depth, spec.pack), spec.scalar))
    most = np.abs(expected(spec, vector, scalar, np.zeros((count, spec.lanes)))).max()
    room = max(0, 2**31 - 1 - int(most))
    acc = draw((-room, room), (count, spec.lanes), "int32")
    return vector, scalar, acc


@pytest.mark.parametrize("name", SPECS)
@EXAMPLES
@given(seed=st.integers(0, 2**32 - 1), extreme=st.sampled_from([0.0, 0.5, 1.0]), count=st.integers(1, 40))
def test_equals_reference(name: str, seed: int, extreme: float, count: int) -> None:
    spec = INTRINSICS[name]
    vector, scalar, acc = operands(spec, seed, extreme, count)
    found = run(name, vector, scalar, acc)
    np.testing.assert_array_equal(found, expected(spec, vector, scalar, acc))
    reference = [spec.reference(a, v, s) for a, v, s in zip(acc, vector, scalar, strict=True)]
    np.testing.assert_array_equal(found, reference)


@pytest.mark.parametrize("name", SPECS)
def test_every_pair_of_extremes(name: str) -> None:
    """All products at once at the same ends of the ranges: where a saturating instruction would show."""
    spec = INTRINSICS[name]
    pairs = [(v, s) for v in (*spec.vector_range, 0, 1) for s in (*spec.scalar_range, 0, 1)]
    depth = (spec.depth,) if spec.depth > 1 else ()
    vector = np.array([np.full((*depth, spec.lanes, spec.pack), v) for v, _ in pairs], spec.vector)
    scalar = within_budget(spec, np.array([np.full((*depth, spec.pack), s) for _, s in pairs], spec.scalar))
    acc = np.zeros((len(pairs), spec.lanes), np.int32)
    np.testing.assert_array_equal(run(name, vector, scalar, acc), expected(spec, vector, scalar, acc))


@pytest.mark.parametrize("name", [spec for spec in SPECS if INTRINSICS[str(spec.id)].budget])
def test_the_budget_is_needed_and_enough(name: str) -> None:
    """Each lane filled to the budget with either sign, in every split over its products; one more saturates."""
    spec = INTRINSICS[name]
    slots = 2 * spec.depth
    depth = (spec.depth,) if spec.depth > 1 else ()
    assert spec.budget

    def lane(*weights: int) -> Array:
        """The scalar operand with these weights in the second lane of 16 bits and none in the first."""
        pairs = np.zeros((1, spec.depth, 2, 2), np.int8)
        pairs[0, :, 1] = np.resize(weights, slots).reshape(spec.depth, 2)
        return pairs.reshape(1, *depth, spec.pack)

    vector = np.full((1, *depth, spec.lanes, spec.pack), 255, np.uint8)
    acc = np.zeros((1, spec.lanes), np.int32)
    for sign in (1, -1):
        share = sign * spec.budget // slots
        for scalar in (lane(*[share] * slots), lane(127 * sign, sign, *[0] * (slots - 2))):
            np.testing.assert_array_equal(run(name, vector, scalar, acc), 255 * sign * spec.budget)
        over = lane(*[share] * (slots - 1), share + sign)
        assert (run(name, vector, over, acc) != expected(spec, vector, over, acc)).all()


@pytest.mark.parametrize("name", SPECS)
def test_description_equals_reference(name: str) -> None:
    """The loop nest that tensorize matches, run as it stands."""
    spec = INTRINSICS[name]
    vector, scalar, acc = operands(spec, 0, 0.3, 50)
    np.testing.assert_array_equal(run(name, vector, scalar, acc, tensorized=False), expected(spec, vector, scalar, acc))


@pytest.mark.parametrize("name", INTRINSICS)
def test_name_tells_what_it_is(name: str) -> None:
    spec = INTRINSICS[name]
    assert spec.name == name
    match = NAME.fullmatch(name)
    assert match
    activation, weight = (spec.vector, spec.scalar) if spec.form == "tokens" else (spec.scalar, spec.vector)
    assert (match["left"], match["right"]) == (SHORT[activation], SHORT[weight])
    tokens, outputs = (spec.lanes, 1) if spec.form == "tokens" else (1, spec.lanes)
    assert (int(match["m"]), int(match["n"]), int(match["k"])) == (tokens, outputs, spec.depth * spec.pack)
    assert match["isa"] == spec.isa in ISAS


@pytest.mark.parametrize("name", INTRINSICS)
def test_declared_ranges_fit_their_dtypes_and_cover_what_kernels_store(name: str) -> None:
    """Weights and attention operands are -127..127 (an unsigned key is moved by 128), activations 0..255."""
    spec = INTRINSICS[name]
    for dtype, (low, high) in ((spec.vector, spec.vector_range), (spec.scalar, spec.scalar_range)):
        info = np.iinfo(dtype)
        assert info.min <= low < high <= info.max
        assert high >= (255 if dtype == "int16" else 127)
        assert low <= (-127 if dtype != "uint8" else 0)
    largest = max(map(abs, spec.vector_range)) * max(map(abs, spec.scalar_range)) * spec.pack
    assert largest < 2**31


def test_names_are_unique_by_use() -> None:
    """A schedule asks by these: they must name one intrinsic."""
    uses = [(s.isa, s.form, s.vector, s.scalar, s.pack, s.depth) for s in INTRINSICS.values()]
    assert len(set(uses)) == len(uses)


@pytest.mark.parametrize("isa", ISAS)
def test_every_level_has_what_its_kernels_ask_for(isa: str) -> None:
    held, attention = ISAS[isa].operands, ISAS[isa].attention
    for form, vector, scalar, pack in (
        ("tokens", held.activation, held.weight, held.pack),  # column and gather
        ("outputs", "int8", held.activation, held.pack),  # row
        ("tokens", attention.query, attention.key, attention.pack),
        ("tokens", attention.weight, attention.query, attention.pack),  # weights x values
    ):
        spec = intrinsic(isa, form, vector, scalar, pack)
        assert (spec.form, spec.vector, spec.scalar, spec.pack) == (form, vector, scalar, pack)
    with pytest.raises(ScheduleMismatch, match=f"{isa} has no dot product of 3 int8"):
        intrinsic(isa, "tokens", "int8", "int8", 3)
