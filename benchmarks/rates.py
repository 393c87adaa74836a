"""Takes the kernel rates behind `tilewright check-hardware`: measures this CPU's, models those of levels it lacks.

    python -m benchmarks.rates                   # replaces this CPU's entries in schedules/rates.json, keeps others'
    python -m benchmarks.rates --levels avx2

Rates are fitted to the kernels of encoders with random weights, as `Engine.profile` times them, at the clock measured
beside them. Levels are modelled for Ice Lake servers from the inner loops' cycles by llvm-mca (benchmarks.static_throughput),
with the costs per output that were measured for the level, or for the measured level of equal lanes, on this CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import tilewright
from benchmarks import static_throughput
from benchmarks.machine import machine
from benchmarks.peak import clock
from benchmarks.random_encoder import compiled
from tilewright.codegen.block_sparse import BLOCKS
from tilewright.codegen.decisions import Block, Storage
from tilewright.commands.output import progress_bar
from tilewright.cpu import cpu_features
from tilewright.hardware import detect
from tilewright.measure import random_ids
from tilewright.predict import Sizes
from tilewright.schedules import rates
from tilewright.schedules.blocks import dense
from tilewright.schedules.choice import sparse_storage
from tilewright.schedules.isa import ISAS, Isa
from tilewright.schedules.rates import AttentionRate, LevelRates, LinearRate

FITTED = Sizes("fitted", 2, 768, 12, 3072)
SMALL_HEADS = Sizes("small heads", 1, 384, 12, 1536)
DENSITIES = (0.3, 0.1)
LENGTH = 128  # tokens that linears are fitted to
LENGTHS = (64, LENGTH, 384)
EPILOGUES = ("qkv", "add_norm", "activate")
REPEATS = 30

TILE_MACS: dict[Block | None, float] = {None: 1024.0, (16, 4): 512.0, (32, 4): 683.0}
"""Products per cycle of the kernels on AMX tiles, by stored block.

By Intel's optimization manual a product of tiles, 16384 MACs, takes 16 cycles. Gathering a tile of inputs takes about as
long, and serves one product of blocks of 16 outputs, two of 32.
"""

Cycles = Mapping[str, float]  # of one call of a kernel, by its name


def best_clock() -> float:
    """GHz of this core when nothing disturbs it."""
    return max(clock(0.001) for _ in range(REPEATS))


def profile(engine: tilewright.Engine, length: int) -> Cycles:
    """Cycles of each kernel for one sequence: the least of REPEATS times, which nothing disturbed, at the highest clock."""
    seconds: dict[str, float] = {}
    hertz = 0.0
    ids = random_ids(engine.manifest.limits.vocab_size, 1, length)
    for _ in range(REPEATS):
        hertz = max(hertz, clock(0.001) * 1e9)
        for kernel in engine.profile({"input_ids": ids}, iterations=1):
            seconds[kernel.name] = min(seconds.get(kernel.name, 1.0), kernel.microseconds / kernel.calls * 1e-6)
    return {name: least * hertz for name, least in seconds.items()}


def ways(isa: Isa) -> dict[Storage, Block | None]:
    """How the level stores dense matrices and each block shape, with a shape that leads to it."""
    found: dict[Storage, Block | None] = {dense(isa): None}
    for block in BLOCKS:
        if (storage := sparse_storage(block, isa)) is not None:
            found.setdefault(storage, block)
    return found


def measure(isa: Isa, cpu: str, about: str, tick: Callable[[], None]) -> LevelRates:
    """The rates of `isa` on this CPU; `tick` is called after each engine."""
    linears = []
    for storage, block in ways(isa).items():
        cycles = {}
        for density in (1.0,) if block is None else DENSITIES:
            engine = compiled(FITTED, isa, block, 1 - density)
            cycles[density] = profile(engine, LENGTH)
            tick()
        linears.append(fit_linear(storage, cycles))
        if block is None:
            wide = {(FITTED, length): profile(engine, length) for length in LENGTHS}
            narrow_engine = compiled(SMALL_HEADS, isa, None, 0.0)
            narrow = {(SMALL_HEADS, length): profile(narrow_engine, length) for length in LENGTHS}
            attention = fit_attention(wide | narrow)
            embedding = wide[FITTED, LENGTH]["embedding"] / LENGTH / FITTED.hidden
    return LevelRates(isa.name, cpu, "measured", about, best_clock(), tuple(linears), attention, embedding)


def fit_linear(storage: Storage, cycles: Mapping[float, Cycles]) -> LinearRate:
    """Rates from the kernels' cycles of one call on LENGTH tokens, by density."""
    rows, targets = [], []
    for density, kernels in cycles.items():
        for name, (outputs, inputs, epilogue) in FITTED.linears().items():
            rows.append([outputs * inputs * density, *(outputs * (epilogue == other) for other in EPILOGUES)])
            targets.append(kernels[name] / LENGTH)
    per_mac, *costs = solve(rows, targets)
    return LinearRate(storage.family, storage.block, 1 / per_mac, *costs)


def fit_attention(cycles: Mapping[tuple[Sizes, int], Cycles]) -> AttentionRate:
    """Rates from attention's cycles, by sizes and length of the one sequence."""
    rows = [[2 * length * sizes.hidden, length * sizes.heads, sizes.hidden] for sizes, length in cycles]
    per_mac, softmax, cost = solve(rows, [kernels["attention"] / length for (_, length), kernels in cycles.items()])
    return AttentionRate(1 / per_mac, softmax, cost)


def solve(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """Coefficients, none negative, that fit rows @ coefficients = targets with the least relative error."""
    matrix, ones = np.asarray(rows, float) / np.asarray(targets)[:, None], np.ones(len(targets))
    kept = list(range(matrix.shape[1]))
    while True:
        values = np.linalg.lstsq(matrix[:, kept], ones, rcond=None)[0]
        if values.min() >= 0:
            found = dict(zip(kept, values, strict=True))
            return [float(found.get(column, 0.0)) for column in range(matrix.shape[1])]
        del kept[int(values.argmin())]


def model(isa: Isa, measured: Sequence[LevelRates], tick: Callable[[], None]) -> LevelRates:
    """The rates of `isa` on the CPU of llvm-mca's model: products from the inner loops, the rest from `measured`."""
    tool = next((found for name in static_throughput.TOOLS if (found := shutil.which(name))), None)
    if tool is None:
        sys.exit("llvm-mca was not found; install it with: apt-get install llvm")
    basis = next(
        (entry for entry in measured if entry.isa == isa.name), None
    ) or next(entry for entry in measured if ISAS[entry.isa].lanes == isa.lanes)  # fmt: skip
    linears = []
    for storage in ways(isa):
        known = basis.of(storage) or basis.linears[0]
        macs = static_throughput.analyse(tool, isa, storage, FITTED.hidden, FITTED.hidden).macs_per_cycle
        linears.append(dataclasses.replace(known, family=storage.family, block=storage.block, macs=macs))
        tick()
    faster = linears[0].macs / basis.linears[0].macs  # both begin with dense
    most = static_throughput.PER_CYCLE * isa.lanes * isa.operands.pack
    attention = dataclasses.replace(basis.attention, macs=min(basis.attention.macs * faster, most))
    level = "" if basis.isa == isa.name else f" at {basis.isa}"
    about = f"products by llvm-mca for {static_throughput.CPU}, the rest as measured on {basis.cpu}{level}"
    return LevelRates(
        isa.name, static_throughput.CPU, "modelled", about, None, tuple(linears), attention, basis.embedding
    )  # fmt: skip


def model_tiles(isa: Isa, vectors: LevelRates) -> LevelRates:
    """The rates of AMX level `isa`: those of `vectors`, the level whose intrinsics it shares, and TILE_MACS."""
    linears = tuple(
        vectors.of(storage)
        or dataclasses.replace(vectors.linears[0], family=storage.family, block=storage.block, macs=TILE_MACS[storage.block])
        for storage in ways(isa)
    )
    about = f"tiles by their instructions' throughput, memory not counted; the rest: {vectors.about}"
    return dataclasses.replace(vectors, isa=isa.name, cpu="sapphirerapids", about=about, linears=linears)


def stored() -> tuple[LevelRates, ...]:
    """The table as it is now."""
    return rates.from_json(rates.TABLE.read_text("utf-8")) if rates.TABLE.exists() else ()


def store(entry: LevelRates) -> None:
    """Put `entry` into the table, in the place of one for the same level, CPU and source."""
    places = {(old.source, old.cpu, list(ISAS).index(old.isa)): old for old in (*stored(), entry)}
    text = json.dumps([_rounded(dataclasses.asdict(places[place])) for place in sorted(places)], indent=1)
    scratch = rates.TABLE.with_suffix(".new")
    scratch.write_text(text + "\n", "utf-8")
    scratch.replace(rates.TABLE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", choices=ISAS, default=list(ISAS), help="levels to measure, of those it has")
    args = parser.parse_args()
    found, cpu = machine(), str(detect().llvm_cpu)
    about = f"{found['cpu']}, {found['date']}, {found['versions']}"
    native = [ISAS[name] for name in args.levels if cpu_features().issuperset(ISAS[name].features)]
    modelled = [ISAS[name] for name in static_throughput.LEVELS]
    total = sum(2 * len(ways(isa)) - 1 for isa in native) + sum(len(ways(isa)) for isa in modelled)
    done = itertools.count(1)
    with progress_bar("kernels") as progress:

        def tick() -> None:
            progress(next(done), total)

        for isa in native:
            store(measure(isa, cpu, about, tick))
        measured = [entry for entry in stored() if (entry.source, entry.cpu) == ("measured", cpu)]
        for isa in modelled:
            store(model(isa, measured, tick))
        for isa in (isa for isa in ISAS.values() if isa.tiles):
            store(model_tiles(isa, next(entry for entry in stored() if (entry.isa, entry.source) == (isa.vectors, "modelled"))))


def _rounded(value: Any) -> Any:
    """Numbers to four digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
