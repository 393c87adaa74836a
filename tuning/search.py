"""The search: batches of candidates, measured in turns with the default; what wins is held against it until that is certain."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tilewright.codegen.layer_kernels import Decisions
from tilewright.tuning.candidates import packing
from tilewright.tuning.cost import CostModel, Sample
from tilewright.tuning.records import encode
from tilewright.tuning.statistics import Gain, gain
from tilewright.tuning.tasks import Task, Tried, mean_ratio, next_task


@dataclass(frozen=True)
class Turns:
    """Seconds a call of each candidate, round by round, and the core's peak in each round in GMAC/s (empty: not known).

    disturbed: whether the machine was not left alone however often rounds were repeated.
    """

    seconds: Mapping[Decisions, Sequence[float]]
    peaks: Sequence[float] = ()
    disturbed: bool = False

    def ratio(self, made: Decisions, default: Decisions) -> float:
        """Median over the rounds of a candidate's seconds over the default's."""
        pairs = zip(self.seconds[made], self.seconds[default], strict=True)
        return statistics.median(new / old for new, old in pairs)


class Bench(Protocol):
    """Where candidates are measured."""

    def prepare(self, candidates: Sequence[tuple[Task, Decisions]]) -> Sequence[tuple[Task, Decisions]]:
        """Build them; returns those that can be measured."""

    def turns(self, task: Task, tokens: int, candidates: Sequence[Decisions], rounds: int) -> Turns:
        """Measure `candidates` in turns, `rounds` times."""


@dataclass(frozen=True)
class Settings:
    """How to search. limit: trials of a workload. least: the gain that the interval must exclude all below of.

    worst: what a bucket may lose where others of the same packing gain. explore: share of a batch that is drawn at random.
    """

    tokens: tuple[int, ...] = (16, 32, 128, 256)
    threads: int = 1
    batch: int = 16
    limit: int = 64
    least: float = 1.01
    worst: float = 0.98
    explore: float = 0.2
    rungs: tuple[int, ...] = (2, 4, 8)
    final_rounds: int = 25
    finalists: int = 3
    seed: int = 0
    accept_disturbed: bool = False


@dataclass
class Budget:
    """Trials and seconds that are left, whichever ends first. clock: seconds."""

    trials: int | None = None
    seconds: float | None = None
    clock: Callable[[], float] = time.monotonic
    spent: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    def trials_left(self, wanted: int) -> int:
        """How many of `wanted` trials may be made now."""
        if self.seconds is not None and self.clock() - self.started >= self.seconds:
            return 0
        return wanted if self.trials is None else max(min(wanted, self.trials - self.spent), 0)


@dataclass(frozen=True)
class Found:
    """The decisions of a task for a bucket, with the samples that speak for them; the default's own where nothing beat it."""

    task: Task
    tokens: int
    decisions: Decisions
    best_seconds: tuple[float, ...]
    default_seconds: tuple[float, ...]
    peak: float

    @property
    def gain(self) -> Gain:
        """Over the default."""
        return gain(self.default_seconds, self.best_seconds)


@dataclass
class Search:
    """One run. found: is called with the results of a task whenever they change. note: with what people should know."""

    bench: Bench
    model: CostModel
    settings: Settings
    found: Callable[[Sequence[Found]], None]
    note: Callable[[str], None] = lambda text: None
    progress: Callable[[Task], None] = lambda task: None

    def run(self, tasks: Sequence[Task], budget: Budget) -> None:
        """Tune `tasks` until the budget is spent, or each has had its trials or has no candidates left."""
        draw = random.Random(self.settings.seed)
        tasks = self._defaults(tasks)
        while (task := next_task(tasks, self.settings.batch, self.settings.limit)) is not None:
            size = budget.trials_left(min(self.settings.batch, self.settings.limit - len(task.trials)))
            if not size:
                return
            self.progress(task)
            batch = self._choose(task, size, draw)
            budget.spent += len(batch)
            self._try(task, batch)
            self._decide(task)

    def _defaults(self, tasks: Sequence[Task]) -> list[Task]:
        """Measure the defaults, which come first; returns the tasks of which there is one to compare with."""
        built = {id(task) for task, _ in self.bench.prepare([(task, task.default) for task in tasks])}
        for task in tasks:
            if id(task) not in built:
                self.note(f"{task.name}: the default does not build, so that nothing can be compared with it")
        able = [task for task in tasks if id(task) in built]
        for task in able:
            for tokens in self.settings.tokens:
                made = self.bench.turns(task, tokens, [task.default], self.settings.rungs[-1])
                task.default_seconds[tokens] = statistics.median(made.seconds[task.default])
        return able

    def _choose(self, task: Task, size: int, draw: random.Random) -> list[Decisions]:
        """The candidates that promise most, and some at random."""
        left, default = task.untried(), encode(task.default)
        encoded = [encode(made) for made in left]
        workloads = [task.workload(tokens, self.settings.threads) for tokens in self.settings.tokens]
        costs = np.sum([self.model.predict(workload, encoded, default) for workload in workloads], axis=0)
        ordered = [left[index] for index in np.argsort(costs, kind="stable")]
        best = ordered[: size - int(size * self.settings.explore)]
        others = ordered[len(best) :]
        return best + draw.sample(others, min(size - len(best), len(others)))

    def _try(self, task: Task, batch: Sequence[Decisions]) -> None:
        """Successive halving: all of a batch for a few rounds, then the better half for more, and half of those."""
        built, default = [made for _, made in self.bench.prepare([(task, made) for made in batch])], encode(task.default)
        tried = {made: Tried(made, {}) for made in built}
        for tokens in self.settings.tokens:
            left = built
            for rounds in self.settings.rungs if built else ():
                made = self.bench.turns(task, tokens, [task.default, *left], rounds)
                for one in left:
                    tried[one].ratios[tokens] = made.ratio(one, task.default)
                left = sorted(left, key=lambda one: tried[one].ratios[tokens])[: max(len(left) // 2, 1)]
            self.model.add(
                Sample(task.workload(tokens, self.settings.threads), encode(one), default, tried[one].ratios[tokens])
                for one in built
            )
        task.trials += [tried.get(made, Tried(made, {})) for made in batch]

    def _decide(self, task: Task) -> None:
        """Hold the best so far against the default, and report what is then certain."""
        groups: dict[object, list[Tried]] = {packing(task.default): []}
        for one in task.trials:
            if one.ratios:
                groups.setdefault(packing(one.decisions), []).append(one)
        own = groups.pop(packing(task.default))
        results = {tokens: self._final(task, tokens, own) for tokens in self.settings.tokens}
        others = sorted(groups.values(), key=self._promise)
        if others and self._promise(others[0]) < mean_ratio({t: 1 / _median(one) for t, one in results.items()}):
            other = {tokens: self._final(task, tokens, others[0], otherwise=False) for tokens in self.settings.tokens}
            if self._better(other, results):
                results = other
        task.best = {tokens: 1 / _median(one) for tokens, one in results.items()}
        self.found(tuple(results.values()))

    def _promise(self, group: Sequence[Tried]) -> float:
        """What a packing could come to: in each bucket the best of its candidates."""
        return mean_ratio({tokens: min(one.ratios[tokens] for one in group) for tokens in self.settings.tokens})

    def _better(self, other: Mapping[int, Found], own: Mapping[int, Found]) -> bool:
        """Whether another packing is certain to gain, loses nowhere, and gains more in all than the default's own."""
        gains = {tokens: found.gain for tokens, found in other.items()}
        if not any(one.low > self.settings.least for one in gains.values()):
            return False
        if any(one.median < self.settings.worst for one in gains.values()):
            return False
        mean = mean_ratio({tokens: one.median for tokens, one in gains.items()})
        return mean > max(self.settings.least, mean_ratio({tokens: _median(found) for tokens, found in own.items()}))

    def _final(self, task: Task, tokens: int, group: Sequence[Tried], otherwise: bool = True) -> Found:
        """The best of a group in a bucket, in turns with the default.

        What was chosen for its samples looks better in them than it is, so it is measured once more, and told by that.
        otherwise: whether the default is taken where none is certain to gain enough.
        """
        ranked = sorted(group, key=lambda one: one.ratios[tokens])[: self.settings.finalists]
        # those of earlier runs were not built in this one
        finalists = [made for _, made in self.bench.prepare([(task, one.decisions) for one in ranked])]
        found = self._hold(task, tokens, finalists, otherwise)
        return found if found.decisions == task.default else self._hold(task, tokens, [found.decisions], otherwise)

    def _hold(self, task: Task, tokens: int, finalists: Sequence[Decisions], otherwise: bool) -> Found:
        """Hold candidates against the default."""
        made = self.bench.turns(task, tokens, [task.default, *finalists], self.settings.final_rounds)
        default = tuple(made.seconds[task.default])
        peak = statistics.median(made.peaks) if made.peaks else 0.0
        same = Found(task, tokens, task.default, default, default, peak)
        if made.disturbed and not self.settings.accept_disturbed:
            self.note(f"{task.name} at {tokens} tokens: refused, because the machine was busy with something else")
            return same
        founds = [Found(task, tokens, one, tuple(made.seconds[one]), default, peak) for one in finalists]
        certain = [one for one in founds if one.gain.low > self.settings.least] if otherwise else founds
        return max(certain, key=lambda one: one.gain.median, default=same)


def _median(found: Found) -> float:
    return found.gain.median


def best_so_far(ratios: Iterable[float]) -> list[float]:
    """The largest gain after each trial, by the ratios that were measured in search; at least 1, the default's."""
    best, curve = 1.0, []
    for ratio in ratios:
        best = max(best, 1 / ratio)
        curve.append(best)
    return curve
