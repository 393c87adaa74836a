"""A run of a benchmark beside peers: starts workers, tells what is under way, and keeps what was found on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.forms import Checkpoint, FormError, compiled
from benchmarks.machine import machine
from benchmarks.peers.process import Worker, WorkerError
from benchmarks.peers.table import Block, Peer
from tilewright.commands.output import stderr

BLOCK: Block = (4, 1)


@dataclass(frozen=True)
class Case:
    """What is loaded at a time: a model in all engines, on so many threads, at each of `shapes` (batch x length)."""

    model: str = "distilbert"
    sparsity: float = 0.8
    threads: int = 1
    shapes: tuple[str, ...] = ("1x128",)

    def __str__(self) -> str:
        return f"{self.model}, {self.sparsity:.0%} zero, {self.threads} thread{'s' * (self.threads > 1)}"

    def checkpoint(self, peer: Peer) -> Checkpoint:
        """What `peer` runs in this case."""
        return Checkpoint(self.model, self.sparsity if peer.sparsity is None else peer.sparsity, peer.block or BLOCK)


class Run:
    """Plain data in the making, in the file `output`; made by `running`."""

    def __init__(self, output: Path, settings: dict[str, Any], progress: Progress) -> None:
        self.output = output
        self.data: dict[str, Any] = {"machine": machine(), "settings": settings, "versions": {}, "not_run": []}
        self._progress = progress
        self._task = progress.add_task("")
        self._cores = sorted(os.sched_getaffinity(0))  # asked before TVM pins this process's threads

    def start(self, peer: Peer, case: Case, scratch: Path, stack: ExitStack) -> tuple[Worker, Path] | None:
        """A worker, closed by `stack`, and the model it runs; None, and a note, where it cannot be run.

        Our artifacts are compiled into the directory `scratch`, and errors in that are raised.
        """
        checkpoint = case.checkpoint(peer)
        self.show(case, f"load {peer.name}")
        try:
            peer.python()  # no need to make a form for a peer that is not there
            path = compiled(checkpoint, peer.form, scratch) if peer.form.endswith(".tw") else checkpoint.form(peer.form)
            worker = Worker(peer, path, self._pin(case.threads))
        except (WorkerError, FormError, FileNotFoundError) as error:
            self.note(case, peer.name, str(error))
            return None
        stack.callback(worker.close)
        self.data["versions"][peer.name] = worker.versions
        return worker, path

    def note(self, case: Case, what: str, reason: str) -> None:
        """List what was not run."""
        self.data["not_run"].append({"case": asdict(case), "what": what, "reason": reason})
        self._progress.console.print(f"not run: {case}: {what}: {reason}", markup=False, soft_wrap=True)

    def show(self, case: Case, doing: str) -> None:
        """What is under way."""
        self._progress.update(self._task, description=f"{case}: {doing}")

    def save(self) -> None:
        """Write what there is so far; there is always a whole file."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.output.with_name(f".{os.getpid()}-{self.output.name}")
        scratch.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.output)

    def _pin(self, count: int) -> tuple[int, ...]:
        """The last `count` cores; the first has the most other work."""
        if count > len(self._cores):
            raise SystemExit(f"error: {count} threads were asked for, {len(self._cores)} cores are available")
        return tuple(self._cores[-count:])


@contextmanager
def running(output: Path, settings: dict[str, Any]) -> Iterator[Run]:
    """A Run that shows its progress on stderr, and saves what it has at the end, whatever the end."""
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=stderr()) as progress:
        run = Run(output, settings, progress)
        try:
            yield run
        finally:
            run.save()


def save_work(path: Path, items: Sequence[tuple[Any, Any]]) -> Path:
    """Write (ids, mask) pairs as workers read them."""
    pairs = enumerate(items)
    np.savez(path, **{f"{name}{i}": array for i, pair in pairs for name, array in zip(("ids", "mask"), pair, strict=True)})
    return path
