"""What there is to tune about a model: its distinct kernels, how much of its time each takes, and whose turn it is."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tilewright.codegen.layer_kernels import Decisions, LayerKernel
from tilewright.codegen.workload import Workload
from tilewright.tuning.candidates import candidates


@dataclass
class Tried:
    """A candidate and its seconds a call over the default's, by tokens, medians of turns."""

    decisions: Decisions
    ratios: dict[int, float]


@dataclass
class Task:
    """A kernel that layers share. calls: in one run of the model. default_seconds: a call of the default, by tokens.

    best: the ratio of the best accepted decisions, by tokens.
    """

    kernel: LayerKernel
    calls: int
    space: tuple[Decisions, ...]
    default_seconds: dict[int, float] = field(default_factory=dict)
    trials: list[Tried] = field(default_factory=list)
    best: dict[int, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its workload's, for people."""
        task = self.kernel.workload
        block = "dense" if task.block is None else f"{task.block[0]}x{task.block[1]} {task.density}%"
        return f"{self.kernel.slot} {task.n}x{task.k} {block}" if task.op == "linear" else f"attention {task.n}x{task.k}"

    @property
    def default(self) -> Decisions:
        """Its default decisions."""
        return self.space[0]

    def workload(self, tokens: int, threads: int) -> Workload:
        """What a record is about."""
        return self.kernel.workload.at(tokens, threads)

    def untried(self) -> list[Decisions]:
        """Candidates that nobody measured."""
        done = {one.decisions for one in self.trials} | {self.default}
        return [made for made in self.space if made not in done]

    def macs(self, tokens: int, nonzeros: int) -> int:
        """Multiplications of a call that cannot be left out: with non-zero weights, or of attention in one sequence."""
        task = self.kernel.workload
        return 2 * tokens * tokens * task.n * task.k if task.op == "attention" else tokens * nonzeros


def tasks_of(kernels: Iterable[LayerKernel], known: Iterable[str] = ()) -> list[Task]:
    """A task for each distinct workload of a model's kernels but the `known` ones, by key, in order."""
    skipped, found = set(known), dict[str, Task]()
    for kernel in kernels:
        key = kernel.workload.key()
        if key in found:
            found[key].calls += 1
        elif key not in skipped:
            found[key] = Task(kernel, 1, candidates(kernel))
    return list(found.values())


def shares(tasks: Sequence[Task]) -> Mapping[str, float]:
    """The share of the model's time that each task takes now, the mean over the buckets, by the key of its workload."""
    buckets = sorted({tokens for task in tasks for tokens in task.default_seconds})
    now = {
        tokens: [task.calls * task.default_seconds[tokens] * task.best.get(tokens, 1.0) for task in tasks] for tokens in buckets
    }
    means = np.mean([np.asarray(times) / sum(times) for times in now.values()], axis=0) if buckets else np.ones(len(tasks))
    return {task.kernel.workload.key(): float(share) for task, share in zip(tasks, means, strict=True)}


def next_task(tasks: Sequence[Task], batch: int, limit: int) -> Task | None:
    """Whose turn it is: batches are given out as seats are by votes (D'Hondt), the votes being shares of the model's time.

    None where each task has had `limit` trials or has no candidate left.
    """
    share = shares(tasks)
    able = [task for task in tasks if len(task.trials) < limit and task.untried()]
    return max(
        able, key=lambda task: (share[task.kernel.workload.key()] / (len(task.trials) // batch + 1), task.name), default=None
    )


def mean_ratio(ratios: Mapping[int, float]) -> float:
    """One number for all buckets, which count the same: the geometric mean."""
    return statistics.geometric_mean(ratios.values())
