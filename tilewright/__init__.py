"""Tilewright: compressed transformer encoders to deployable x86 modules.

Public names are imported on first use, so that loading an artifact never imports the compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.compiler import Artifact, compile
    from tilewright.engine import Engine, load

__all__ = ["Artifact", "Engine", "compile", "load"]

_HOMES = {
    "Artifact": "tilewright.compiler",
    "Engine": "tilewright.engine",
    "compile": "tilewright.compiler",
    "load": "tilewright.engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
