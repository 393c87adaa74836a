"""Times kernels on a host, on real arguments: packed from the model's own matrices, with offsets of real sequences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from tilewright.codegen.decisions import AttentionDecisions
from tilewright.codegen.formats import GROUP
from tilewright.codegen.layer_kernels import Context, Decisions, LayerKernel
from tilewright.codegen.packing import pack_linear
from tilewright.tuning.builds import Builder, Built
from tilewright.tuning.candidates import packing
from tilewright.tuning.host import Connect, Host, HostLost
from tilewright.tuning.peak import Loop
from tilewright.tuning.search import Turns
from tilewright.tuning.tasks import Task

TURN = 0.002
"""Seconds of one kernel's turn, and of the peak loop's."""

STEADY = 0.9
"""A round whose peak is below this share of the best seen is repeated."""

STOLEN = 0.02
"""The share of time stolen by the hypervisor from which on measurements are repeated."""

REPEATS = 3
"""How often a measurement is begun anew on another machine or connection."""


@dataclass
class Timer:
    """A kernel with its arguments on the host. number: of calls that make a turn, known after the first."""

    module: Any
    arguments: list[Any]
    number: int = 0

    def seconds(self, host: Host) -> float:
        """Of one call, by a turn of calls."""
        if not self.number:
            self.number = max(1, math.ceil(TURN / max(self._run(host, 1, 3), 1e-9)))
        return self._run(host, self.number, 1)

    def _run(self, host: Host, number: int, repeat: int) -> float:
        def run() -> float:
            timed = self.module.time_evaluator("main", host.device, number=number, repeat=repeat)
            return float(timed(*self.arguments).min)

        return float(host.call(run))


@dataclass
class Live:
    """A `Bench` on a machine. A lost one is replaced, and what was under way measured anew."""

    connect: Connect
    builder: Builder
    note: Callable[[str], None] = lambda text: None
    host: Host | None = None
    _built: dict[Any, Built] = field(default_factory=dict)
    _arguments: dict[Any, Arguments] = field(default_factory=dict)
    _loops: dict[str, Loop | None] = field(default_factory=dict)
    _best_peak: dict[str, float] = field(default_factory=dict)

    def reached(self) -> Host:
        """The machine."""
        if self.host is None:
            self.host = self.connect()
        return self.host

    def prepare(self, candidates: Sequence[tuple[Task, Decisions]]) -> Sequence[tuple[Task, Decisions]]:
        """As `Bench` says."""
        built = self.builder.build([(task.kernel, made) for task, made in candidates])
        for (task, made), one in zip(candidates, built, strict=True):
            if one is not None:
                self._built[_identity(task.kernel), made] = one
        return [pair for pair, one in zip(candidates, built, strict=True) if one is not None]

    def turns(self, task: Task, tokens: int, candidates: Sequence[Decisions], rounds: int) -> Turns:
        """As `Bench` says; raises HostLost where no machine can be had any more."""
        for attempt in range(REPEATS):
            try:
                return self._turns(self.reached(), task, tokens, candidates, rounds)
            except HostLost as error:
                self.host = None
                for arguments in self._arguments.values():
                    arguments.forget()
                if attempt == REPEATS - 1:
                    raise
                self.note(f"{error}; measuring again on another connection")
        raise AssertionError

    def _turns(self, host: Host, task: Task, tokens: int, candidates: Sequence[Decisions], rounds: int) -> Turns:
        arguments = self._arguments.setdefault(_identity(task.kernel), Arguments(task.kernel))
        timers = {}
        for made in candidates:
            built = self._built[_identity(task.kernel), made]
            timers[made] = Timer(host.load(built.library), arguments.on(host, made, built, tokens))
        for timer in timers.values():
            timer.seconds(host)
        kept: list[tuple[dict[Decisions, float], float]] = []
        disturbed: list[tuple[dict[Decisions, float], float]] = []
        while len(kept) < rounds and len(disturbed) <= rounds:
            before = host.jiffies()
            first = self._peak(host, task.kernel.spec.isa)
            seconds = {made: timer.seconds(host) for made, timer in timers.items()}
            last = self._peak(host, task.kernel.spec.isa)
            best = self._best_peak.get(task.kernel.spec.isa, 0.0)
            steady = min(first, last) >= STEADY * best and _stolen(before, host.jiffies()) <= STOLEN
            (kept if steady else disturbed).append((seconds, max(first, last)))
        enough = len(kept) >= rounds
        rows = kept if enough else (kept + disturbed)[:rounds]
        return Turns({made: [row[made] for row, _ in rows] for made in candidates}, [most for _, most in rows], not enough)

    def _peak(self, host: Host, isa: str) -> float:
        """GMAC/s of the best loop of the level now; 0 where it has none."""
        if isa not in self._loops:
            known = [loop for loop in host.meter.available() if loop.isa == isa]
            self._loops[isa] = max(known, key=lambda loop: host.call(host.meter.rate, loop, TURN), default=None)
        loop = self._loops[isa]
        found = 0.0 if loop is None else float(host.call(host.meter.rate, loop, TURN))
        self._best_peak[isa] = max(self._best_peak.get(isa, 0.0), found)
        return found


def _identity(kernel: LayerKernel) -> Any:
    """Layers of equal kernels share libraries."""
    return kernel.spec, kernel.detail


def _stolen(before: tuple[int, int], after: tuple[int, int]) -> float:
    return (after[0] - before[0]) / max(after[1] - before[1], 1)


class Arguments:
    """The arguments of a kernel's candidates."""

    def __init__(self, kernel: LayerKernel) -> None:
        self._kernel = kernel
        self._random = np.random.default_rng(0)
        self._packed: dict[Any, Mapping[str, NDArray[Any]]] = {}
        self._there: dict[Any, Any] = {}

    def forget(self) -> None:
        """What was on a machine is gone."""
        self._there.clear()

    def on(self, host: Host, made: Decisions, built: Built, tokens: int) -> list[Any]:
        """Those of the kernel with decisions `made` for so many tokens, on `host`; equal arrays are there once."""
        packed, found = self._pack(made), []
        for name, shape, dtype in built.parameters:
            sizes = tuple(tokens // GROUP if size is None else size for size in shape)
            place = name, sizes, dtype, packing(made) if name in packed else tokens
            if place not in self._there:
                array = packed[name] if name in packed else self._values(name, sizes, dtype, tokens)
                self._there[place] = host.call(tvm.runtime.tensor, array, device=host.device)
            found.append(self._there[place])
        return found

    def _pack(self, made: Decisions) -> Mapping[str, NDArray[Any]]:
        if isinstance(made, AttentionDecisions):
            return {}
        if packing(made) not in self._packed:
            self._packed[packing(made)] = pack_linear(made, self._kernel.weight).arguments()
        return self._packed[packing(made)]

    def _values(self, name: str, sizes: tuple[int, ...], dtype: str, tokens: int) -> NDArray[Any]:
        """Plausible values; offsets of one sequence, or several where one may not be so long."""
        if name == "offsets":
            longest = self._kernel.detail.max_positions if isinstance(self._kernel.detail, Context) else tokens
            return np.array([*range(0, tokens, longest), tokens], np.int32)
        if dtype == "float32":
            return self._random.uniform(0.5, 1.0, sizes).astype(np.float32)
        return self._random.integers(0, 100, sizes).astype(dtype)
