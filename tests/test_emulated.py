"""Kernels of every ISA level on an emulated CPU that has it, bit for bit NumPy's; an older CPU refuses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import tvm

from tests.emulated_cases import Case, cases
from tests.emulated_cpu import EmulationError
from tests.emulator import MODEL_OF_LEVEL, Kernels, emulate
from tests.kernel_harness import Array
from tilewright.codegen.build import build_library
from tilewright.schedules.isa import ISAS

pytestmark = pytest.mark.skipif(find_spec("bochscpu") is None, reason="bochscpu-python is not installed")


@dataclass(frozen=True)
class Level:
    """All cases of a level, in one library, with what each call left in its output on the emulated CPU."""

    library: Path
    cases: dict[str, Case]
    results: dict[str, list[Array | str]]


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Level]:
    """Compiles and runs all cases of an ISA level, the first time it is asked for."""
    directory = tmp_path_factory.mktemp("emulated")

    @cache
    def run(name: str) -> Level:
        isa = ISAS[name]
        library = directory / f"{name}.so"
        made = {name: make() for name, make in cases(isa).items()}
        build_library(tvm.IRModule({name: case.func for name, case in made.items()}), isa.target(), library)
        calls = [(name, arrays) for name, case in made.items() for arrays, _ in case.calls]
        results: dict[str, list[Array | str]] = {name: [] for name in made}
        for (name, _), left in zip(calls, emulate(MODEL_OF_LEVEL[isa.name], Kernels(library, calls)), strict=True):
            results[name].append(left if isinstance(left, str) else left[-1])
        return Level(library, made, results)

    return run


@pytest.mark.parametrize(("isa", "name"), [(isa, name) for isa in MODEL_OF_LEVEL for name in cases(ISAS[isa])])
def test_on_an_emulated_cpu(levels: Callable[[str], Level], isa: str, name: str) -> None:
    level = levels(isa)
    for (_, check), found in zip(level.cases[name].calls, level.results[name], strict=True):
        assert not isinstance(found, str), found
        check(found)


@pytest.mark.parametrize(
    ("isa", "older", "name"),
    [
        ("amx", "icelake_u", "tile_row_dense"),
        ("avx512vnni", "skylake_x", "row_dense"),
        ("avx512vnni", "haswell", "row_dense"),
        ("avx512", "haswell", "row_dense"),
        ("avxvnni", "haswell", "row_dense"),
    ],
)
def test_an_older_cpu_reports_an_illegal_instruction(levels: Callable[[str], Level], isa: str, older: str, name: str) -> None:
    """The counterproof: the emulated CPUs do tell one level from another."""
    level = levels(isa)
    (left,) = emulate(older, Kernels(level.library, [(name, level.cases[name].calls[0][0])]))
    assert isinstance(left, str)
    assert "#UD illegal instruction" in left
    assert level.library.name in left


def test_a_task_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(EmulationError, match=r"Kernels on haswell took more than 0\.01 s"):
        emulate("haswell", Kernels(tmp_path, []), timeout=0.01)


def test_a_task_that_fails_tells_why(tmp_path: Path) -> None:
    with pytest.raises(EmulationError, match=r"(?s)Kernels on haswell ended with status 1.*nothing\.so"):
        emulate("haswell", Kernels(tmp_path / "nothing.so", []))
