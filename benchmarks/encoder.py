"""Whole-encoder latency beside every peer, each in a process and an environment of its own, in turns.

    make peers                                                # once: the peers' environments
    python -m benchmarks.encoder --prepare                    # once, or the run does it: the models in all their forms
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
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tilewright
from benchmarks import models, report
from benchmarks.peak import available, peak
from benchmarks.peers.process import Worker, WorkerError, take_turns
from benchmarks.peers.table import BASELINE, PEERS, WORK, Peer, environment_python, ours
from benchmarks.run import Case, Run, running, save_work
from tilewright.commands.output import progress_bar
from tilewright.cpu import cpu_features
from tilewright.measure import random_ids
from tilewright.schedules.isa import resolve

VOCABULARY = 30522
SHAPES = ("1x16", "1x32", "1x64", "1x128", "1x384", "8x128", "32x128")
MAIN_PEERS = (BASELINE, "onnxruntime int8 dynamic", "openvino int8", "deepsparse int8 4x1")


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


def applies(peer: Peer, case: Case) -> bool:
    """Without zeros, all blocks are the same and a dense model is nothing special."""
    return bool(case.sparsity) or (peer.block is None and peer.sparsity is None)


class Latency:
    """Fills a run's data with rows of times, and profiles of our engines."""

    def __init__(self, run: Run, levels: Sequence[str], seconds: float, minutes: float) -> None:
        self.run = run
        self.levels = levels
        self.seconds = seconds
        self.end = time.monotonic() + 60 * minutes
        known = {loop.isa for loop in available()}
        self.peaks = {level: peak(level, 0.1) for level in levels if level in known}
        run.data["settings"]["peaks_gmacs"] = self.peaks
        run.data |= {"rows": [], "profiles": []}

    def case(self, case: Case, peers: Sequence[Peer]) -> None:
        """All shapes of a case; engines that fail are noted and left out."""
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            workers, artifacts = {}, {}
            for peer in [*map(ours, self.levels), *(peer for peer in peers if applies(peer, case))]:
                if time.monotonic() > self.end:
                    self.run.note(case, peer.name, "out of time")
                elif started := self.run.start(peer, case, scratch, stack):
                    workers[peer.name], path = started
                    if peer.adapter == "tilewright":
                        artifacts[peer.name] = path
            for shape in case.shapes:
                if time.monotonic() > self.end:
                    self.run.note(case, shape, "out of time")
                    continue
                self.shape(case, shape, workers, scratch)
                self.profile(case, shape, artifacts)
                self.run.save()

    def shape(self, case: Case, shape: str, workers: Mapping[str, Worker], scratch: Path) -> None:
        """Time one shape in turns."""
        batch, length = parse_shape(shape)
        ids = random_ids(VOCABULARY, batch, length)
        work = save_work(scratch / "work.npz", [(ids, np.ones_like(ids))])
        outputs: dict[str, list[float]] = {}
        for name, worker in workers.items():
            if worker.peer.shapes is None or shape in worker.peer.shapes:
                self.run.show(case, f"{shape}, prepare {name}")
                try:
                    outputs[name] = worker.work(work)
                except WorkerError as error:
                    self.run.note(case, f"{name} at {shape}", str(error))
        self.run.show(case, f"{shape}, {len(outputs)} engines in turns")
        rounds = take_turns(
            {name: workers[name] for name in outputs},
            self.seconds,
            lambda name, reason: self.run.note(case, f"{name} at {shape}", reason),
        )
        base = rounds.get(BASELINE)
        rows = self.run.data["rows"]
        for name, times in rounds.items():
            ratios = [time / other for time, other in zip(times, base, strict=False)] if base else []
            row = about(case, shape, name) | {"ms": statistics.median(times) * 1e3, "rounds": len(times)}
            ratio = statistics.median(ratios) if ratios else None
            rows.append(row | {"ratio": ratio, "cosine": agreement(outputs, name)})
        for level, rate in self.peaks.items():
            floor = macs(case.model, case.sparsity, batch, length) / (rate * 1e9 * case.threads)
            ratio = statistics.median(floor / other for other in base) if base else None
            rows.append(about(case, shape, f"floor {level}") | {"ms": floor * 1e3, "ratio": ratio})

    def profile(self, case: Case, shape: str, artifacts: Mapping[str, Path]) -> None:
        """Where our time goes by kernel, with all workers stopped."""
        for name, artifact in artifacts.items():
            self.run.show(case, f"{shape}, profile {name}")
            ids = random_ids(VOCABULARY, *parse_shape(shape))
            kernels = tilewright.load(artifact, num_threads=case.threads).profile({"input_ids": ids}, iterations=5)
            microseconds = {kernel.name: kernel.microseconds for kernel in kernels}
            self.run.data["profiles"].append(about(case, shape, name) | {"microseconds": microseconds})


def about(case: Case, shape: str, engine: str) -> dict[str, Any]:
    """What a row of the report is about."""
    return {"model": case.model, "sparsity": case.sparsity, "threads": case.threads, "shape": shape, "engine": engine}


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


def prepare(cases: Iterable[tuple[Case, Sequence[Peer]]]) -> None:
    """Make and keep every form of the models that the cases need; takes minutes, and no quiet machine."""
    wanted = dict.fromkeys(
        (case.checkpoint(peer), peer.form)
        for case, peers in cases
        for peer in [Peer("ours", "tilewright", "int8"), *(peer for peer in peers if applies(peer, case))]
        if peer.environment is None or environment_python(peer.environment).exists()
    )
    with progress_bar("make models") as advance:
        for done, (checkpoint, form) in enumerate(wanted):
            advance(done, len(wanted))
            checkpoint.form(form)


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
    parser.add_argument("--prepare", action="store_true", help="only make the models' forms that the run will need")
    parser.add_argument("--output", type=Path, help="JSON file (default: .bench/results/GRID.json)")
    options = parser.parse_args()
    if options.prepare:
        prepare(select(options))
        return
    levels = list(dict.fromkeys(resolve(level, cpu_features()).name for level in options.levels))
    output = options.output or WORK / "results" / f"{options.grid}.json"
    with running(output, {"grid": options.grid, "levels": levels, "seconds": options.seconds}) as run:
        latency = Latency(run, levels, options.seconds, options.minutes)
        for case, peers in select(options):
            latency.case(case, peers)
    print(report.markdown([run.data]))


if __name__ == "__main__":
    main()
