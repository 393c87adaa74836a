"""The highest throughput within a latency bound, over batch, instances and threads of each instance.

The protocol of latency-bound throughput: instances run side by side on cores of their own, and what counts is the sum of
their sequences per second while the latency of a call, at a percentile over the calls of all, keeps the bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tilewright.errors import InvalidInput

_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@dataclass(frozen=True)
class Setting:
    """How to use the cores: `instances` processes of `threads` threads, each running `batch` sequences a call."""

    threads: int
    instances: int
    batch: int


@dataclass(frozen=True)
class Trial:
    """A setting's latency in milliseconds, at the percentile asked for, and sequences per second of all instances."""

    setting: Setting
    latency: float
    throughput: float
    calls: int


def parse_bound(text: str) -> float:
    """Milliseconds of a positive duration: 10ms, 0.5s, 800us, or 10, which is milliseconds; raises InvalidInput."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(us|ms|s)?\s*", text)
    bound = float(match[1]) * _MILLISECONDS[match[2] or "ms"] if match else 0.0
    if not 0 < bound < math.inf:
        raise InvalidInput(f"latency bound {text} is no positive duration; give one such as 10ms, 0.5s or 800us")
    return bound


def thread_counts(cores: int) -> list[int]:
    """The threads that each of 1, 2, ... `cores` instances may have, ascending.

    Another count would leave cores idle that the same number of instances could use.
    """
    return sorted({cores // instances for instances in range(1, cores + 1)})


def climb(threads: int, cores: int, max_batch: int, bound: float, measure: Callable[[Setting], Trial]) -> list[Trial]:
    """Trials of instances of `threads` threads, the best of those that keep `bound` milliseconds among them.

    Starts with as many instances as fit and batch 1. A larger batch and a further instance are taken not to lower the
    latency, a further instance not to lower the throughput. So wherever the bound is kept the batch can grow, and where it
    is not, no larger batch can keep it with as many instances: the walk needs max_batch + cores / threads trials at most.
    """
    trials: list[Trial] = []
    instances, batch = cores // threads, 1
    while instances > 0 and batch <= max_batch:
        trials.append(measure(Setting(threads, instances, batch)))
        if trials[-1].latency <= bound:
            batch += 1
        else:
            instances -= 1
    return trials


def best(trials: Sequence[Trial], bound: float) -> Trial | None:
    """The trial of highest throughput within `bound` milliseconds; None if no trial is."""
    return max((trial for trial in trials if trial.latency <= bound), key=lambda trial: trial.throughput, default=None)


def summarize_instances(setting: Setting, samples: Sequence[Sequence[float]], percentile: float) -> Trial:
    """The trial of which `samples` are the seconds of each call, by instance."""
    calls = np.concatenate([np.asarray(own) for own in samples])
    throughput = sum(setting.batch * len(own) / sum(own) for own in samples)
    return Trial(setting, float(np.percentile(calls, percentile)) * 1e3, throughput, len(calls))
