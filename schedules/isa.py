"""ISA levels as a table: what a level needs from the CPU, how it stores operands, how wide its vectors are.

Which CPU has which feature is asked of LLVM (`tvm.target.codegen`); nothing here lists a CPU's features by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.target import Target
from tvm.target import codegen as llvm

from tilewright.codegen.workload import INT8_QUADS, INT16_PAIRS, Operands
from tilewright.errors import InvalidInput


@dataclass(frozen=True)
class Isa:
    """One level of integer arithmetic. Every level is exact: none uses an instruction that saturates intermediate sums.

    mcpu: LLVM CPU of the level; code is generated for it whatever CPU is named, so that an artifact needs exactly
    `features` (LLVM names). attributes: features added to mcpu. lanes: int32 accumulators of one vector register.
    operands: how integers are stored.
    """

    name: str
    mcpu: str
    attributes: tuple[str, ...]
    features: tuple[str, ...]
    lanes: int
    operands: Operands

    def target(self) -> Target:
        """The TVM target of the level."""
        config: dict[str, object] = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": self.mcpu}
        if self.attributes:
            config["mattr"] = [f"+{name}" for name in self.attributes]
        return Target(config)


_AVX2 = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa("portable", "x86-64", (), (), 4, INT16_PAIRS),
        Isa("avx2", "x86-64-v3", (), _AVX2, 8, INT16_PAIRS),
        Isa("avx512vnni", "x86-64-v4", ("avx512vnni",), (*_AVX512, "avx512vnni"), 16, INT8_QUADS),
    )
}
"""Levels from the least to the most capable."""


def resolve(name: str, host_features: frozenset[str]) -> Isa:
    """The level for target `name`: an entry of ISAS, an LLVM CPU name, or `native` for a host with `host_features`.

    Raises InvalidInput for any other name.
    """
    if name in ISAS:
        return ISAS[name]
    if name == "native":
        return [isa for isa in ISAS.values() if host_features.issuperset(isa.features)][-1]
    x86 = Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu"})
    if name not in {str(cpu) for cpu in llvm.llvm_get_cpu_archlist(x86)}:
        levels = ", ".join(["native", *ISAS])
        raise InvalidInput(f"unknown target {name!r}; choose {levels} or an LLVM CPU such as icelake-server or znver3")
    cpu = Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": name})
    return [isa for isa in ISAS.values() if llvm.target_has_features(list(isa.features), cpu)][-1]
