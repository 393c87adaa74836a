"""Packed weights hold the matrix: unpacked by the definition of each layout, they give it back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kernel_harness import EXAMPLES, FAMILIES, Array
from tilewright.codegen.decisions import LinearDecisions, Storage
from tilewright.codegen.formats import PAIRS, QUADS, Operands
from tilewright.codegen.kernels.linear import INDEX_BYTES
from tilewright.codegen.packing import PackedLinear, pack_linear
from tilewright.errors import InvalidModel, UnsupportedModel

TILES = [("tile_column", (16, 4)), ("tile_column", (32, 4))]
CASES = [*FAMILIES, *TILES, ("row", (32, 4)), ("gather", (16, 1)), ("column", (1, 4)), ("column", (8, 4))]
OPERANDS = {"pairs": PAIRS, "quads": QUADS}


def decided(family, block, operands: Operands, n: int = 16) -> LinearDecisions:
    """Single outputs are finished a pack at a time, where that divides them, and summed apart where a pack has four bytes."""
    width, single = (16 if block is None else block[0]), family == "column" and block[0] == 1
    at_once = operands.pack if single and n % operands.pack == 0 else 1
    partial_sums = 2 if single and operands.pack == 4 else 1
    return LinearDecisions(Storage(family, block), operands, width, rows_at_once=at_once, partial_sums=partial_sums)


def row_units(operands: Operands) -> int:
    """INDEX_BYTES units from one channel of a group, 16 tokens, to the next: what gather's indices count in."""
    return 16 * np.dtype(operands.activation).itemsize // INDEX_BYTES


def unpack(own: LinearDecisions, packed: PackedLinear, n: int, k: int) -> Array:
    """The dense matrix, entry by entry."""
    dense = np.zeros((n, k), np.int64)
    pack = own.operands.pack
    if own.block is None:
        blocks, entries, one, width, inner = packed.weight.shape
        assert (blocks * width, entries * inner, one, inner) == (n, k, 1, pack)
        return packed.weight[:, :, 0].transpose(0, 2, 1, 3).reshape(n, k)
    bn, bk = own.block
    assert packed.index is not None
    assert packed.indptr is not None
    assert packed.indptr[0] == 0
    for row in range(n // bn):
        for entry in range(packed.indptr[row], packed.indptr[row + 1]):
            part = dense[row * bn : (row + 1) * bn]
            if own.family == "row":
                first = int(packed.index[entry]) * bk
                part[:, first : first + bk] += packed.weight[entry].transpose(1, 0, 2).reshape(bn, bk)
            elif own.family == "column":
                for place, block in enumerate(packed.index[entry]):
                    part[:, block * bk : (block + 1) * bk] += packed.weight[entry, place].reshape(bn, bk)
            elif own.family == "tile_column":
                for place, block in enumerate(packed.index[entry]):
                    part[:, block * bk : (block + 1) * bk] += packed.weight[entry, :, place]
            else:
                for p in range(pack):
                    part[:, packed.index[entry, p] // row_units(own.operands)] += packed.weight[entry, :, p]
    return dense


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize(("family", "block"), CASES)
@EXAMPLES
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 12),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(family, block, operands: str, rows: int, columns: int, density: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    held = OPERANDS[operands]
    bn, bk = block or (16, held.pack)
    n, k = rows * bn, columns * bk
    mask = random.random((rows, columns)) < density
    weight = (random.integers(-127, 128, (n, k)) * np.kron(mask, np.ones((bn, bk), int))).astype(np.int8)
    own = decided(family, block, held, n)
    packed = pack_linear(own, weight)
    np.testing.assert_array_equal(unpack(own, packed, n, k), weight)

    if block is None:
        assert packed.stored == n * k
        assert list(packed.arguments()) == ["weight"]
        return
    kept = weight.reshape(rows, bn, columns, bk).any(axis=(1, 3))
    assert packed.stored == kept.sum() * bn * bk
    assert list(packed.arguments()) == ["weight", "index", "indptr", "parts"]
    per_entry = {"gather": held.pack, "tile_column": 16, "column": 2 if bn == 1 and held.pack == 4 else 1}.get(family, 1)
    np.testing.assert_array_equal(np.diff(packed.indptr), -(-kept.sum(1) // per_entry))
    assert len(packed.weight) == len(packed.index) == max(1, packed.indptr[-1])
    units = row_units(held) if family == "gather" else 1
    assert (packed.index % units == 0).all()
    assert packed.index.max() < k // bk * units  # padding, too, points inside x


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize(("family", "block"), CASES)
def test_dtypes_are_those_the_kernels_declare(family, block, operands: str) -> None:
    held = OPERANDS[operands]
    packed = pack_linear(decided(family, block, held), np.ones((32, 32), np.int8))
    assert packed.weight.dtype == (np.int8 if family in ("row", "tile_column") else held.weight)
    assert packed.weight.flags.c_contiguous
    if block is not None:
        assert (packed.index.dtype, packed.indptr.dtype) == (np.uint16, np.int32)
        assert packed.index.flags.c_contiguous


@pytest.mark.parametrize(("family", "block"), [case for case in CASES if case[1]])
def test_an_empty_matrix_has_an_entry_to_point_at(family, block) -> None:
    packed = pack_linear(decided(family, block, PAIRS), np.zeros((32, 32), np.int8))
    assert packed.stored == 0
    assert len(packed.weight) == len(packed.index) == 1
    assert not packed.indptr.any()


def test_a_block_that_does_not_divide_the_matrix_is_refused() -> None:
    with pytest.raises(InvalidModel, match="matrix 24x32 is not a multiple of block 16x4"):
        pack_linear(decided("row", (16, 4), PAIRS), np.zeros((24, 32), np.int8))


@pytest.mark.parametrize("operands", OPERANDS)
def test_more_columns_than_an_index_holds_are_refused(operands: str) -> None:
    held = OPERANDS[operands]
    most = -(-(2**16) // row_units(held))
    own = decided("gather", (4, 1), held)
    weight = np.ones((4, most), np.int8)
    np.testing.assert_array_equal(unpack(own, pack_linear(own, weight), *weight.shape), weight)
    with pytest.raises(UnsupportedModel, match=f"linear 4x{most + 1}: {most + 1} inputs are more than a 16-bit index"):
        pack_linear(own, np.ones((4, most + 1), np.int8))


@EXAMPLES
@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=200))
def test_parts_are_of_equal_work(counts: list[int]) -> None:
    """Together all row-blocks in order, none more than a row-block away from an equal share."""
    weight = np.array([[column < count for column in range(12)] for count in counts], np.int8).repeat(4, 0)
    packed = pack_linear(decided("column", (4, 4), QUADS), weight.repeat(4, 1))
    assert (packed.parts[0], packed.parts[-1], packed.parts.dtype) == (0, len(counts), np.uint16)
    work = np.concatenate([[0], np.cumsum([count + 8 for count in counts])])  # an epilogue counts as 8 entries
    ideal = np.linspace(0, work[-1], len(packed.parts))
    assert (np.abs(work[packed.parts] - ideal) <= (max(counts) + 8) / 2 + 1e-6).all()


def test_single_outputs_are_stored_in_pairs_of_blocks() -> None:
    """Rows of no block, one, two and three: the second of a pair that is not full is block 0, without weight."""
    mask = np.array([[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1], [0, 1, 1, 1]])
    packed = pack_linear(decided("column", (1, 4), QUADS), np.kron(mask, np.arange(1, 5)).astype(np.int8))
    assert packed.stored == 24
    assert packed.indptr.tolist() == [0, 0, 1, 2, 4]
    assert packed.index.tolist() == [[2, 0], [1, 3], [1, 2], [3, 0]]
    full = [[1, 2, 3, 4]]
    assert packed.weight[:, :, 0].tolist() == [[full, [[0] * 4]], [full, full], [full, full], [full, [[0] * 4]]]
    single = pack_linear(decided("column", (1, 4), PAIRS), np.kron(mask, np.arange(1, 5)).astype(np.int8))
    assert single.indptr.tolist() == [0, 0, 1, 3, 6]


def test_parts_of_single_outputs_count_packs() -> None:
    """Kernels finish as many outputs together as make a pack, so no part may begin within one."""
    weight = np.kron(np.arange(24)[:, None] > np.arange(8)[None, :], np.ones((1, 4))).astype(np.int8)
    packed = pack_linear(decided("column", (1, 4), QUADS), weight)
    assert len(packed.indptr) == 25
    assert (packed.parts[0], packed.parts[-1]) == (0, 6)
    uneven = pack_linear(decided("column", (1, 4), QUADS, 3), weight[:3])  # three outputs make no pack
    assert uneven.parts[-1] == 3


def test_more_row_blocks_than_parts_can_name_are_refused() -> None:
    weight = np.zeros((2**16, 4), np.int8)
    with pytest.raises(UnsupportedModel, match="linear 65536x4: 65536 row-blocks are more than 16 bits count"):
        pack_linear(decided("column", (1, 4), QUADS), weight)
