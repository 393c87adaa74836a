"""Checks `tilewright check-hardware --model` on this CPU: predicted beside measured time of whole encoders.

    python -m benchmarks.predictions

The encoders have sizes, a sparsity and shapes to which the rates (benchmarks.rates) were not fitted. Predictions are made
at the clock measured in the same turn; measured is the least time of whole calls of the engine, as rates are of the least.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels import parse_block
from benchmarks.machine import machine
from benchmarks.peak import clock
from benchmarks.random_encoder import WORDS, compiled
from tilewright.baseline import time_in_turns
from tilewright.commands.output import block_name
from tilewright.cpu import cpu_features
from tilewright.hardware import detect
from tilewright.measure import random_ids
from tilewright.predict import Sizes, predict
from tilewright.schedules import rates
from tilewright.schedules.isa import resolve

CHECKED = (Sizes("distilbert", 6, 768, 12, 3072), Sizes("minilm-l6", 6, 384, 12, 1536))


@dataclass(frozen=True)
class Check:
    """One encoder's time as predicted and as measured, whole calls of the engine, in milliseconds."""

    model: str
    level: str
    shape: str
    block: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1


def check(args: argparse.Namespace) -> list[Check]:
    """Predicted and measured time of every size, level, shape and block."""
    found = []
    blocks = [parse_block(name) for name in args.blocks]
    for sizes, name in itertools.product(CHECKED, args.levels):
        isa = resolve(name, cpu_features())
        known = rates.find(isa.name, detect().llvm_cpu)
        if known is None:
            sys.exit(f"no rates for {isa.name}; run: python -m benchmarks.rates")
        engines = {block: compiled(sizes, isa, block, args.sparsity if block else 0.0) for block in blocks}
        for shape in args.shapes:
            batch, length = map(int, shape.split("x"))
            ids = random_ids(WORDS, batch, length)
            calls = {block_name(block): functools.partial(engine, ids) for block, engine in engines.items()}
            before = clock()
            samples = time_in_turns(calls, args.seconds)
            ghz = (before + clock()) / 2
            for block in blocks:
                made = predict(sizes, isa, known, block, args.sparsity, batch=batch, seq_len=length, ghz=ghz)
                assert made is not None
                measured = min(samples[block_name(block)]) * 1e3
                found.append(Check(sizes.name, isa.name, shape, block_name(block), made.milliseconds, measured))
    return found


def in_order(checks: Sequence[Check]) -> tuple[int, int]:
    """Pairs of blocks whose measured times differ by more than a tenth: how many are predicted in their order, of all."""
    pairs = [
        (a, b)
        for a, b in itertools.combinations(checks, 2)
        if (a.model, a.level, a.shape) == (b.model, b.level, b.shape) and abs(a.measured / b.measured - 1) > 0.1
    ]
    return sum((a.predicted < b.predicted) == (a.measured < b.measured) for a, b in pairs), len(pairs)


def markdown(checks: Sequence[Check]) -> str:
    """A row for each size, level and shape, a column for each block, and how far off they are."""
    blocks = list(dict.fromkeys(check.block for check in checks))
    lines = ["Predicted / least measured milliseconds of whole encoders, one thread.", ""]
    lines += ["| model | level | shape | " + " | ".join(blocks) + " |", "|---" * (3 + len(blocks)) + "|"]
    for key in dict.fromkeys((check.model, check.level, check.shape) for check in checks):
        own = [check for check in checks if (check.model, check.level, check.shape) == key]
        cells = (f"{check.predicted:.2f} / {check.measured:.2f} ({check.error:+.0%})" for check in own)
        lines.append("| " + " | ".join((*key, *cells)) + " |")
    errors = sorted(abs(check.error) for check in checks)
    right, pairs = in_order(checks)
    lines += ["", f"Error: median {statistics.median(errors):.1%}, largest {errors[-1]:.1%}."]
    lines.append(f"Of {pairs} pairs of blocks that differ by more than 10 %, {right} are predicted in the right order.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", default=["avx2", "native"])
    parser.add_argument("--blocks", nargs="+", default=["dense", "4x1", "4x4", "16x4", "32x4"])
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--shapes", nargs="+", default=["1x32", "1x128", "1x384", "8x128"])
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each engine and shape")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    checks = check(args)
    print("\n".join(f"- {key}: {value}" for key, value in machine().items()) + "\n\n" + markdown(checks))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "checks": [dataclasses.asdict(c) for c in checks]}, indent=2))


if __name__ == "__main__":
    main()
