"""The search for throughput within a latency, and instances that share weights."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tests import toy
from tests.test_cli import ok, ok_json, refused
from tilewright.errors import InvalidArtifact, InvalidInput, TilewrightError
from tilewright.instances import Instances
from tilewright.throughput import Setting, Trial, best, climb, parse_bound, summarize_instances, thread_counts

CORE = min(os.sched_getaffinity(0))


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, int, Callable[[Setting], Trial]]:
    """Cores, the largest batch, and a machine: latency [threads, instances, batch] grows with batch and instances and falls
    with threads; throughput grows with instances and threads, and does as it likes with batch."""
    cores, batches = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    values = arrays(np.int64, (cores, cores, batches), elements=st.integers(1, 30))
    latency = np.maximum.accumulate(np.maximum.accumulate(draw(values), 1), 2)
    latency = np.minimum.accumulate(latency, 0)
    throughput = np.maximum.accumulate(np.maximum.accumulate(draw(values), 0), 1)

    def measure(setting: Setting) -> Trial:
        index = setting.threads - 1, setting.instances - 1, setting.batch - 1
        return Trial(setting, float(latency[index]), float(throughput[index]), 1)

    return cores, batches, measure


@given(tables(), st.integers(1, 30))
def test_search_finds_the_best_of_all_settings(table: tuple[int, int, Callable[[Setting], Trial]], bound: int) -> None:
    cores, batches, measure = table
    everything = [
        measure(Setting(threads, instances, batch))
        for threads, instances, batch in itertools.product(range(1, cores + 1), range(1, cores + 1), range(1, batches + 1))
        if threads * instances <= cores
    ]
    tried = [trial for threads in thread_counts(cores) for trial in climb(threads, cores, batches, bound, measure)]
    assert all(trial.setting.threads * trial.setting.instances <= cores for trial in tried)
    assert len(tried) == len({trial.setting for trial in tried}) <= sum(batches + cores // t for t in thread_counts(cores))
    expected, found = best(everything, bound), best(tried, bound)
    assert (found and found.throughput) == (expected and expected.throughput)


@pytest.mark.parametrize(
    ("text", "milliseconds"), [("10ms", 10), ("10", 10), (" 0.5 s ", 500), ("250us", 0.25), (".5ms", 0.5), ("2.s", 2000)]
)
def test_bounds(text: str, milliseconds: float) -> None:
    assert parse_bound(text) == pytest.approx(milliseconds)


@pytest.mark.parametrize("text", ["", "ms", "abc", "-3ms", "0", "0ms", "nan", "inf", "1e3ms", "10 min", "9" * 400 + "s"])
def test_bad_bounds(text: str) -> None:
    with pytest.raises(InvalidInput, match="latency bound"):
        parse_bound(text)


def test_throughput_is_the_sum_over_instances() -> None:
    trial = summarize_instances(Setting(1, 2, 4), [[0.1] * 10, [0.2] * 5], percentile=100)
    assert (trial.latency, trial.throughput, trial.calls) == (pytest.approx(200), pytest.approx(4 / 0.1 + 4 / 0.2), 15)


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy of 128 MB, of which a call reads every page."""
    root, shift = tmp_path_factory.mktemp("heavy"), np.zeros(128_000_000, np.int8)
    return toy.write(root / "heavy.tw", toy.build_library(root / "heavy.so", len(shift)), shift=shift)


def test_instances_share_the_weights(heavy: Path) -> None:
    with Instances(heavy) as instances:
        instances.start([[CORE]])
        instances.measure(1, 1, 5, 0.0)
        (alone,) = instances.memory()
        instances.start([[CORE], [CORE]])
        samples = instances.measure(3, 1, 5, 0.05)
        together = instances.memory()
    assert len(samples) == 3 and all(own for own in samples)
    assert alone.weights >= 128e6
    assert [memory.weights for memory in together] == [alone.weights] * 3
    assert all(memory.weights_copied == 0 for memory in (alone, *together))
    growth = (sum(memory.proportional for memory in together) - alone.proportional) / 2
    assert growth < alone.weights / 3
    assert all(memory.private < alone.weights / 3 for memory in together)


def test_instances_run_at_the_same_time_on_their_cores(toy_artifact: Path) -> None:
    with Instances(toy_artifact) as instances:
        instances.start([[CORE]] * 2)
        assert [os.sched_getaffinity(pid) for pid in instances.pids] == [{CORE}] * 2
        began = time.monotonic()
        samples = instances.measure(2, 2, 5, 0.5)
        elapsed = time.monotonic() - began
        assert [len(own) for own in instances.measure(1, 1, 5, 0.0)] == [1]
    assert sum(map(sum, samples)) > elapsed  # one after the other, they could not fill more than the time there was


def test_a_dead_instance_is_an_error_and_takes_the_others_along(toy_artifact: Path) -> None:
    with Instances(toy_artifact) as instances:
        instances.start([[CORE], [CORE]])
        first, second = instances.pids
        os.kill(second, signal.SIGKILL)
        with pytest.raises(TilewrightError, match="instance 2 of 2 was killed by signal 9"):
            instances.measure(2, 1, 5, 0.1)
    assert not alive(first)


def test_an_instance_says_why_it_cannot_load(tmp_path: Path) -> None:
    with Instances(tmp_path / "none.tw") as instances, pytest.raises(InvalidArtifact, match="not an artifact"):
        instances.start([[CORE]])


def test_command_line(toy_artifact: Path) -> None:
    arguments = ("benchmark", toy_artifact, "--cores", "1", "--seq-len", "5", "--duration", "0.02", "--max-batch", "2")
    result = ok_json(*arguments, "--latency-bound", "10s")
    assert [(row["threads"], row["instances"], row["batch"]) for row in result["trials"]] == [(1, 1, 1), (1, 1, 2)]
    assert result["best"]["throughput"] == max(row["throughput"] for row in result["trials"])
    assert result["memory"]["further_instance_bytes"] is None
    assert "best:" in ok(*arguments, "--latency-bound", "10s")
    impossible = ok_json(*arguments, "--latency-bound", "0.001us")
    assert impossible["best"] is None
    assert impossible["smallest_latency"]["latency_ms"] > 0
    assert "nothing keeps" in ok(*arguments, "--latency-bound", "0.001us")


def test_command_line_refuses(toy_artifact: Path) -> None:
    command = ("benchmark", toy_artifact, "--latency-bound")
    for bad in ("abc", "-3ms", "0ms"):
        assert "latency bound" in refused(2, "benchmark", toy_artifact, f"--latency-bound={bad}")
    assert "available" in refused(2, *command, "10ms", "--cores", "100000")
    assert "--latency-bound" in refused(2, *command, "10ms", "--batch", "2")
    assert "--cores" in refused(2, "benchmark", toy_artifact, "--cores", "1")
    assert f"at most {toy.LIMITS.max_positions}" in refused(2, *command, "10ms", "--cores", "1", "--seq-len", "33")


def test_interrupt_ends_the_instances(toy_artifact: Path) -> None:
    command = [sys.executable, "-m", "tilewright", "benchmark", str(toy_artifact), "--latency-bound", "10s", "--seq-len", "5"]
    process = subprocess.Popen([*command, "--cores", "1", "--duration", "60"], stderr=subprocess.PIPE, text=True)
    while not (children := instances_of(process.pid)) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert children
    # an instance that was being started is not known to the command yet: it ends by itself, when it finds nobody to talk to
    deadline = time.monotonic() + 60
    while any(alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def instances_of(parent: int) -> list[int]:
    children = [int(pid) for file in Path(f"/proc/{parent}/task").glob("*/children") for pid in file.read_text().split()]
    return [pid for pid in children if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
