"""The space of decisions: whatever it offers compiles, computes the same integers and contains the defaults."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernel_harness import (
    LEVELS,
    LinearKernel,
    assert_u8,
    from_groups,
    from_stored,
    group_shape,
    product,
    round_up,
)
from tests.test_kernels_attention import check as check_attention
from tilewright.codegen.block_sparse import BLOCKS
from tilewright.codegen.decisions import AttentionDecisions, LinearDecisions, Storage, TokenBucket
from tilewright.codegen.epilogues import Activate, Epilogue, Qkv, Raw
from tilewright.codegen.kernels.linear import linear
from tilewright.codegen.packing import pack_linear
from tilewright.codegen.workload import KernelSpec, Workload
from tilewright.errors import ScheduleMismatch
from tilewright.schedules.blocks import dense
from tilewright.schedules.choice import sparse_storage
from tilewright.schedules.decide import decide_attention, decide_linear
from tilewright.schedules.isa import ISAS
from tilewright.schedules.space import ATTENTION, LINEAR, attention_candidates, candidates, storages

FOUND = [None, (4, 1), (1, 4), (4, 4), (8, 1), (16, 4)]
TOKENS = st.one_of(st.sampled_from([1, 16, 17, 64]), st.integers(1, 150))
SEEDS = st.integers(0, 2**32 - 1)
DRAWN = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
"""Nearly each example compiles a kernel."""


def workload(isa: str, n: int, k: int, block: tuple[int, int] | None, density: int = 20) -> Workload:
    return Workload("linear", n, k, isa, "raw", block, density)


def check(kernel: LinearKernel, epilogue: Epilogue, tokens: int, seed: int) -> None:
    """Sums bit for bit those of NumPy, what is made of them within a step."""
    n, k, made, random = kernel.spec.n, kernel.spec.k, kernel.spec.linear, np.random.default_rng(seed)
    block = made.block or (1, 1)
    mask = np.kron(random.random((n // block[0], k // block[1])) < random.random(), np.ones(block, int))
    weight = (random.integers(-127, 128, (n, k)) * mask).astype(np.int8)
    x = random.integers(0, 256, (round_up(tokens), k)).astype(np.uint8)
    fold = random.integers(-(2**16), 2**16, n).astype(np.int32)
    sums = product(x, weight) + fold
    scale, bias = np.full(n, 1 / (1 + np.abs(sums).std()), np.float32), random.standard_normal(n).astype(np.float32)
    inputs, groups = kernel.arrays(x, weight, fold=fold, scale=scale, bias=bias), len(x) // 16
    real = sums * scale[0].astype(np.float64) + bias
    if isinstance(epilogue, Raw):
        lanes = made.storage.lanes
        found = kernel(inputs, {"sums": group_shape(len(x), n, lanes)})["sums"]
        np.testing.assert_array_equal(from_groups(found, lanes), sums)
    elif isinstance(epilogue, Activate):
        quant, stored = np.array([50.0, 3.0], np.float32), epilogue.consumer
        found = kernel({**inputs, "quant": quant}, {"activated": stored.shape(groups, n)})["activated"]
        assert_u8(from_stored(found, stored), np.maximum(real, 0) * 50, 3)
    else:
        shapes = {name: shape for name, shape, _ in epilogue.outputs(groups, n, made.storage.lanes)}
        values = kernel(inputs, shapes)["value"]
        assert_u8(from_groups(values, "columns"), real[:, 2 * n // 3 :], 0, -127, 127)


@pytest.mark.parametrize("isa", LEVELS)
@DRAWN
@given(data=st.data(), tokens=TOKENS, seed=SEEDS)
def test_every_candidate_computes_the_same(isa: str, data: st.DataObject, tokens: int, seed: int) -> None:
    n, k = data.draw(st.sampled_from([(96, 64), (192, 128)]))
    block = data.draw(st.sampled_from(FOUND))
    storage = data.draw(st.sampled_from(storages(n, k, block, ISAS[isa])))
    made = data.draw(st.sampled_from(candidates(workload(isa, n, k, block), storage)))
    epilogue = data.draw(st.sampled_from([Raw(), Activate("relu", made.input), Qkv(ISAS[isa].attention)]))
    kernel = LinearKernel(KernelSpec("linear", n, k, isa, epilogue.label, made, epilogue.residual), epilogue)
    check(kernel, epilogue, tokens, seed)


@pytest.mark.parametrize("isa", LEVELS)
@settings(DRAWN, max_examples=4)
@given(data=st.data(), seed=SEEDS)
def test_every_candidate_of_attention_computes_the_same(isa: str, data: st.DataObject, seed: int) -> None:
    heads, channels, longest = 2, 16, 40
    made = data.draw(st.sampled_from(attention_candidates(Workload("attention", heads, channels, isa))))
    check_attention(isa, (heads, channels, longest, "columns", made), [1, 17, 3, 16, 39, 40], "random", 3.0, seed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [96, 768, 2304, 3072])
def test_the_default_is_a_candidate(isa: str, n: int) -> None:
    for block in (None, *BLOCKS):
        storage = dense(ISAS[isa]) if block is None else sparse_storage(block, ISAS[isa])
        assert storage is not None
        made = decide_linear(storage, n, 768, 20 if block else 100, ISAS[isa])
        assert made in candidates(workload(isa, n, 768, block), storage)
    for channels in (4, 8, 32, 64):
        own = Workload("attention", 12, channels, isa)
        assert decide_attention(channels, ISAS[isa]) in attention_candidates(own)


@pytest.mark.parametrize("isa", ISAS)
def test_storages_include_what_a_plan_chooses_and_only_what_divides(isa: str) -> None:
    for block in FOUND:
        ways = storages(96, 64, block, ISAS[isa])
        assert len(set(ways)) == len(ways) > 0
        assert any(way.block is None for way in ways)
        for way in ways:
            assert way.block is None or (96 % way.block[0], 64 % way.block[1]) == (0, 0)
    columns = Storage("gather", (4, 1))
    assert columns in storages(96, 64, (16, 4), ISAS[isa])
    assert (columns in storages(96, 64, None, ISAS[isa])) == (isa in ("avx2", "avx512"))  # the one way to multiply bytes there
    assert columns not in storages(96, 1 << 16, (16, 4), ISAS[isa])  # of which 16 bits do not count the columns


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512vnni"])
def test_equal_packing_means_equal_arrays(isa: str) -> None:
    """So that decisions of one kernel for different numbers of tokens can share weights."""
    n, k, random = 96, 64, np.random.default_rng(0)
    weight = (random.integers(-127, 128, (n, k)) * (random.random((n, k)) < 0.3)).astype(np.int8)
    for block in (None, (4, 1), (1, 4)):
        for storage in storages(n, k, block, ISAS[isa]):
            found: dict[object, dict[str, np.ndarray]] = {}
            for made in candidates(workload(isa, n, k, block), storage):
                arrays = pack_linear(made, weight).arguments()
                known = found.setdefault(made.packing, arrays)
                for name, array in arrays.items():
                    np.testing.assert_array_equal(array, known[name])


def test_tables_name_fields() -> None:
    named = {name for table in LINEAR.values() for name in table}
    assert named | {"storage", "extra"} == {field.name for field in fields(LinearDecisions)}
    assert set(ATTENTION) | {"operands"} == {field.name for field in fields(AttentionDecisions)}


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("block", [(4, 1), (1, 4), (16, 4), None])
def test_buckets_of_tokens_compute_the_same_from_the_same_weights(isa: str, block: tuple[int, int] | None) -> None:
    """Below, at and above each border; each bucket does something else than the others."""
    n, k = 96, 64
    storage = dense(ISAS[isa]) if block is None else sparse_storage(block, ISAS[isa])
    assert storage is not None
    default = decide_linear(storage, n, k, 50, ISAS[isa])
    others = [made for made in candidates(workload(isa, n, k, block), storage) if made.packing == default.packing]
    spread = [made for made in (others[0], others[len(others) // 2]) if made != default]
    buckets = tuple(TokenBucket(groups, made) for groups, made in zip((1, 4), spread, strict=False))
    epilogue = Activate("relu", default.input)
    for own in (Raw(), epilogue):
        spec = KernelSpec("linear", n, k, isa, own.label, default, own.residual, buckets)
        kernel = LinearKernel(spec, own)
        for tokens in (1, 16, 17, 64, 65, 200):
            check(kernel, own, tokens, tokens)


def test_buckets_must_ascend_and_share_a_packing() -> None:
    made = decide_linear(Storage("gather", (4, 1)), 96, 64, 20, ISAS["avx512vnni"])
    spec = KernelSpec("linear", 96, 64, "avx512vnni", "raw", made)
    few = TokenBucket(1, replace(made, chunks=1))
    for buckets in ((few, few), (TokenBucket(0, made),), (TokenBucket(2, made), few)):
        with pytest.raises(ScheduleMismatch, match="positive and ascend"):
            linear(replace(spec, buckets=buckets), Raw())
    with pytest.raises(ScheduleMismatch, match="96x64: the decisions for up to 1 token groups pack weights otherwise"):
        linear(replace(spec, buckets=(TokenBucket(1, replace(made, together=1, token_tiles=(1,))),)), Raw())
    assert replace(spec, buckets=(few,)).key() != spec.key()
    assert "up to 16 tokens: family=gather" in replace(spec, buckets=(few,)).schedule
