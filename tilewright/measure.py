"""What measuring an engine returns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class BenchmarkResult:
    """Latency percentiles of one call in milliseconds, and sequences per second at the median."""

    batch: int
    seq_len: int
    threads: int
    iterations: int
    p50: float
    p90: float
    p99: float
    throughput: float


@dataclass(frozen=True)
class KernelTime:
    """Calls of one kernel in one run of a batch and their total time; `other` is checks, packing and copies."""

    name: str
    calls: int
    microseconds: float


class KernelClock:
    """Sums time by kernel; `record` is called with each kernel's name and seconds."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = {}
        self._seconds: dict[str, float] = {}

    def record(self, kernel: str, seconds: float) -> None:
        """Add one call."""
        self._calls[kernel] = self._calls.get(kernel, 0) + 1
        self._seconds[kernel] = self._seconds.get(kernel, 0.0) + seconds

    def summary(self, runs: int, run_seconds: float) -> tuple[KernelTime, ...]:
        """Means over `runs`, the largest first, then what `run_seconds`, one run without recording, leaves over."""
        times = [KernelTime(name, calls // runs, self._seconds[name] / runs * 1e6) for name, calls in self._calls.items()]
        times.sort(key=lambda kernel: -kernel.microseconds)
        rest = run_seconds * 1e6 - sum(kernel.microseconds for kernel in times)
        return (*times, KernelTime("other", 1, max(rest, 0.0)))


def random_ids(vocab_size: int, batch: int, seq_len: int) -> NDArray[np.int64]:
    """Token ids [batch, seq_len] to measure with, the same in every process."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, seq_len))


def time_calls(call: Callable[[], object], *, duration: float, iterations: int | None, warmup: int) -> list[float]:
    """Seconds of each call: `iterations` of them, or those that fit in `duration`, after `warmup` untimed ones."""
    for _ in range(warmup):
        call()
    samples: list[float] = []
    end = time.perf_counter() + duration
    while len(samples) < iterations if iterations else not samples or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def summarize(samples: list[float], batch: int, seq_len: int, threads: int) -> BenchmarkResult:
    """Percentiles of `samples`, which are seconds."""
    p50, p90, p99 = (float(value) for value in np.percentile(samples, (50, 90, 99)) * 1e3)
    return BenchmarkResult(batch, seq_len, threads, len(samples), p50, p90, p99, batch / p50 * 1e3)
