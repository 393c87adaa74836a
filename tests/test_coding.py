"""Byte coding of embedding tables: exact or refused."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tilewright.codegen.coding import code_table


@given(st.integers(0, 255), st.floats(2**-20, 8.0, width=32), st.integers(0, 2**32 - 1))
def test_a_dequantised_table_is_regained_bit_for_bit(zero: int, scale: float, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 256, (40, 16))
    codes[0, :3] = zero, min(zero + 1, 255), max(zero - 1, 0)
    table = (codes - zero).astype(np.float32) * np.float32(scale)
    coded = code_table(table)
    assert coded is not None
    step, offset = coded.grid
    np.testing.assert_array_equal((coded.codes.astype(np.float32) - offset) * step, table)


def test_tables_that_were_never_bytes_are_refused() -> None:
    random = np.random.default_rng(0)
    assert code_table(random.standard_normal((40, 16)).astype(np.float32)) is None
    assert code_table(np.zeros((4, 16), np.float32)) is None
    table = random.integers(-127, 128, (40, 16)).astype(np.float32) * np.float32(0.1)
    table[3, 4] = np.nextafter(table[3, 4], np.float32(np.inf))
    assert code_table(table) is None
