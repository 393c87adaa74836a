"""Whole-encoder latency beside every peer, each in a process and an environment of its own, in turns.

    make peers                                                # once: the peers' environments
    python -m benchmarks.encoder                              # grid `main`: DistilBERT, 80 % zero, 1 thread, every engine
    python -m benchmarks.encoder --grid rest                  # other models, sparsities, shapes, threads; fewer engines
    python -m benchmarks.encoder --grid full --minutes 300    # everything with everything, as far as it gets in time
    python -m benchmarks.encoder --models minilm-l6 --sparsities 0.9 --shapes 1x128 --threads 2 --engines deepsparse

Results go to `.bench/results/GRID.json`, which `python -m benchmarks.report` turns into tables and plots. All models have
random weights and exactly pruned (4, 1) blocks, but where the engine's name says otherwise. A peer that cannot be run is
listed with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import tilewright
from benchmarks import models
from benchmarks.forms import Checkpoint, FormError, compiled
from benchmarks.machine import machine
from benchmarks.peak import available, peak
from benchmarks.peers.process import Worker, WorkerError, take_turns
from benchmarks.peers.table import BASELINE, PEERS, WORK, Peer, ours
from tilewright.commands.output import stderr, stdout
from tilewright.cpu import cpu_features
from tilewright.schedules.isa import resolve

SPARSITIES = (0.0, 0.7, 0.8, 0.9)
SHAPES = ("1x16", "1x32", "1x64", "1x128", "1x384", "8x128", "32x128")
BLOCK = (4, 1)
MAIN_PEERS = (BASELINE, "onnxruntime int8 dynamic", "deepsparse int8 4x1")


@dataclass(frozen=True)
class Case:
    """What is loaded at a time: a model in all engines, on so many threads, at each of `shapes` (batch x length)."""

    model: str = "distilbert"
    sparsity: float = 0.8
    threads: int = 1
    shapes: tuple[str, ...] = ("1x128",)

    def __str__(self) -> str:
        return f"{self.model}, {self.sparsity:.0%} zero, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Grid:
    """Cases, the most wanted first, and the peers they are run with."""

    cases: tuple[Case, ...]
    peers: tuple[str, ...] = tuple(peer.name for peer in PEERS)


GRIDS = {
    "main": Grid((Case(shapes=("1x32", "1x128", "1x384", "8x128")),)),
    "rest": Grid(
        (
            Case(shapes=("1x16", "1x64", "32x128")),
            Case(threads=2, shapes=("1x16", "1x128", "8x128")),
            *(Case(sparsity=sparsity, shapes=("1x32", "1x128", "1x384")) for sparsity in (0.0, 0.7, 0.9)),
            Case("minilm-l6", shapes=("1x16", "1x128", "1x384", "8x128")),
            Case("bert-base", shapes=("1x32", "1x128", "1x384")),
            *(Case(model, sparsity) for model in ("minilm-l6", "bert-base") for sparsity in (0.0, 0.7, 0.9)),
        ),
        MAIN_PEERS,
    ),
    "full": Grid(
        tuple(
            Case(model, sparsity, threads, SHAPES)
            for threads, sparsity, model in itertools.product((1, 2), (0.8, 0.0, 0.7, 0.9), models.SIZES)
        )
    ),
}


def macs(model: str, sparsity: float, batch: int, length: int) -> float:
    """Multiplications that a forward pass cannot avoid: non-zero weights times tokens, and attention's two products."""
    size = models.SIZES[model]
    weights = (1 - sparsity) * (4 * size.hidden**2 + 2 * size.hidden * size.intermediate)
    return size.layers * batch * length * (weights + 2 * length * size.hidden)


def parse_shape(shape: str) -> tuple[int, int]:
    """(8, 128) for 8x128."""
    batch, _, length = shape.partition("x")
    return int(batch), int(length)


def save_work(path: Path, items: Sequence[tuple[Any, Any]]) -> Path:
    """Write (ids, mask) pairs as workers read them."""
    pairs = enumerate(items)
    np.savez(path, **{f"{name}{i}": array for i, pair in pairs for name, array in zip(("ids", "mask"), pair, strict=True)})
    return path


def applies(peer: Peer, case: Case) -> bool:
    """Without zeros, all blocks are the same and a dense model is nothing special."""
    return bool(case.sparsity) or (peer.block is None and peer.sparsity is None)


class Run:
    """A report in the making: plain data, saved after every shape."""

    def __init__(self, levels: Sequence[str], seconds: float, minutes: float, output: Path, progress: Progress) -> None:
        self.levels = levels
        self.seconds = seconds
        self.end = time.monotonic() + 60 * minutes
        self.output = output
        self.progress = progress
        self.task = progress.add_task("")
        self.cores = sorted(os.sched_getaffinity(0))  # before TVM pins this process's threads
        known = {loop.isa for loop in available()}
        self.peaks = {level: peak(level, 0.1) for level in levels if level in known}
        self.report: dict[str, Any] = {
            "machine": machine(),
            "settings": {"levels": list(levels), "seconds": seconds, "peaks_gmacs": self.peaks},
            "versions": {},
            "rows": [],
            "not_run": [],
            "profiles": [],
        }

    def case(self, case: Case, peers: Sequence[Peer]) -> None:
        """All shapes of a case; engines that fail are noted and left out."""
        wanted = [peer for peer in peers if applies(peer, case)]
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            checkpoint = Checkpoint(case.model, case.sparsity, BLOCK)
            artifacts = {}
            workers = {}
            for level in self.levels:
                self.show(case, f"compile for {level}")
                artifacts[f"tilewright {level}"] = compiled(checkpoint, level, scratch)
            for peer in [*wanted, *map(ours, self.levels)]:
                if time.monotonic() > self.end:
                    self.note(case, peer.name, "out of time")
                    continue
                self.show(case, f"load {peer.name}")
                try:
                    path = artifacts.get(peer.name) or form(peer, case)
                    workers[peer.name] = worker = Worker(peer, path, self.pin(case.threads))
                except (WorkerError, FormError, FileNotFoundError) as error:
                    self.note(case, peer.name, str(error))
                else:
                    stack.callback(worker.close)
                    self.report["versions"][peer.name] = worker.versions
            for shape in case.shapes:
                if time.monotonic() > self.end:
                    self.note(case, f"all at {shape}", "out of time")
                    continue
                self.shape(case, shape, workers, scratch)
                self.profile(case, shape, artifacts)
                self.save()

    def shape(self, case: Case, shape: str, workers: Mapping[str, Worker], scratch: Path) -> None:
        """Time one shape in turns."""
        batch, length = parse_shape(shape)
        ids = np.random.default_rng(0).integers(1000, 30000, (batch, length))
        work = save_work(scratch / "work.npz", [(ids, np.ones_like(ids))])
        outputs: dict[str, list[float]] = {}
        for name, worker in workers.items():
            if worker.peer.shapes is None or shape in worker.peer.shapes:
                self.show(case, f"{shape}, prepare {name}")
                try:
                    outputs[name] = worker.work(work)
                except WorkerError as error:
                    self.note(case, f"{name} at {shape}", str(error))
        self.show(case, f"{shape}, {len(outputs)} engines in turns")
        rounds = take_turns(
            {name: workers[name] for name in outputs},
            self.seconds,
            lambda name, reason: self.note(case, f"{name} at {shape}", reason),
        )
        base = rounds.get(BASELINE)
        about = {"model": case.model, "sparsity": case.sparsity, "threads": case.threads, "shape": shape}
        for name, times in rounds.items():
            ratios = [time / other for time, other in zip(times, base, strict=False)] if base else []
            self.report["rows"].append(
                about
                | {
                    "engine": name,
                    "ms": statistics.median(times) * 1e3,
                    "ratio": statistics.median(ratios) if ratios else None,
                    "rounds": len(times),
                    "cosine": agreement(outputs, name),
                }
            )
        for level, rate in self.peaks.items():
            floor = macs(case.model, case.sparsity, batch, length) / (rate * 1e9 * case.threads)
            ratio = statistics.median(floor / other for other in base) if base else None
            self.report["rows"].append(about | {"engine": f"floor {level}", "ms": floor * 1e3, "ratio": ratio})

    def profile(self, case: Case, shape: str, artifacts: Mapping[str, Path]) -> None:
        """Where our time goes by kernel, with all workers stopped."""
        batch, length = parse_shape(shape)
        ids = np.random.default_rng(0).integers(1000, 30000, (batch, length))
        for name, artifact in artifacts.items():
            self.show(case, f"{shape}, profile {name}")
            kernels = tilewright.load(artifact, num_threads=case.threads).profile({"input_ids": ids}, iterations=5)
            about = {"model": case.model, "sparsity": case.sparsity, "threads": case.threads, "shape": shape}
            microseconds = {kernel.name: kernel.microseconds for kernel in kernels}
            self.report["profiles"].append(about | {"engine": name, "microseconds": microseconds})

    def pin(self, count: int) -> tuple[int, ...]:
        """The last `count` cores; the first has the most other work."""
        if count > len(self.cores):
            raise SystemExit(f"error: {count} threads were asked for, {len(self.cores)} cores are available")
        return tuple(self.cores[-count:])

    def note(self, case: Case, what: str, reason: str) -> None:
        """List what was not run."""
        self.report["not_run"].append({"case": asdict(case), "what": what, "reason": reason})
        self.progress.console.print(f"not run: {case}: {what}: {reason}", markup=False, soft_wrap=True)

    def show(self, case: Case, doing: str) -> None:
        """What is under way."""
        self.progress.update(self.task, description=f"{case}: {doing}")

    def save(self) -> None:
        """Write the report so far; there is always a whole one."""
        scratch = self.output.with_name(f".{os.getpid()}-{self.output.name}")
        scratch.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.output)


def form(peer: Peer, case: Case) -> Path:
    """The model of `case` as `peer` runs it."""
    peer.python()  # no need to make a form for a peer that is not there
    sparsity = case.sparsity if peer.sparsity is None else peer.sparsity
    return Checkpoint(case.model, sparsity, peer.block or BLOCK).form(peer.form)


def agreement(outputs: Mapping[str, Sequence[float]], name: str) -> float | None:
    """Cosine of the centred logits with the baseline's, for engines that run the same weights."""
    other = [peer for peer in PEERS if peer.name == name and (peer.block or peer.sparsity is not None)]
    if other or BASELINE not in outputs:
        return None
    first, second = (np.array(outputs[key]) - np.mean(outputs[key]) for key in (name, BASELINE))
    return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


def select(options: argparse.Namespace) -> Iterator[tuple[Case, list[Peer]]]:
    """The grid's cases with what the options change, and the peers of each."""
    grid = GRIDS[options.grid]
    cases = grid.cases
    if options.models or options.sparsities or options.threads or options.shapes:
        default = cases[0]
        cases = tuple(
            Case(model, sparsity, threads, tuple(options.shapes or default.shapes))
            for threads in options.threads or [default.threads]
            for sparsity in options.sparsities or [default.sparsity]
            for model in options.models or [default.model]
        )
    names = grid.peers
    if options.engines is not None:
        names = tuple(
            peer.name for peer in PEERS if peer.name == BASELINE or any(word in peer.name for word in options.engines)
        )
    for case in cases:
        yield case, [peer for peer in PEERS if peer.name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, default="main")
    parser.add_argument("--models", nargs="+", choices=models.SIZES)
    parser.add_argument("--sparsities", nargs="+", type=float, metavar="SHARE")
    parser.add_argument("--threads", nargs="+", type=int)
    parser.add_argument("--shapes", nargs="+", metavar="BATCHxLENGTH")
    parser.add_argument("--engines", nargs="*", help="parts of peers' names; the baseline always runs, and ours")
    parser.add_argument("--levels", nargs="+", default=["avx2", "native"], help="ISA levels to compile ours for")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each engine and shape; three rounds at least")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so long")
    parser.add_argument("--output", type=Path, help="JSON file (default: .bench/results/GRID.json)")
    options = parser.parse_args()
    from benchmarks import report  # matplotlib takes long to load

    output = options.output or WORK / "results" / f"{options.grid}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    levels = list(dict.fromkeys(resolve(level, cpu_features()).name for level in options.levels))
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=stderr()) as progress:
        run = Run(levels, options.seconds, options.minutes, output, progress)
        for case, peers in select(options):
            run.case(case, peers)
    stdout().print(report.markdown([run.report]), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
