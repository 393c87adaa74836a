"""Whether a record still holds: its kernels are those that were measured, and are as fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilewright.codegen.layer_kernels import Decisions
from tilewright.codegen.workload import Workload
from tilewright.tuning.rebuilt import rebuilt
from tilewright.tuning.records import Log, Record
from tilewright.tuning.replay import Stale, check
from tilewright.tuning.search import Bench
from tilewright.tuning.statistics import Gain, gain
from tilewright.tuning.tasks import Task

ROUNDS = 25


def still_valid(record: Record) -> Decisions | Stale:
    """The decisions of `record`, or why a compile would skip it."""
    kernel = rebuilt(record)
    return kernel if isinstance(kernel, Stale) else check(record, kernel)


@dataclass(frozen=True)
class Verdict:
    """What came of measuring a record again, on a random matrix of its density. reason: why it was not measured, if so."""

    record: Record
    now: Gain | None = None
    reason: str = ""

    @property
    def confirmed(self) -> bool:
        """Whether the decisions are not certain to be slower than the default."""
        return self.now is not None and self.now.high >= 1.0


def verify(log: Log, bench: Bench, threads: int, tick: Callable[[int, int], None] = lambda done, total: None) -> list[Verdict]:
    """Measure every record of `log` for so many threads again."""
    verdicts = []
    for done, (key, record) in enumerate(sorted(log.records.items())):
        tick(done, len(log.records))
        task, kernel = Workload.parse(key), rebuilt(record)
        found = kernel if isinstance(kernel, Stale) else check(record, kernel)
        if isinstance(found, Stale) or isinstance(kernel, Stale):
            assert isinstance(found, Stale)
            verdicts.append(Verdict(record, reason=found.reason))
        elif task.threads != threads:
            verdicts.append(Verdict(record, reason=f"for {task.threads} threads"))
        elif record.decisions == record.default:
            verdicts.append(Verdict(record, Gain(1.0, 1.0, 1.0)))
        else:
            assert kernel.spec.decisions is not None
            one = Task(kernel, 1, (kernel.spec.decisions, found))
            if len(bench.prepare([(one, made) for made in one.space])) < len(one.space):
                verdicts.append(Verdict(record, reason="does not build"))
                continue
            made = bench.turns(one, task.tokens, one.space, ROUNDS)
            verdicts.append(Verdict(record, gain(made.seconds[one.default], made.seconds[found])))
    return verdicts
