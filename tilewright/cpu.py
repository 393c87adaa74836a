"""What this CPU offers, in LLVM's feature names, without the compiler."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tilewright.cgroups import cpu_quota
from tilewright.errors import ArtifactTargetMismatch, InvalidInput
from tilewright.manifest import LevelRecord

ISA_VARIABLE = "TILEWRIGHT_ISA"
"""The environment variable that names the level to run."""

_CPUINFO = Path("/proc/cpuinfo")
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # asm/unistd_64.h, asm/prctl.h, XFEATURE_XTILEDATA
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
    """Features of this machine's CPU under LLVM's names that this process may use; empty where the kernel does not tell.

    AMX is left out where Linux refuses tiles to this process.
    """
    found = _listed(cpuinfo)
    if "amx-tile" in found and not _tiles_permitted():
        return frozenset(feature for feature in found if not feature.startswith("amx-"))
    return found


def _listed(cpuinfo: Path) -> frozenset[str]:
    try:
        return listed_features(cpuinfo.read_text())
    except OSError:
        return frozenset()


def listed_features(cpuinfo: str) -> frozenset[str]:
    """Features under LLVM's names of a CPU that Linux describes as `cpuinfo`, whether a process may use them or not."""
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    return frozenset(_llvm_name(flag) for flag in flags[1].split()) if flags else frozenset()


@cache
def _tiles_permitted() -> bool:
    """Ask Linux to let this process use AMX tiles, whose state it saves only for processes that ask.

    The permission holds in all threads of the process, those that run already too (Documentation/arch/x86/xstate.rst).
    """
    numbers = (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    return bool(ctypes.CDLL(None).syscall(*(ctypes.c_long(number) for number in numbers)) == 0)


def _llvm_name(flag: str) -> str:
    """Linux writes avx512_vnni, avx_vnni and amx_int8 where LLVM writes avx512vnni, avxvnni and amx-int8."""
    if flag.startswith("amx_"):
        return flag.replace("_", "-")
    return _LLVM_NAMES.get(flag) or (flag.replace("_", "") if flag.startswith("avx") else flag)


def choose_level(levels: Sequence[LevelRecord], available: frozenset[str], isa: str | None = None) -> LevelRecord:
    """The last of `levels` whose features are all `available`; the level named `isa` if one is asked for.

    Raises InvalidInput for an `isa` that is not among `levels`, ArtifactTargetMismatch, naming what the CPU lacks or Linux
    refuses, where it or all of them cannot run.
    """
    held = {level.name: level for level in levels}
    able = [level for level in levels if not level.missing(available)]
    remedy = f"choose {' or '.join(level.name for level in able)}" if able else "compile it here with --target native"
    asked = f"the artifact holds {', '.join(held)}" if isa is None else f"isa or {ISA_VARIABLE} asks for {isa}"
    if isa is not None and isa not in held:
        raise InvalidInput(f"{asked}; the artifact holds {', '.join(held)}; {remedy}")
    level = held[isa] if isa is not None else able[-1] if able else levels[0]
    if missing := level.missing(available):
        refused = "amx-tile" in missing and "amx-tile" in _listed(_CPUINFO)
        lacks = "Linux refuses this process" if refused else "this CPU lacks"
        raise ArtifactTargetMismatch(f"{asked}; {lacks} {', '.join(missing)}, which {level.name} needs; {remedy}")
    return level


def available_cores() -> int:
    """Cores this process may keep busy: those it may run on (taskset, cpusets), as far as a container's CPU quota lasts.

    A quota of 2.5 cores counts as 2: a third thread would have all of them stopped until the period is over.
    """
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))
