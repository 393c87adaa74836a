"""How an artifact's time falls with threads, what the machine allows, and where the threads' time goes.

python -m benchmarks.threads build/quickstart/minilm.tw --threads 1 2 --shapes 1x128 8x128

Engines of 1, 2, ... threads take turns in one process. Beside each speed-up stands the ceiling: that of as many processes of
one thread on cores of their own, which share no work and never wait for each other, held to the slowest of them. Where the
ceiling is low, the cores are slower together than alone, or one is slower than the others, as on a shared host.

Of the threads' time, `kernels` is time in user mode, `waiting` is system time (a thread that waits for the others yields to
the system again and again) and `off core` is time ready to run but without a core, because another process has it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import tilewright
from tilewright.instances import Instances
from tilewright.measure import random_ids, time_calls

_ROUNDS = 5
_TICK = 1 / os.sysconf("SC_CLK_TCK")


def usage() -> np.ndarray:
    """Seconds in user mode, in the system, and waiting for a core, of all threads of this process so far."""
    total = np.zeros(3)
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        waited = int((task / "schedstat").read_text().split()[1])
        total += int(fields[11]) * _TICK, int(fields[12]) * _TICK, waited * 1e-9
    return total


def measure(engines: dict[int, tilewright.Engine], ids: Any, seconds: float) -> dict[int, dict[str, float]]:
    """Median milliseconds and shares of the threads' time by number of threads."""
    samples: dict[int, list[float]] = {threads: [] for threads in engines}
    spent = {threads: np.zeros(4) for threads in engines}
    for _ in range(_ROUNDS):
        for threads, engine in engines.items():
            engine(ids)
            before, start = usage(), time.perf_counter()
            samples[threads] += time_calls(partial(engine, ids), duration=seconds / _ROUNDS, iterations=None, warmup=0)
            spent[threads] += (*(usage() - before), (time.perf_counter() - start) * threads)
    return {
        threads: {
            "ms": statistics.median(times) * 1e3,
            **dict(zip(("kernels", "waiting", "off_core"), spent[threads][:3] / spent[threads][3], strict=True)),
        }
        for threads, times in samples.items()
    }


def ceiling(artifact: Path, threads: int, batch: int, length: int, seconds: float) -> float:
    """Speed-up of `threads` processes that share no work, held to the slowest."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    with Instances(artifact) as instances:
        instances.start([[core] for core in cores])
        alone, together = [], []
        for _ in range(_ROUNDS):
            alone += instances.measure(1, batch, length, seconds / _ROUNDS)[0]
            together.append(instances.measure(threads, batch, length, seconds / _ROUNDS))
    slowest = max(statistics.median(itertools.chain(*own)) for own in zip(*together, strict=True))
    return threads * statistics.median(alone) / slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=["1x16", "1x128", "8x128"])
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each engine and shape")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    engines = {threads: tilewright.load(args.artifact, num_threads=threads) for threads in args.threads}
    vocabulary = next(iter(engines.values())).manifest.limits.vocab_size
    report: dict[str, dict[int, dict[str, float]]] = {}
    for shape in args.shapes:
        batch, length = (int(n) for n in shape.split("x"))
        report[shape] = measure(engines, random_ids(vocabulary, batch, length), args.seconds)
        for threads, row in report[shape].items():
            row["speedup"] = report[shape][args.threads[0]]["ms"] / row["ms"]
            row["ceiling"] = ceiling(args.artifact, threads, batch, length, args.seconds)
    if args.json:
        print(json.dumps(report))
        return
    print("| shape | threads | ms | speed-up | ceiling | kernels | waiting | off core |\n|---|---|--:|--:|--:|--:|--:|--:|")
    for shape, rows in report.items():
        for threads, row in rows.items():
            shares = " | ".join(f"{row[key]:.0%}" for key in ("kernels", "waiting", "off_core"))
            print(f"| {shape} | {threads} | {row['ms']:.2f} | {row['speedup']:.2f} | {row['ceiling']:.2f} | {shares} |")


if __name__ == "__main__":
    main()
