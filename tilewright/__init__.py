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
_OF_COMPILING = ("pydantic", "safetensors", "tvm", "tvm_ffi")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tilewright' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in _OF_COMPILING:
            raise
        text = f"tilewright.{name} needs the package {error.name}; pip install 'tilewright[compile]'"
        raise ModuleNotFoundError(text, name=error.name) from None
