"""What this CPU offers, in LLVM's feature names, without the compiler."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tilewright.errors import ArtifactTargetMismatch
from tilewright.manifest import RequiredIsa

_CPUINFO = Path("/proc/cpuinfo")
_LLVM_NAMES = {
    "abm": "lzcnt",
    "bmi1": "bmi",
    "lahf_lm": "sahf",
    "pclmulqdq": "pclmul",
    "pni": "sse3",
    "rdrand": "rdrnd",
    "sha_ni": "sha",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
}


def cpu_features(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Features of this machine's CPU under LLVM's names; empty where the kernel does not tell."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(_llvm_name(flag) for flag in flags[1].split()) if flags else frozenset()


def _llvm_name(flag: str) -> str:
    """Linux writes avx512_vnni, avx_vnni and amx_int8 where LLVM writes avx512vnni, avxvnni and amx-int8."""
    if flag.startswith("amx_"):
        return flag.replace("_", "-")
    return _LLVM_NAMES.get(flag) or (flag.replace("_", "") if flag.startswith("avx") else flag)


def check_cpu(isa: RequiredIsa, available: frozenset[str]) -> None:
    """Raise ArtifactTargetMismatch, naming what is missing, unless `available` covers what the artifact needs."""
    missing = [feature for feature in isa.features if feature not in available]
    if missing:
        raise ArtifactTargetMismatch(
            f"the artifact needs {isa.name}, this CPU lacks {', '.join(missing)}; compile it here with --target native"
        )


def available_cores() -> int:
    """Cores this process may run on, which a container or taskset can make fewer than the machine has."""
    return len(os.sched_getaffinity(0))
