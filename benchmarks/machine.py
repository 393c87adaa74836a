"""What a report says about where its figures come from."""

from __future__ import annotations

import datetime
import platform
import re
from importlib.metadata import version
from pathlib import Path

from tilewright.cpu import cpu_features

_FEATURES = {"avx2", "avxvnni", "avx512bw", "avx512vnni", "amx-int8"}


def machine(*packages: str) -> dict[str, str]:
    """CPU, its vector extensions, the date, and the versions of tilewright, apache-tvm, numpy and `packages`."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    names = ("tilewright", "apache-tvm", "numpy", *packages)
    return {
        "cpu": model[1] if model else platform.processor(),
        "levels": ", ".join(sorted(_FEATURES & cpu_features())),
        "date": datetime.date.today().isoformat(),
        "versions": ", ".join(f"{name} {version(name)}" for name in names),
    }
