"""What a call costs besides its kernels: checks, packing, walking the program, copying results.

python -m benchmarks.overhead

The kernels of the artifact are compiled once more with every body left out, so that the same call path runs and its kernels
return at once; what such a call takes is the overhead. (The profile of `tilewright benchmark` cannot tell: recording a call of
a kernel takes about as long as making it.) Whole and hollow calls alternate, so that a hollow call, too, finds in the caches
what the kernels left there. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tvm

import tilewright
from benchmarks import models
from benchmarks.machine import machine
from tilewright import frontend
from tilewright.artifact import open_artifact
from tilewright.codegen.artifact import write_artifact
from tilewright.codegen.build import build_library
from tilewright.codegen.lower import lower
from tilewright.engine import Engine
from tilewright.measure import random_ids
from tilewright.schedules.choice import plan
from tilewright.schedules.isa import ISAS


def hollow(source: Path, whole: Engine, artifact: Path, directory: Path) -> Engine:
    """An engine like `whole`, which runs `artifact` made from `source`, of kernels that do nothing, written to `directory`."""
    level = ISAS[whole.level.name]
    model = frontend.load(source)
    module = lower(model, plan(model, level)).module
    emptied = {
        symbol: func.with_body(tvm.tirx.Evaluate(0))
        for symbol, func in module.functions.items()
        if isinstance(func, tvm.tirx.PrimFunc)
    }
    library = directory.with_suffix(".so")
    build_library(tvm.IRModule(emptied), level.target(), library)
    _, weights = open_artifact(artifact)
    manifest = dataclasses.replace(whole.manifest, levels=(whole.level,))
    write_artifact(directory, libraries={level.name: library}, weights=weights, manifest=manifest)
    return tilewright.load(directory, num_threads=1, isa=level.name)


def microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models.SIZES, default=["minilm-l6", "distilbert"])
    parser.add_argument("--block", default="4x1")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--levels", nargs="+", default=["avx2", "native"])
    parser.add_argument("--shapes", nargs="+", default=["1x16", "1x128"])
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each model and shape")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            block = tuple(int(n) for n in args.block.split("x"))
            directory = Path(scratch) / model
            directory.mkdir()
            source = models.build(models.SIZES[model], block, args.sparsity, directory / "float")
            source = models.quantized(source, directory / "int8")
            for target in args.levels:
                artifact = tilewright.compile(source, target, directory / f"{target}.tw").path
                whole = tilewright.load(artifact, num_threads=1)
                empty = hollow(source, whole, artifact, directory / f"{target}-hollow.tw")
                for shape in args.shapes:
                    ids = random_ids(whole.manifest.limits.vocab_size, *(int(n) for n in shape.split("x")))
                    samples = []
                    end = time.perf_counter() + args.seconds
                    while time.perf_counter() < end:
                        samples.append([microseconds(partial(engine, ids)) for engine in (whole, empty)])
                    call, overhead = (statistics.median(times) for times in zip(*samples, strict=True))
                    row = {"model": model, "level": whole.level.name, "shape": shape, "call_us": call, "overhead_us": overhead}
                    rows.append(row | {"share": overhead / call})
    if args.json:
        print(json.dumps({"machine": machine(), "overhead": rows}))
        return
    print("| model | level | shape | call us | overhead us | share |\n|---|---|---|--:|--:|--:|")
    for row in rows:
        names = (str(row[key]) for key in ("model", "level", "shape"))
        print("|", " | ".join(names), f"| {row['call_us']:.0f} | {row['overhead_us']:.0f} | {row['share']:.1%} |")


if __name__ == "__main__":
    main()
