"""Integer sums of every linear kernel, bit for bit those of NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.kernel_harness import (
    EXAMPLES,
    FAMILIES,
    LINEAR_LEVELS,
    Array,
    from_groups,
    group_shape,
    level,
    linear_cases,
    linear_kernel,
    product,
    round_up,
)
from tilewright.codegen.decisions import FAMILY_LANES
from tilewright.codegen.epilogues import Raw
from tilewright.errors import ScheduleMismatch
from tilewright.schedules.isa import ISAS

# K = 60 is no multiple of 16, and 50 none of 4; 20 leaves a single group of columns, and an odd number of (1, 4) blocks
SIZES = [(96, 60), (192, 768)]
MORE = [
    ("gather", (4, 1), 4, 50),
    ("row", (16, 4), 64, 64),
    ("row", None, 96, 20),
    ("row", None, 80, 64),
    ("column", (1, 4), 3, 4),
    ("column", (1, 4), 8, 20),
    ("column", (1, 8), 6, 24),
]
PARAMETERS = [level(isa, *case, *size) for isa in ISAS for case in linear_cases(isa) for size in SIZES]
PARAMETERS += [level(isa, *case) for isa in ISAS for case in MORE]
TOKENS = st.one_of(st.sampled_from([1, 15, 16, 17, 400]), st.integers(1, 400))
MASKS = ("none", "one block", "tiny", "fifth", "all", "uneven", "empty rows", "one full row")
VALUES = ("random", "highest", "lowest", "zero activations", "alternating")


def keep(random: np.random.Generator, kind: str, rows: int, columns: int) -> NDArray[np.bool_]:
    """Which blocks of a [rows, columns] grid hold values."""
    if kind == "uneven":
        share = np.linspace(0, 1, rows)[random.permutation(rows)]
        return random.random((rows, columns)) < share[:, None]
    share = {"none": 0.0, "one block": 0.0, "tiny": 0.02, "fifth": 0.2, "all": 1.0, "empty rows": 0.3, "one full row": 0.0}
    mask = random.random((rows, columns)) < share[kind]
    if kind == "one block":
        mask[random.integers(rows), random.integers(columns)] = True
    if kind == "empty rows":
        mask[random.random(rows) < 0.5] = False
        mask[[0, -1]] = False
    if kind == "one full row":
        mask[random.integers(rows)] = True
    return mask


def draw_weight(random: np.random.Generator, kind: str, values: str, n: int, k: int, block: tuple[int, int]) -> Array:
    weight = random.integers(-127, 128, (n, k))
    if values in ("highest", "zero activations"):
        weight[:] = 127
    elif values == "lowest":
        weight[:] = -127
    elif values == "alternating":
        weight = np.where(np.arange(k) % 2, 127, -127) + np.zeros((n, 1), int)
    mask = keep(random, kind, n // block[0], k // block[1])
    return (weight * np.kron(mask, np.ones(block, int))).astype(np.int8)


def draw_activations(random: np.random.Generator, values: str, tokens: int, k: int) -> NDArray[np.uint8]:
    if values in ("highest", "lowest"):
        return np.full((tokens, k), 255, np.uint8)
    if values == "zero activations":
        return np.zeros((tokens, k), np.uint8)
    if values == "alternating":
        return np.where((np.arange(k) + np.arange(tokens)[:, None]) % 2, 255, 0).astype(np.uint8)
    return random.integers(0, 256, (tokens, k)).astype(np.uint8)


def check(isa: str, family, block, n: int, k: int, tokens: int, mask: str, values: str, seed: int, **decided: object) -> None:
    kernel = linear_kernel(isa, family, block, n, k, Raw(), **decided)
    random = np.random.default_rng(seed)
    weight = draw_weight(random, mask, values, n, k, block or (1, 1))
    x = draw_activations(random, values, round_up(tokens), k)
    fold = random.integers(-(2**20), 2**20, n).astype(np.int32)
    unused = np.full(n, np.nan, np.float32)
    layout = FAMILY_LANES[family]
    inputs = kernel.arrays(x, weight, fold=fold, scale=unused, bias=unused)
    sums = kernel(inputs, {"sums": group_shape(len(x), n, layout)})["sums"]
    np.testing.assert_array_equal(from_groups(sums, layout), product(x, weight) + fold)


@pytest.mark.parametrize(("isa", "family", "block", "n", "k"), PARAMETERS)
@EXAMPLES
@given(tokens=TOKENS, mask=st.sampled_from(MASKS), values=st.sampled_from(VALUES), seed=st.integers(0, 2**32 - 1))
def test_sums_are_exact(isa: str, family, block, n: int, k: int, tokens: int, mask: str, values: str, seed: int) -> None:
    check(isa, family, block, n, k, tokens, mask, values, seed)


@pytest.mark.parametrize(
    ("isa", "n", "k"), [level(isa, *size) for isa in ("avx2", "avx512") for size in [*SIZES, (4, 50), (8, 20)]]
)
@EXAMPLES
@given(tokens=TOKENS, mask=st.sampled_from(MASKS), values=st.sampled_from(VALUES), seed=st.integers(0, 2**32 - 1))
def test_bytes_of_depth_2_are_exact(isa: str, n: int, k: int, tokens: int, mask: str, values: str, seed: int) -> None:
    """Eight columns an entry, their sums in 16 bits: of all groups, pairs of groups and the last group."""
    check(isa, "gather", (4, 1), n, k, tokens, mask, values, seed, depth=2)


@pytest.mark.parametrize("isa", [level("avx2"), level("avx512")])
@pytest.mark.parametrize("depth", [1, 2])
def test_activations_that_drive_every_lane_to_its_end(isa: str, depth: int) -> None:
    """255 where a weight is positive, or negative, for each output in turn: where a sum that overflowed would show."""
    n, k = 16, 96
    random = np.random.default_rng(0)
    kernel = linear_kernel(isa, "gather", (4, 1), n, k, Raw(), depth=depth)
    for weight in (random.choice([-127, 127], (n, k)), random.integers(-127, 128, (n, k))):
        x = np.concatenate([np.where(sign * weight > 0, 255, 0) for sign in (1, -1)]).astype(np.uint8)
        unused = np.zeros(n, np.float32)
        inputs = kernel.arrays(x, weight.astype(np.int8), fold=np.zeros(n, np.int32), scale=unused, bias=unused)
        sums = kernel(inputs, {"sums": group_shape(len(x), n, "columns")})["sums"]
        np.testing.assert_array_equal(from_groups(sums, "columns"), product(x, weight))


@pytest.mark.parametrize(
    ("isa", "family", "block", "n", "k"), [level(isa, *case, 768, 768) for isa in ISAS for case in FAMILIES]
)
def test_sums_of_a_real_size_are_exact(isa: str, family, block, n: int, k: int) -> None:
    for seed, (tokens, mask, values) in enumerate(
        [
            (1, "fifth", "random"),
            (128, "fifth", "random"),
            (17, "uneven", "random"),
            (33, "all", "highest"),
            (16, "none", "random"),
        ]
    ):
        check(isa, family, block, n, k, tokens, mask, values, seed)


@pytest.mark.parametrize(("isa", "family", "block", "n", "k"), [level(isa, *case, 96, 60) for isa in ISAS for case in FAMILIES])
def test_all_masks_and_values(isa: str, family, block, n: int, k: int) -> None:
    """Every combination once, so that none depends on the luck of the draw."""
    for mask in MASKS:
        for values in VALUES:
            check(isa, family, block, n, k, 17, mask, values, 0)


@pytest.mark.parametrize(("isa", "family", "block"), LINEAR_LEVELS)
def test_padding_entries_add_nothing(isa: str, family, block) -> None:
    """Entries that fill up a row-block point at channel 0, which here is as large as can be."""
    n, k = 96, 60
    kernel = linear_kernel(isa, family, block, n, k, Raw())
    bn, bk = block or (1, 1)
    x = np.zeros((16, k), np.uint8)
    x[:, :4] = 255
    layout = FAMILY_LANES[family]
    for count in range(1, 8):  # blocks of a row-block: every remainder of the packing
        mask = np.zeros((n // bn, k // bk), np.int8)
        mask[:, -count:] = 1
        weight = np.kron(mask, np.full((bn, bk), 127, np.int8))
        unused = np.zeros(n, np.float32)
        inputs = kernel.arrays(x, weight, fold=np.zeros(n, np.int32), scale=unused, bias=unused)
        sums = kernel(inputs, {"sums": group_shape(16, n, layout)})["sums"]
        np.testing.assert_array_equal(from_groups(sums, layout), product(x, weight))


@pytest.mark.parametrize("isa", ["avx2", "avx512vnni"])
def test_row_blocks_narrower_than_a_vector_are_refused(isa: str) -> None:
    with pytest.raises(ScheduleMismatch, match=r"row kernel of 64x64 on \w+ got a row-block of 4 outputs; .* multiple of"):
        linear_kernel(isa, "row", (4, 4), 64, 64, Raw())
