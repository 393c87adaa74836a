"""What paired samples say about a ratio: its median, and an interval that no outlier moves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Gain:
    """How many times faster: the median of paired ratios, and the interval that holds it with 95 % confidence."""

    median: float
    low: float
    high: float


def gain(default: Sequence[float], best: Sequence[float]) -> Gain:
    """The gain of `best` over `default`, seconds that were taken in turns.

    The interval is that between two order statistics of the ratios (the sign test's): it assumes no distribution. Fewer than
    six pairs have none and reach from 0 to infinity.
    """
    ratios = sorted(old / new for old, new in zip(default, best, strict=True))
    if (left := _outside(len(ratios))) is None:
        return Gain(statistics.median(ratios) if ratios else 1.0, 0.0, float("inf"))
    return Gain(statistics.median(ratios), ratios[left], ratios[-1 - left])


@cache
def _outside(count: int) -> int | None:
    """How many of `count` sorted ratios may be left out at each end; None if even all of them hold the median too seldom."""
    tail, allowed = 0, (1 - CONFIDENCE) / 2 * 2**count
    for left in range(count // 2 + 1):
        tail += comb(count, left)
        if tail > allowed:
            return left - 1 if left else None
    return None
