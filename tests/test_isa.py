"""The ISA table against LLVM, and which level a name resolves to."""

import numpy as np
import pytest
from tvm.target import Target
from tvm.target import codegen as llvm

from tests.kernel_harness import HOST, runs_here
from tilewright.errors import InvalidInput
from tilewright.schedules.isa import ISAS, Isa, resolve

X86 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}
NOTHING: frozenset[str] = frozenset()
RESOLVED = {
    "x86-64": "portable",
    "nehalem": "portable",
    "sandybridge": "portable",
    "haswell": "avx2",
    "skylake": "avx2",
    "znver1": "avx2",
    "znver2": "avx2",
    "znver3": "avx2",
    "x86-64-v3": "avx2",
}


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
def test_target_has_the_features_that_the_artifact_asks_for(isa: Isa) -> None:
    target = isa.target()
    for feature in isa.features:
        assert llvm.target_has_features([feature], target), feature


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
def test_target_generates_nothing_the_artifact_does_not_ask_for(isa: Isa) -> None:
    """Any vector extension of the target is a listed feature: an artifact may not crash on a CPU that it accepts."""
    held = {str(feature) for feature in llvm.llvm_get_cpu_features(isa.target())}
    vector = {
        name for name in held if name.startswith(("avx", "amx")) or name in ("fma", "f16c", "bmi", "bmi2", "gfni", "vaes")
    }
    assert vector <= set(isa.features)


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
def test_operands_fit_together(isa: Isa) -> None:
    linear, attention = isa.operands, isa.attention
    assert {np.dtype(dtype).itemsize for dtype in (linear.activation, linear.weight)} == {4 // linear.pack}  # fill a lane
    widths = {np.dtype(dtype).itemsize for dtype in (attention.query, attention.key, attention.weight)}
    assert widths == {4 // attention.pack}
    assert attention.key_offset == (128 if attention.key.startswith("u") else 0)
    assert (isa.lanes, isa.registers) in ((4, 16), (8, 16), (16, 32))


def test_levels_are_distinct_and_grow() -> None:
    assert [isa.name for isa in ISAS.values()] == list(ISAS)
    assert len({isa.features for isa in ISAS.values()}) == len(ISAS)
    assert next(iter(ISAS.values())).features == ()  # something runs everywhere
    order = list(ISAS.values())
    for lower, higher in ((a, b) for i, a in enumerate(order) for b in order[i + 1 :]):
        assert not set(higher.features) < set(lower.features), (lower.name, higher.name)


@pytest.mark.parametrize("name", ISAS)
def test_a_level_resolves_to_itself(name: str) -> None:
    assert resolve(name, NOTHING) is ISAS[name]


@pytest.mark.parametrize(("name", "level"), RESOLVED.items())
def test_cpus_without_integer_dot_products(name: str, level: str) -> None:
    assert resolve(name, NOTHING).name == level


@pytest.mark.parametrize("name", ["cascadelake", "icelake-server", "sapphirerapids", "znver4"])
def test_cpus_with_vnni_get_at_least_avx512vnni(name: str) -> None:
    assert set(resolve(name, NOTHING).features) >= set(ISAS["avx512vnni"].features)


@pytest.mark.parametrize(
    "name", [*RESOLVED, "cascadelake", "icelake-server", "sapphirerapids", "graniterapids", "znver4", "alderlake"]
)
def test_every_cpu_has_what_its_level_needs(name: str) -> None:
    isa = resolve(name, NOTHING)
    assert llvm.target_has_features(list(isa.features), Target({**X86, "mcpu": name}))


@pytest.mark.parametrize("name", ["", "z80", "AVX2", "avx1024", "znver3 ", "armv8"])
def test_unknown_names_are_refused_with_a_list(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        resolve(name, HOST)
    message = str(caught.value)
    assert message.startswith(f"unknown target {name!r}")
    assert "\n" not in message
    assert all(level in message for level in ISAS)


def test_native_runs_here_and_nothing_better_does() -> None:
    native = resolve("native", HOST)
    assert runs_here(native.name)
    later = list(ISAS)[list(ISAS).index(native.name) + 1 :]
    assert not any(runs_here(name) for name in later)


def test_native_of_a_host_that_tells_nothing_is_portable() -> None:
    assert resolve("native", NOTHING).name == "portable"


@pytest.mark.parametrize("isa", ISAS.values(), ids=ISAS)
def test_native_of_a_host_with_just_a_level_is_that_level(isa: Isa) -> None:
    assert set(resolve("native", frozenset(isa.features)).features) == set(isa.features)
