"""Tuning a model: its kernels' tasks, one search over them, and the log that grows meanwhile."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.codegen.layer_kernels import layer_kernels
from tilewright.codegen.model import EncoderModel
from tilewright.schedules import rates
from tilewright.schedules.choice import plan
from tilewright.schedules.isa import Isa
from tilewright.tuning.cost import CostModel, Sample, samples_of
from tilewright.tuning.records import Log, Machine, Record, Trial, encode
from tilewright.tuning.replay import Stale, check, kernel_hash, replay
from tilewright.tuning.search import Bench, Budget, Found, Search, Settings
from tilewright.tuning.tasks import Task, Tried, shares, tasks_of

MOST_ROUNDS = 3
"""How often kernels are tuned anew whose neighbours came to write or read other formats."""


@dataclass
class Session:
    """One tuning of a padded model at a level, into `path`. cpu: whose rates the compiler would plan with, if any.

    base: what the log held before. changed: is called after the log was written.
    """

    model: EncoderModel
    isa: Isa
    cpu: str | None
    machine: Machine
    bench: Bench
    settings: Settings
    path: Path
    base: Log = field(default_factory=Log)
    earlier: Sequence[Sample] = ()
    note: Callable[[str], None] = lambda text: None
    progress: Callable[[Task], None] = lambda task: None
    changed: Callable[[], None] = lambda: None
    tasks: list[Task] = field(default_factory=list)
    records: dict[str, Record] = field(default_factory=dict)

    @property
    def log(self) -> Log:
        """What was known and what was found; a workload that was tuned anew is known by what was found now."""
        old = {key: record for key, record in self.base.records.items() if key not in self.records}
        return Log(old, self.base.machines, self.base.foreign).merged(Log.of(self.records.values(), [self.machine]))

    def run(self, budget: Budget) -> None:
        """Tune until the budget is spent. Records of a task are in the log as soon as they are certain."""
        model = CostModel(rates.find(self.isa.name, self.cpu), [*self.earlier, *samples_of(self.base)], self.settings.seed)
        search = Search(self.bench, model, self.settings, self._found, self.note, self.progress)
        for _ in range(MOST_ROUNDS):
            new = self.waiting()
            if not new or not budget.trials_left(1):
                return
            self.tasks += new
            search.run(new, budget)

    def waiting(self) -> list[Task]:
        """Tasks that nobody began, of the model as the log has it compiled by now."""
        default = plan(self.model, self.isa, self.cpu)
        now = replay(self.model, default, self.log, self.settings.threads).plan
        kernels = [
            replace(kernel, spec=kernel.decided(own.spec.decisions))
            for kernel, own in zip(layer_kernels(self.model, now), layer_kernels(self.model, default), strict=True)
            if own.spec.decisions is not None
        ]
        known = [task.kernel.workload.key() for task in self.tasks]
        tasks = tasks_of(kernels, known)
        for task in tasks:
            task.trials = list(self._tried(task))
        return tasks

    def _tried(self, task: Task) -> Iterable[Tried]:
        """The trials of earlier runs on the same kind of machine that still count: they need not be made again."""
        encoded = {str(encode(made)): made for made in task.space}
        found: dict[str, Tried] = {}
        for tokens in self.settings.tokens:
            record = self.base.records.get(task.workload(tokens, self.settings.threads).key())
            if record is None or record.machine != self.machine.name or isinstance(check(record, task.kernel), Stale):
                return ()
            for one in record.trials:
                text = str(encode(task.default) | one.changes)
                if text in encoded:
                    found.setdefault(text, Tried(encoded[text], {})).ratios[tokens] = one.ratio
        return [one for one in found.values() if one.ratios.keys() == set(self.settings.tokens)]

    def _found(self, results: Sequence[Found]) -> None:
        for found in results:
            record = self._record(found)
            self.records[record.key] = record
        self.log.write(self.path)
        self.changed()

    def _record(self, found: Found) -> Record:
        task, kernel = found.task, found.task.kernel
        default = encode(task.default)
        trials = []
        for one in task.trials:
            if (ratio := one.ratios.get(found.tokens)) is not None:
                values = encode(one.decisions)
                changes = {name: value for name, value in values.items() if default.get(name) != value}
                trials.append(Trial(changes, _rounded(ratio)))
        return Record(
            key=task.workload(found.tokens, self.settings.threads).key(),
            decisions=encode(found.decisions),
            default=default,
            hash=kernel_hash(kernel.decided(found.decisions), kernel.detail),
            default_hash=kernel_hash(kernel.spec, kernel.detail),
            best_seconds=tuple(map(_rounded, found.best_seconds)),
            default_seconds=tuple(map(_rounded, found.default_seconds)),
            peak=self._peak(found),
            machine=self.machine.name,
            trials=tuple(trials),
            versions={name: version(name) for name in ("tilewright", "apache-tvm")},
        )

    def _peak(self, found: Found) -> tuple[float, float]:
        """The share of the peak that the best and the default decisions reach."""
        kernel = found.task.kernel
        macs = found.task.macs(found.tokens, int(np.count_nonzero(kernel.weight)) if kernel.parts else 0)
        if not found.peak:
            return 0.0, 0.0
        best, default = (
            macs / statistics.median(seconds) / 1e9 / found.peak for seconds in (found.best_seconds, found.default_seconds)
        )
        return round(best, 4), round(default, 4)

    def drop(self, tokens: int) -> None:
        """Give a bucket its defaults back: what was found for it did not survive in the whole encoder."""
        for key, record in self.records.items():
            if f":t{tokens}:" in key:
                self.records[key] = replace(
                    record, decisions=record.default, hash=record.default_hash, best_seconds=record.default_seconds
                )
        self.log.write(self.path)


def report(session: Session) -> list[dict[str, Any]]:
    """What a session found, a row for each workload and bucket."""
    share = shares(session.tasks) if session.records else {}
    rows = []
    for task in session.tasks:
        for tokens in session.settings.tokens:
            if (record := session.records.get(task.workload(tokens, session.settings.threads).key())) is None:
                continue
            gain = record.gain
            rows.append(
                {
                    "workload": task.name,
                    "key": record.key,
                    "tokens": tokens,
                    "share": share[task.kernel.workload.key()],
                    "trials": len(record.trials),
                    "candidates": len(task.space),
                    "microseconds": statistics.median(record.best_seconds) * 1e6,
                    "default_microseconds": statistics.median(record.default_seconds) * 1e6,
                    "gain": gain.median,
                    "low": gain.low,
                    "high": gain.high,
                    "peak": record.peak[0],
                    "default_peak": record.peak[1],
                    "changes": {name: value for name, value in record.decisions.items() if record.default[name] != value},
                }
            )
    return rows


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
