import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tilewright.codegen.block_sparse import BLOCKS, BlockSparseMatrix, block_density, detect_block
from tilewright.errors import InvalidModel

SHAPES = st.sampled_from([*BLOCKS, (1, 1), (8, 1), (3, 5)])


@st.composite
def sparse_matrices(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int]]:
    (bn, bk) = block = draw(SHAPES)
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    keep = draw(arrays(np.bool_, (rows, columns)))
    values = draw(arrays(np.int8, (rows * bn, columns * bk), elements=st.integers(-127, 127)))
    return values * np.kron(keep, np.ones(block, np.int8)), block


@given(sparse_matrices())
def test_round_trip(case: tuple[np.ndarray, tuple[int, int]]) -> None:
    dense, block = case
    matrix = BlockSparseMatrix.from_dense(dense, block)
    assert matrix.indptr[0] == 0
    assert matrix.indptr[-1] == len(matrix.indices) == len(matrix.data)
    assert matrix.data.any(axis=(1, 2)).all()  # no stored block is zero
    assert matrix.density == block_density(dense, block)
    np.testing.assert_array_equal(matrix.to_dense(), dense)


def test_round_trip_of_nothing_and_of_everything() -> None:
    for dense in (np.zeros((8, 8), np.int8), np.full((8, 8), -127, np.int8)):
        matrix = BlockSparseMatrix.from_dense(dense, (4, 1))
        assert matrix.density == dense.any()
        np.testing.assert_array_equal(matrix.to_dense(), dense)


def test_a_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InvalidModel, match="6x8 is not a multiple of block 4x1"):
        BlockSparseMatrix.from_dense(np.zeros((6, 8), np.int8), (4, 1))
    assert block_density(np.zeros((6, 8), np.int8), (4, 1)) is None


@pytest.mark.parametrize("block", BLOCKS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), density=st.floats(0.05, 0.4), rounded_to_zero=st.booleans())
def test_detect_finds_the_pruned_block(block: tuple[int, int], seed: int, density: float, rounded_to_zero: bool) -> None:
    random = np.random.default_rng(seed)
    shape = (128, 128)
    blocks = shape[0] // block[0] * (shape[1] // block[1])
    keep = (random.permutation(blocks) < max(1, int(density * blocks))).reshape(shape[0] // block[0], -1)
    weight = random.integers(1, 128, shape) * random.choice([-1, 1], shape)
    if rounded_to_zero:
        weight[random.random(shape) < 0.1] = 0
    found = detect_block((weight * np.kron(keep, np.ones(block, np.int64))).astype(np.int8))
    assert found is not None
    # with few blocks, a larger shape may explain the zeros as well: it must then cover the pruned one's blocks
    assert found[0] % block[0] == 0
    assert found[1] % block[1] == 0


@pytest.mark.parametrize(("zeros", "found"), [(0.0, None), (0.3, None), (0.8, {(1, 4), (4, 1)})])
def test_detect_finds_in_unstructured_sparsity_what_chance_gives(zeros: float, found: set[tuple[int, int]] | None) -> None:
    """Blocks of four are all zero with probability zeros ** 4, of which 41 % is worth reporting and 0.8 % is not."""
    random = np.random.default_rng(1)
    weight = random.integers(1, 128, (256, 256)) * (random.random((256, 256)) >= zeros)
    block = detect_block(weight.astype(np.int8))
    assert block is None if found is None else block in found
