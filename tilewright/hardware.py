"""What this machine is, or a CPU known by name, and which ISA levels it can run."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from tvm.target import Target
from tvm.target import codegen as llvm

from tilewright.cpu import available_cores, cpu_features
from tilewright.schedules.isa import ISAS, llvm_cpu, resolve

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Cache:
    """One cache as the first core sees it: `kind` is Data, Instruction or Unified."""

    level: int
    kind: str
    size: int  # bytes


@dataclass(frozen=True)
class Level:
    """An ISA level and the features (LLVM names) that this CPU lacks for it."""

    name: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Hardware:
    """The machine, or a CPU that was named: then without cores and caches.

    llvm_cpu: the name `--target` would take for it, None for a bare ISA level. native: the level that it runs best.
    """

    cpu: str
    llvm_cpu: str | None
    cores: int | None
    caches: tuple[Cache, ...]
    features: tuple[str, ...]
    levels: tuple[Level, ...]
    native: str


def detect() -> Hardware:
    """Describe the machine this process runs on."""
    return _describe(_cpu_name(), str(llvm.llvm_get_system_cpu()), cpu_features(), available_cores(), _caches())


def named(target: str) -> Hardware:
    """Describe what `--target` would compile for: an ISA level, LLVM CPU, instance type or processor; native is `detect`.

    Raises InvalidInput for any other name.
    """
    if target == "native":
        return detect()
    isa, cpu = resolve(target, frozenset()), None if target in ISAS else llvm_cpu(target)
    if cpu is None:
        return _describe(target, None, frozenset(isa.features))
    features = llvm.llvm_get_cpu_features(Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": cpu}))
    return _describe(target, cpu, frozenset(map(str, features)))


def _describe(
    cpu: str, llvm_name: str | None, features: frozenset[str], cores: int | None = None, caches: tuple[Cache, ...] = ()
) -> Hardware:
    levels = tuple(Level(isa.name, tuple(f for f in isa.features if f not in features)) for isa in ISAS.values())
    return Hardware(cpu, llvm_name, cores, caches, tuple(sorted(features)), levels, resolve("native", features).name)


def _cpu_name() -> str:
    try:
        name = re.search(r"^model name\s*:\s*(.*)$", _CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        name = None
    return name[1] if name else platform.machine()


def _caches() -> tuple[Cache, ...]:
    """The caches Linux tells of, none where it does not."""
    caches = []
    for index in sorted(_CACHES.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        caches.append(Cache(int(level), kind, int(size[:-1]) * _UNITS[size[-1]]))
    return tuple(caches)
