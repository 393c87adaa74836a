"""What this machine is, and which ISA levels it can run."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from tvm.target import codegen as llvm

from tilewright.cpu import available_cores, cpu_features
from tilewright.schedules.isa import ISAS, resolve

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
    """The machine. `llvm_cpu` is the name `--target` would take for it; `native` the level that `native` picks."""

    cpu: str
    llvm_cpu: str
    cores: int
    caches: tuple[Cache, ...]
    features: tuple[str, ...]
    levels: tuple[Level, ...]
    native: str


def detect() -> Hardware:
    """Describe the machine this process runs on."""
    features = cpu_features()
    return Hardware(
        cpu=_cpu_name(),
        llvm_cpu=str(llvm.llvm_get_system_cpu()),
        cores=available_cores(),
        caches=_caches(),
        features=tuple(sorted(features)),
        levels=tuple(Level(isa.name, tuple(f for f in isa.features if f not in features)) for isa in ISAS.values()),
        native=resolve("native", features).name,
    )


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
