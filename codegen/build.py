"""Scheduled module to a shared library."""

from __future__ import annotations

from pathlib import Path

import tvm
from tvm import relax
from tvm.target import Target

from tilewright.codegen.passes import PIPELINE, PROGRAM
from tilewright.errors import TilewrightError


def build(module: tvm.IRModule, target: Target, library: Path) -> None:
    """Compile a scheduled `module` and link it to the shared library `library` (needs a C compiler as linker)."""
    program = tvm.transform.Sequential(list(PROGRAM))
    executable = relax.build(module, target, relax_pipeline=program, tir_pipeline=PIPELINE)
    try:
        executable.export_library(str(library))
    except RuntimeError as error:
        raise TilewrightError(f"linking {library.name} failed ({str(error).splitlines()[0]}); is gcc installed?") from error
