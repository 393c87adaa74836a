"""The most that this core can multiply, by the loops of `tilewright.tuning.peak`.

python -m benchmarks.peak
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import tvm

from tilewright.cpu import cpu_features
from tilewright.tuning.peak import Loop, Meter
from tilewright.tuning.probe import build_probe


@cache
def _meter() -> Meter:
    with tempfile.TemporaryDirectory() as scratch:
        return Meter(tvm.runtime.load_module(str(build_probe(Path(scratch)))), tvm.cpu(), cpu_features())


def available() -> tuple[Loop, ...]:
    """The loops that this CPU can run."""
    return _meter().available()


def rate(loop: Loop, seconds: float = 0.004) -> float:
    """As `Meter.rate`."""
    return _meter().rate(loop, seconds)


def peak(isa: str, seconds: float = 0.004) -> float:
    """As `Meter.peak`."""
    return _meter().peak(isa, seconds)


def clock(seconds: float = 0.004) -> float:
    """As `Meter.clock`."""
    return _meter().clock(seconds)


def main() -> None:
    ghz = clock(0.1)
    print(f"clock {ghz:.2f} GHz\n\n| loop | level | GMAC/s | MACs/cycle |\n|---|---|--:|--:|")
    for loop in available():
        found = rate(loop, 0.1)
        print(f"| {loop.name} | {loop.isa} | {found:.1f} | {found / ghz:.1f} |")


if __name__ == "__main__":
    main()
