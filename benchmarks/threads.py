"""How an artifact's time falls with threads: engines of 1, 2, ... threads take turns in one process.

python -m benchmarks.threads build/quickstart/minilm.tw --threads 1 2 --shapes 1x128 8x128
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path

import numpy as np

import tilewright
from tilewright.baseline import time_in_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=["1x16", "1x128", "8x128"])
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each engine and shape")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    engines = {threads: tilewright.load(args.artifact, num_threads=threads) for threads in args.threads}
    vocabulary = next(iter(engines.values())).manifest.limits.vocab_size
    report: dict[str, dict[int, float]] = {}
    for shape in args.shapes:
        batch, length = (int(n) for n in shape.split("x"))
        ids = np.random.default_rng(0).integers(0, vocabulary, (batch, length))
        calls = {str(threads): functools.partial(engine, input_ids=ids) for threads, engine in engines.items()}
        samples = time_in_turns(calls, args.seconds)
        report[shape] = {threads: statistics.median(samples[str(threads)]) * 1e3 for threads in engines}
    if args.json:
        print(json.dumps(report))
        return
    for shape, times in report.items():
        first = times[args.threads[0]]
        print(shape, *(f"{threads} threads {ms:.2f} ms ({first / ms:.2f}x)" for threads, ms in times.items()), sep="  ")


if __name__ == "__main__":
    main()
