"""Parallel loops run every task once, whoever runs it: in pools of any size, in several at once, and when a worker stalls."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from tests.kernel_harness import LINEAR_LEVELS, from_groups, group_shape, linear_kernel, product
from tests.native import Library, Pool, aligned
from tilewright.codegen.build import build_library
from tilewright.codegen.decisions import FAMILY_LANES
from tilewright.codegen.epilogues import Raw
from tilewright.codegen.stealing import SPANS, steal_tasks
from tilewright.schedules.isa import ISAS

LENGTHS = (0, 1, 2, 3, 7, 64, SPANS - 1, SPANS, 2 * SPANS - 1, 2 * SPANS, 1000)
STALL = 200_000  # microseconds


@T.prim_func(s_tir=True)
def count(n: T.int32, m: T.int32, first: T.Buffer((1000,), "int32"), second: T.Buffer((1000, 3), "int32")) -> None:
    """Add 1 to n and m rows of two arrays, in a launch for each, the second by way of scratch that belongs to the task."""
    own = T.sblock_alloc_buffer((1000, 3), "int32")
    for i in T.parallel(n):
        with T.sblock("first"):
            v = T.axis.spatial(1000, i)
            first[v] = first[v] + 1
    for i in T.parallel(m):
        for j in range(3):
            with T.sblock("scratch"):
                v = T.axis.spatial(1000, i)
                w = T.axis.spatial(3, j)
                own[v, w] = second[v, w] + 1
        for j in range(3):
            with T.sblock("second"):
                v = T.axis.spatial(1000, i)
                w = T.axis.spatial(3, j)
                second[v, w] = own[v, w]


@T.prim_func(s_tir=True)
def stall(place: T.int32, threads_: T.handle) -> None:
    """Which thread runs each task; task `place` takes STALL."""
    n = T.int32()
    threads = T.match_buffer(threads_, (n,), "uint64")
    for i in T.parallel(n):
        with T.sblock("task"):
            v = T.axis.remap("S", [i])
            if v == place:
                T.evaluate(T.call_extern("int32", "usleep", T.int32(STALL)))
            threads[v] = T.call_extern("uint64", "pthread_self")


FUNCTIONS = {"count": count, "stall": stall}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both functions, as artifacts hold kernels: in a shared library."""
    path = tmp_path_factory.mktemp("stealing") / "library.so"
    functions = {name: steal_tasks(func) for name, func in FUNCTIONS.items()}
    build_library(tvm.IRModule(functions), ISAS["portable"].target(), path)
    return path


@pytest.fixture(scope="module")
def pools() -> dict[int, Pool]:
    return {size: Pool(size) for size in (1, 2, 3, 5)}


def check_counts(pool: Pool, path: Path, calls: int, lengths: Sequence[int]) -> None:
    """Call `count` for all pairs of lengths."""
    library = Library(path)
    rows = np.arange(1000)
    for n, m in itertools.product(lengths, repeat=2):
        first, second = np.zeros(1000, np.int32), np.arange(3000, dtype=np.int32).reshape(1000, 3)
        expected = second + calls * (rows < m)[:, None]
        for _ in range(calls):
            pool.call(library, "count", n, m, first, second)
        np.testing.assert_array_equal(first, calls * (rows < n))
        np.testing.assert_array_equal(second, expected)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_task_runs_once(library: Path, pools: dict[int, Pool], size: int) -> None:
    check_counts(pools[size], library, 5, LENGTHS)


def test_pools_that_run_the_same_code_do_not_share_tasks(library: Path) -> None:
    pools = [Pool(size) for size in (2, 2, 3)]
    with ThreadPoolExecutor(len(pools)) as callers:
        for job in [callers.submit(check_counts, pool, library, 50, (3, 64, 1000)) for pool in pools]:
            job.result()


@pytest.mark.parametrize("place", [0, 32])
def test_a_worker_that_stalls_at_the_first_task_of_its_share_leaves_the_rest_to_others(
    library: Path, pools: dict[int, Pool], place: int
) -> None:
    threads = np.zeros(64, np.uint64)
    pools[2].call(Library(library), "stall", place, threads)
    assert len(set(threads[place : place + 32])) == 2  # TVM's own split would give all of them to one


def test_a_claim_is_an_instruction_and_no_function(library: Path) -> None:
    symbols = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    assert "__tvm_ffi_count" in symbols
    assert not {"tilewright_claim", "tilewright_is_free"} & set(symbols.split())
    assembly = linear_kernel("portable", "row", None, 64, 64, Raw()).assembly
    assert re.search(r"\bxchgb\b", assembly)
    assert "tilewright_claim" not in assembly


@pytest.mark.parametrize(("isa", "family", "block"), LINEAR_LEVELS)
def test_the_number_of_threads_does_not_change_sums(pools: dict[int, Pool], tmp_path: Path, isa: str, family, block) -> None:
    """Of tokens for all nests of the kernel, and for some of them."""
    n, k = 192, 768
    kernel, layout = linear_kernel(isa, family, block, n, k, Raw()), FAMILY_LANES[family]
    random = np.random.default_rng(0)
    mask = np.kron(random.random((n // block[0], k // block[1])) < 0.2, np.ones(block, int)) if block else 1
    weight = (random.integers(-127, 128, (n, k)) * mask).astype(np.int8)
    fold, unused = random.integers(-(2**20), 2**20, n).astype(np.int32), np.full(n, np.nan, np.float32)
    build_library(tvm.IRModule({"main": kernel.scheduled}), ISAS[isa].target(), tmp_path / "kernel.so")
    library = Library(tmp_path / "kernel.so")
    for tokens in (16, 64, 16 * 29):
        x = random.integers(0, 256, (tokens, k)).astype(np.uint8)
        inputs = kernel.arrays(x, weight, fold=fold, scale=unused, bias=unused)
        for pool in pools.values():
            sums = aligned(np.full(group_shape(tokens, n, layout), 0x55555555, np.int32))
            values = inputs | {"sums": sums}
            arguments = [values[name] if name == "sums" else aligned(values[name]) for name in kernel.arguments]
            pool.call(library, "main", *arguments)
            np.testing.assert_array_equal(from_groups(sums, layout), product(x, weight) + fold)
