"""ISA levels as a table: what a level needs from the CPU, how it stores operands, how wide its vectors are.

Which CPU has which feature is asked of LLVM (`tvm.target.codegen`); nothing here lists a CPU's features by hand. What is
listed is which LLVM CPU stands behind the names that people know: cloud instances and the model names of processors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tvm.target import Target
from tvm.target import codegen as llvm

from tilewright.codegen.formats import ATTENTION_PAIRS, ATTENTION_QUADS, PAIRS, QUADS, AttentionOperands, Operands
from tilewright.errors import InvalidInput

_X86 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}


@dataclass(frozen=True)
class Isa:
    """One level of integer arithmetic. Every level is exact: what could saturate is packed so that it does not.

    mcpu: LLVM CPU of the level; code is generated for it whatever CPU is named, so that an artifact needs exactly
    `features` (LLVM names). attributes: features added to mcpu. lanes: int32 of one vector register, of which there are
    `registers`. operands, attention: what linear kernels and attention multiply. vectors: the level whose vector intrinsics it
    uses, empty for its own.
    """

    name: str
    mcpu: str
    attributes: tuple[str, ...]
    features: tuple[str, ...]
    lanes: int
    registers: int
    operands: Operands
    attention: AttentionOperands
    vectors: str = ""

    @property
    def tiles(self) -> bool:
        """Whether the level multiplies AMX tiles."""
        return "amx-int8" in self.features

    def target(self) -> Target:
        """The TVM target of the level."""
        # the SLP vectorizer turns the gather kernels' scalar index loads into vectors and takes them apart again
        config: dict[str, object] = {**_X86, "mcpu": self.mcpu, "cl-opt": ["-vectorize-slp:bool=false"]}
        if self.attributes:
            config["mattr"] = [f"+{name}" for name in self.attributes]
        return Target(config)


_AVX2 = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt")
_AMX = ("amx-tile", "amx-int8")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa("portable", "x86-64", (), (), 4, 16, PAIRS, ATTENTION_PAIRS),
        Isa("avx2", "x86-64-v3", (), _AVX2, 8, 16, PAIRS, ATTENTION_PAIRS),
        Isa("avxvnni", "x86-64-v3", ("avxvnni",), (*_AVX2, "avxvnni"), 8, 16, QUADS, ATTENTION_QUADS),
        Isa("avx512", "x86-64-v4", (), _AVX512, 16, 32, PAIRS, ATTENTION_PAIRS),
        Isa("avx512vnni", "x86-64-v4", ("avx512vnni",), (*_AVX512, "avx512vnni"), 16, 32, QUADS, ATTENTION_QUADS),
        Isa(
            "amx",
            "x86-64-v4",
            ("avx512vnni", *_AMX),
            (*_AVX512, "avx512vnni", *_AMX),
            16,
            32,
            QUADS,
            ATTENTION_QUADS,
            vectors="avx512vnni",
        ),
    )
}
"""Levels from the least to the most capable; a CPU runs the last one whose features it has."""

TARGET_SETS: dict[str, tuple[str, ...]] = {"server": ("avx2", "avx512", "avx512vnni", "amx")}
"""Names for several levels at once. `server`: one for each step that server CPUs took since Haswell and Zen."""

CLOUD: dict[str, str] = {
    "c5": "skylake-avx512",
    "c6i": "icelake-server",
    "c7i": "sapphirerapids",
    "c8i": "graniterapids",
    "c5a": "znver2",
    "c6a": "znver3",
    "c7a": "znver4",
    "c8a": "znver5",
    "m5": "skylake-avx512",
    "m6i": "icelake-server",
    "m7i": "sapphirerapids",
    "m8i": "graniterapids",
    "m6a": "znver3",
    "m7a": "znver4",
    "m8a": "znver5",
    "c2": "cascadelake",
    "c3": "sapphirerapids",
    "c3d": "znver4",
    "c4d": "znver5",
}
"""Instance families of AWS (c5 to m8a) and Google Cloud (c2 to c4d): the oldest CPU that the provider may hand out."""

MODELS: tuple[tuple[str, str], ...] = (
    (r"xeon (bronze|silver|gold|platinum) \d1\d\d[a-z]*", "skylake-avx512"),
    (r"xeon (bronze|silver|gold|platinum) \d2\d\d[a-z]*", "cascadelake"),
    (r"xeon (gold|platinum) \d3\d\dhl?", "cooperlake"),
    (r"xeon (silver|gold|platinum) \d3\d\d[a-z]*", "icelake-server"),
    (r"xeon (bronze|silver|gold|platinum|max) \d4\d\d[a-z]*", "sapphirerapids"),
    (r"xeon (bronze|silver|gold|platinum) \d5\d\d[a-z]*", "emeraldrapids"),
    (r"xeon 6[3579]\d\dp([-+][a-z]*)?", "graniterapids"),
    (r"xeon 6[79]\d\de([-+][a-z]*)?", "sierraforest"),
    (r"epyc 7[\da-z]\d1[a-z]*", "znver1"),
    (r"epyc 7([\da-z]\d2|r32)[a-z]*", "znver2"),
    (r"epyc 7([\da-z]\d3|r13)[a-z]*", "znver3"),
    (r"epyc [89]([\da-z]\d4|r14)[a-z]*", "znver4"),
    (r"epyc 9([\da-z]\d5|r45)[a-z]*", "znver5"),
)
"""Model names of server processors, as `lscpu` prints them less decoration, to LLVM CPUs.

Source: the vendors' numbering. The second digit of a Xeon Scalable's number is its generation; the last of an EPYC's is.
"""


def llvm_cpu(name: str) -> str | None:
    """The LLVM CPU behind `name`: a cloud instance type or family, a processor's model name, or an LLVM name itself."""
    plain = re.sub(r"\((r|tm)\)|\b(intel|amd|cpu|processor)\b|@.*|\b\d+-core\b", " ", name.lower())
    plain = " ".join(plain.split())
    if re.fullmatch(r"\w+\.\w+", plain):
        plain = plain.split(".")[0]  # c6i.12xlarge
    for pattern, cpu in MODELS:
        if re.fullmatch(pattern, plain):
            return cpu
    known = {str(cpu) for cpu in llvm.llvm_get_cpu_archlist(Target(_X86))}
    return CLOUD.get(plain) or (name if name in known else None)


def known_cpu(target: str) -> str | None:
    """The LLVM CPU that `target` means: this machine's for `native`; None where it names levels or several CPUs."""
    if target == "native":
        return str(llvm.llvm_get_system_cpu())
    return None if target in ISAS else llvm_cpu(target)


def resolve(name: str, host_features: frozenset[str]) -> Isa:
    """The level for target `name`: an entry of ISAS, what `llvm_cpu` knows, or `native` for a host with `host_features`.

    Raises InvalidInput for any other name.
    """
    if name in ISAS:
        return ISAS[name]
    if name == "native":
        return [isa for isa in ISAS.values() if host_features.issuperset(isa.features)][-1]
    cpu = llvm_cpu(name)
    if cpu is None:
        levels = ", ".join(["native", *ISAS])
        raise InvalidInput(
            f"unknown target {name!r}; choose {levels}, an LLVM CPU such as icelake-server or znver3, an instance type "
            f"({', '.join(CLOUD)}) or a model name such as 'Xeon Platinum 8375C'"
        )
    target = Target({**_X86, "mcpu": cpu})
    return [isa for isa in ISAS.values() if llvm.target_has_features(list(isa.features), target)][-1]


def resolve_all(names: str, host_features: frozenset[str]) -> tuple[Isa, ...]:
    """The levels for `names`, separated by commas, the least first: each an entry of TARGET_SETS or what `resolve` takes.

    Raises InvalidInput as `resolve` does.
    """
    parts = [part for name in names.split(",") for part in TARGET_SETS.get(name.strip(), (name.strip(),))]
    chosen = {resolve(part, host_features).name for part in parts}
    return tuple(isa for isa in ISAS.values() if isa.name in chosen)
