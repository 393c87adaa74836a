"""Linear kernels without VNNI on bytes beside the same on 16-bit pairs: (4, 1) blocks, and dense matrices.

    python -m benchmarks.operands                         # level avx2
    python -m benchmarks.operands --levels avx2 avx512 --json out.json
    python -m benchmarks.operands --encoder               # whole DistilBERT and MiniLM, 80 % of (4, 1) blocks zero and dense

Both kernels of a shape run in turns in one process, one thread, epilogue relu. The byte kernels store dense matrices as
columns, as the level does where that is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import tilewright
from benchmarks.linear_kernel import Builder, Case
from benchmarks.machine import machine
from benchmarks.random_encoder import WORDS as WORDS_IN_VOCABULARY
from benchmarks.random_encoder import compiled
from tilewright.codegen.formats import PAIRS
from tilewright.commands.output import block_name, progress_bar
from tilewright.measure import random_ids
from tilewright.predict import Sizes
from tilewright.schedules.blocks import COLUMNS, DENSE
from tilewright.schedules.intrinsics import INTRINSICS
from tilewright.schedules.isa import ISAS, Isa

SHAPES = (
    (256, 256), (256, 1024), (1024, 256), (768, 768), (768, 3072), (3072, 768), (1024, 1024), (1024, 4096), (4096, 1024),
)  # fmt: skip
ENCODERS = (Sizes("distilbert", 6, 768, 12, 3072), Sizes("minilm-l6", 6, 384, 12, 1536))
WORDS: dict[str, Any] = {"operands": PAIRS, "together": 1, "token_tiles": (1,), "depth": 0, "halves": False}


@dataclass(frozen=True)
class Row:
    """Medians over the rounds; ratio: of the time on bytes to that on pairs, the median of the rounds' ratios.

    gmacs: of the byte kernel on non-zeros.
    """

    level: str
    shape: str
    zeros: float
    tokens: int
    pairs_us: float
    bytes_us: float
    gmacs: float
    ratio: float


def measure(case: Case, rounds: int) -> Row:
    builder = Builder("relu")
    sparse = case.block is not None
    pairs = builder.runner(case, COLUMNS if sparse else DENSE, **(WORDS if sparse else {}))
    narrow = builder.runner(case, COLUMNS)
    for _ in range(rounds + 1):
        pairs.turn()
        narrow.turn()
    del pairs.seconds[0], narrow.seconds[0]
    ratios = [b / a for a, b in zip(pairs.seconds, narrow.seconds, strict=True)]
    median = statistics.median(narrow.seconds)
    return Row(
        case.level, block_name(case.shape), case.sparsity if sparse else 0.0, case.tokens,
        statistics.median(pairs.seconds) * 1e6, median * 1e6, narrow.macs / median / 1e9, statistics.median(ratios),
    )  # fmt: skip


def encoders(isa: Isa, sizes: Sizes, sparsity: float) -> tuple[tilewright.Engine, tilewright.Engine]:
    """The encoder on 16-bit pairs, made as if the level had no products of bytes, and on bytes."""
    block = (4, 1) if sparsity else None
    narrow = {name: spec for name, spec in INTRINSICS.items() if spec.budget is not None}
    for name in narrow:
        del INTRINSICS[name]
    try:
        pairs = compiled(sizes, isa, block, sparsity)
    finally:
        INTRINSICS.update(narrow)
    return pairs, compiled(sizes, isa, block, sparsity)


def measure_encoder(engines: tuple[tilewright.Engine, tilewright.Engine], batch: int, length: int, rounds: int) -> list[float]:
    """Milliseconds on pairs and on bytes, and the ratio: medians over rounds of the least of three calls each, in turns."""
    ids = random_ids(WORDS_IN_VOCABULARY, batch, length)
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for engine, found in zip(engines, times, strict=True):
            calls = []
            for _ in range(3):
                start = time.perf_counter()
                engine(ids)
                calls.append(time.perf_counter() - start)
            found.append(min(calls) * 1e3)
    pairs, narrow = (found[1:] for found in times)
    ratios = [b / a for a, b in zip(pairs, narrow, strict=True)]
    return [statistics.median(pairs), statistics.median(narrow), statistics.median(ratios)]


def compare_encoders(level: str, rounds: int) -> None:
    """Print a table of whole encoders."""
    print("| encoder | zeros | shape | pairs ms | bytes ms | bytes / pairs |\n|---|--:|---|--:|--:|--:|")
    for sizes, sparsity in product(ENCODERS, (0.8, 0.0)):
        engines = encoders(ISAS[level], sizes, sparsity)
        for batch, length in ((1, 32), (1, 128), (1, 384), (8, 128)):
            pairs, narrow, ratio = measure_encoder(engines, batch, length, rounds)
            print(
                f"| {sizes.name} | {sparsity:.0%} | {batch}x{length} | {pairs:.2f} | {narrow:.2f} | {ratio:.2f} |", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", choices=("avx2", "avx512"), default=["avx2"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--encoder", action="store_true", help="whole encoders instead of kernels, at the first level")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = "1"  # TVM reads it when first it runs a parallel loop
    if args.encoder:
        compare_encoders(args.levels[0], args.rounds)
        return
    cases = [
        Case(level, shape, block, tokens, 0.8, "random")
        for level, block, shape, tokens in product(args.levels, ((4, 1), None), SHAPES, args.tokens)
    ]
    rows = []
    with progress_bar("kernels") as progress:
        for done, case in enumerate(cases):
            progress(done, len(cases))
            rows.append(measure(case, args.rounds))
    about = machine()
    print("\n".join(f"- {key}: {value}" for key, value in about.items()))
    print(
        "\n| level | N x K | zeros | tokens | pairs us | bytes us | GMAC/s | bytes / pairs |\n|---|---|--:|--:|--:|--:|--:|--:|"
    )
    for row in rows:
        print(
            f"| {row.level} | {row.shape} | {row.zeros:.0%} | {row.tokens} | {row.pairs_us:.1f} | {row.bytes_us:.1f} | "
            f"{row.gmacs:.1f} | {row.ratio:.2f} |"
        )
    for level, zeros, tokens in dict.fromkeys((row.level, row.zeros, row.tokens) for row in rows):
        found = [row.ratio for row in rows if (row.level, row.zeros, row.tokens) == (level, zeros, tokens)]
        print(
            f"\n{level}, {zeros:.0%} zeros, {tokens} tokens: {1 / statistics.geometric_mean(found):.2f}x in the geometric mean"
        )
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
