"""Names of CPUs that people know, against LLVM's list of CPUs."""

import re

import pytest
from tvm.target import Target
from tvm.target import codegen as llvm

from tilewright.errors import InvalidInput
from tilewright.schedules.isa import CLOUD, MODELS, llvm_cpu, resolve

LLVM_CPUS = {str(cpu) for cpu in llvm.llvm_get_cpu_archlist(Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu"}))}
LEVELS = {
    "skylake-avx512": "avx512",
    "cascadelake": "avx512vnni",
    "cooperlake": "avx512vnni",
    "icelake-server": "avx512vnni",
    "emeraldrapids": "amx",
    "graniterapids": "amx",
    "alderlake": "avxvnni",
    "sierraforest": "avxvnni",
    "znver4": "avx512vnni",
    "znver5": "avx512vnni",
    "c5": "avx512",
    "c6i.12xlarge": "avx512vnni",
    "c6a": "avx2",
    "c7i": "amx",
}
PROCESSORS = {
    "Xeon Platinum 8375C": "icelake-server",
    "Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz": "icelake-server",
    "Intel(R) Xeon(R) Platinum 8124M CPU @ 3.00GHz": "skylake-avx512",
    "Intel(R) Xeon(R) Platinum 8275CL CPU @ 3.00GHz": "cascadelake",
    "Intel(R) Xeon(R) Platinum 8380HL CPU @ 2.90GHz": "cooperlake",
    "Intel(R) Xeon(R) Platinum 8488C": "sapphirerapids",
    "INTEL(R) XEON(R) GOLD 6530": "emeraldrapids",
    "Intel(R) Xeon(R) 6972P": "graniterapids",
    "Intel(R) Xeon(R) 6780E": "sierraforest",
    "AMD EPYC 7571": "znver1",
    "AMD EPYC 7R32": "znver2",
    "AMD EPYC 7R13 Processor": "znver3",
    "AMD EPYC 9654 96-Core Processor": "znver4",
    "AMD EPYC 9R14": "znver4",
    "AMD EPYC 9965 192-Core Processor": "znver5",
}


@pytest.mark.parametrize("cpu", sorted({*CLOUD.values(), *(cpu for _, cpu in MODELS)}))
def test_tables_name_cpus_of_llvm(cpu: str) -> None:
    assert cpu in LLVM_CPUS


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors(name: str) -> None:
    assert llvm_cpu(name) == PROCESSORS[name]


def test_every_pattern_has_a_processor() -> None:
    assert {cpu for _, cpu in MODELS} == set(PROCESSORS.values())


@pytest.mark.parametrize("name", LEVELS)
def test_levels(name: str) -> None:
    assert resolve(name, frozenset()).name == LEVELS[name]


@pytest.mark.parametrize("name", ["", "c", "c9000.large", "Xeon", "Xeon Platinum 9999X", "EPYC 123", "pentium 5"])
def test_other_names_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(f"unknown target {name!r}; choose native, portable")) as caught:
        resolve(name, frozenset())
    assert "\n" not in str(caught.value)
