"""Linear kernels on one thread: GMAC/s on non-zeros, beside this core's own peak in the same turn, and beside dense.

    python -m benchmarks.kernels                                       # the grid of docs/benchmarks.md, avx2 and native
    python -m benchmarks.kernels --levels avx2 --blocks 4x1 16x4 dense --shapes 768x768 --tokens 64 128 --sparsity .7 .8 .9
    python -m benchmarks.kernels --uneven                              # equal non-zeros, spread unevenly over the outputs
    python -m benchmarks.kernels --grid paper --blocks 4x1             # dense-equivalent GOPS over shapes and tokens

Kernels are compiled as the compiler does, with their packed weights and an epilogue. All kernels of a shape and the peak
loop (benchmarks.peak) take turns over several rounds; a figure is the median of its rounds. Weights are warm.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.linear_kernel import EPILOGUES, Case, Result, measure
from benchmarks.machine import machine
from tilewright.codegen.decisions import Block
from tilewright.codegen.workload import GROUP
from tilewright.commands.output import block_name, progress_bar
from tilewright.cpu import cpu_features
from tilewright.schedules.isa import resolve

WORTH_IT = 0.6  # share of zero blocks above which a sparse kernel may not be slower than dense

DEFAULT: dict[str, Any] = {
    "shapes": [f"{n}x{k}" for h in (768, 384, 1024) for n, k in ((h, h), (h, 4 * h), (4 * h, h))],
    "blocks": ["1x4", "4x1", "4x4", "8x1", "16x1", "16x4", "32x4", "8x2", "dense"],
    "tokens": [128],
    "sparsity": [0.8],
}
PAPER: dict[str, Any] = {
    "shapes": [f"{n}x{k}" for h in (256, 768, 1024) for n, k in ((h, h), (h, 4 * h), (4 * h, h))],
    "blocks": ["4x1"],
    "tokens": [16, 32, 48, 64, 80, 96, 112, 128, 256, 384, 512],
    "sparsity": [0.7, 0.8, 0.9],
}
"""The grid of kernel measurements published with arXiv 2211.07715's engine: M x K is out x in, N is tokens."""


def grid(args: argparse.Namespace) -> Iterator[list[Case]]:
    """The cases of one shape after the other; blocks that do not divide a shape are left out."""
    levels = list(dict.fromkeys(resolve(level, cpu_features()).name for level in args.levels))
    blocks = [parse_block(name) for name in args.blocks if name != "dense" or not args.uneven]
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        fitting = [block for block in blocks if block is None or not (n % block[0] or k % block[1])]
        spreads = ("even", "uneven") if args.uneven else ("random",)
        yield [
            Case(level, (n, k), block, tokens, sparsity if block else 0.0, spread if block else "even")
            for level, tokens, block in itertools.product(levels, args.tokens, fitting)
            for sparsity, spread in itertools.product(args.sparsity, spreads)
            if block or (sparsity, spread) == (args.sparsity[0], spreads[0])  # a dense kernel is measured once
        ]


def parse_block(name: str) -> Block | None:
    """(4, 1) for 4x1, None for dense."""
    if name == "dense":
        return None
    outputs, inputs = map(int, name.split("x"))
    return outputs, inputs


def markdown(about: dict[str, str], results: Sequence[Result], args: argparse.Namespace) -> str:
    """One table for each level: a row for each shape and number of tokens, a column for each block and share of zeros."""
    if args.uneven:
        meaning = "Time with unevenly spread non-zeros over time with equally many in every row-block."
    elif args.grid == "paper":
        meaning = "Dense-equivalent GOPS (2 N K T / time) and, in brackets, GMAC/s on non-zeros in % of the same turn's peak."
    else:
        meaning = (
            "GMAC/s on non-zeros in % of the same turn's peak and, in brackets, speed over the dense kernel; "
            f"`!`: slower than dense above {WORTH_IT:.0%} zeros."
        )
    lines = [*(f"- {key}: {value}" for key, value in about.items()), "", meaning]
    for level in dict.fromkeys(result.case.level for result in results):
        own = [result for result in results if result.case.level == level]
        most = statistics.median(100 * result.gmacs / result.peak for result in own)
        columns = list(dict.fromkeys((result.case.block, result.case.sparsity) for result in own))
        heads = (block_name(block) if block is None else f"{block_name(block)} {zeros:.0%}" for block, zeros in columns)
        lines += ["", f"### {level}: peak {most:.0f} GMAC/s, epilogue {args.epilogue}", ""]
        lines += [f"| N x K | tokens | {' | '.join(heads)} |", "|---|--:" + "|--:" * len(columns) + "|"]
        for shape, tokens in dict.fromkeys((result.case.shape, result.case.tokens) for result in own):
            cells = {
                (result.case.block, result.case.sparsity): _cell(result, args)
                for result in own
                if (result.case.shape, result.case.tokens) == (shape, tokens)
            }
            row = " | ".join(cells.get(column, "") for column in columns)
            lines.append(f"| {block_name(shape)} | {tokens} | {row} |")
    return "\n".join(lines) + "\n"


def _cell(result: Result, args: argparse.Namespace) -> str:
    if args.uneven:
        return "" if result.uneven is None else f"{result.uneven:.2f}"
    if args.grid == "paper":
        return f"{result.gops:.0f} ({result.peak:.0f})"
    if result.speedup is None:
        return f"{result.peak:.0f}"
    slower = result.case.sparsity > WORTH_IT and result.speedup < 1
    return f"{result.peak:.0f} ({result.speedup:.2f}{'!' if slower else ''})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=("default", "paper"), default="default", help="what the lists default to")
    parser.add_argument("--levels", nargs="+", default=["avx2", "native"])
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help="outputs x inputs")
    parser.add_argument("--blocks", nargs="+", metavar="BLOCK", help="such as 4x1, 16x4 or dense")
    parser.add_argument("--tokens", nargs="+", type=int, help=f"multiples of {GROUP}")
    parser.add_argument("--sparsity", nargs="+", type=float, help="shares of zero blocks")
    parser.add_argument("--epilogue", choices=EPILOGUES, default="relu")
    parser.add_argument("--uneven", action="store_true", help="compare unevenly spread non-zeros with even ones")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name, value in (PAPER if args.grid == "paper" else DEFAULT).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    os.environ["TVM_NUM_THREADS"] = "1"  # TVM reads it when first it runs a parallel loop
    about, results = machine(), []
    with progress_bar("shapes") as progress:
        for done, cases in enumerate(grid(args)):
            progress(done, len(args.shapes))
            results += measure(cases, args.epilogue, args.rounds)
    print(markdown(about, results, args))
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        report = {"machine": about, "settings": settings, "results": [asdict(result) for result in results]}
        args.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
