"""Mutated ONNX graphs end in an equal answer or a TilewrightError; `tests/fuzz.py` runs many more."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import fuzz, fuzz_onnx


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return fuzz_onnx.bases(tmp_path_factory.mktemp("bases"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(random=st.randoms(use_true_random=True))
def test_mutations_are_answered_right_or_refused(bases: list[Path], random: Random) -> None:
    base = random.choice(bases)
    path = base.parent / "mutated.onnx"
    path.write_bytes(fuzz_onnx.mutated(base, random))
    assert fuzz_onnx.judge(path) in ("answered", "refused", "unjudged")


def test_unmutated_graphs_are_answered(bases: list[Path]) -> None:
    assert {fuzz_onnx.judge(base) for base in bases} == {"answered"}


def test_a_wrong_answer_is_told(bases: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    other = fuzz_onnx.load(bases[0])
    monkeypatch.setattr(fuzz_onnx, "load", lambda path: other)
    with pytest.raises(AssertionError):
        fuzz_onnx.judge(bases[1])


def test_fuzz_counts_cases() -> None:
    result = fuzz.fuzz("onnx", 0, 3)
    assert sum(result.counts.values()) == 3
    assert not result.failures


def test_fuzz_tells_crashes_and_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies or stops ends its case, and the next one goes on behind it."""
    script = (
        "import os, sys, time; first = int(sys.argv[sys.argv.index('--first') + 1])\n"
        "print('\"ready\"', flush=True)\n"
        "for number in range(first, 5):\n"
        "    if number == 1: os.abort()\n"
        "    if number == 3: time.sleep(60)\n"
        '    print(\'["refused", ""]\', flush=True)'
    )
    started = subprocess.Popen
    monkeypatch.setattr(fuzz, "SECONDS", 10)
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: started([sys.executable, "-c", script, *command[3:]], **options)
    )
    result = fuzz.fuzz("onnx", 0, 5)
    assert result.counts == {"refused": 3, "crashed": 1, "hung": 1}
    assert [failure.split(":")[0] for _, failure in sorted(result.failures.items())] == ["crashed", "hung"]
    assert sorted(result.failures) == [1, 3]
