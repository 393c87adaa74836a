"""Exact byte coding of float tables that were bytes once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class CodedTable:
    """A float32 table as codes u8 of its shape: value = (code - zero) * step in float32, with grid f32[2] = (step, zero)."""

    codes: NDArray[np.uint8]
    grid: NDArray[np.float32]


def code_table(table: NDArray[np.float32]) -> CodedTable | None:
    """`table` as bytes if every value is regained bit for bit, else None.

    The embedding table of a quantised checkpoint is such a table: its step is the smallest magnitude in it, since a grid of
    256 values rarely leaves out the ones next to zero; where it does, the check fails and the table stays float32.
    """
    magnitudes = np.abs(table)
    step = magnitudes[magnitudes > 0].min(initial=np.inf)
    if not np.isfinite(step) or magnitudes.max() / step > 255.5:
        return None
    steps = np.rint(table / step)
    low = steps.min()
    if steps.max() - low > 255 or not np.array_equal(steps * step, table):
        return None
    return CodedTable((steps - low).astype(np.uint8), np.array([step, -low], np.float32))
