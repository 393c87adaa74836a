"""Scheduled module to a shared library."""

from __future__ import annotations

import os
from pathlib import Path

import tvm
import tvm.contrib.tvmjs
import tvm.support.cc
import tvm.support.tar  # these four would be imported by the child: imports take locks that other threads may hold
import tvm.support.utils
from tvm import relax
from tvm.target import Target

from tilewright.codegen.child import run_in_child
from tilewright.codegen.passes import PIPELINE, PROGRAM
from tilewright.errors import TilewrightError


def build(module: tvm.IRModule, target: Target, library: Path) -> None:
    """Compile a scheduled `module` and link it to the shared library `library` (needs a C compiler as linker)."""
    program = tvm.transform.Sequential(list(PROGRAM))
    executable = relax.build(module, target, relax_pipeline=program, tir_pipeline=PIPELINE)
    workspace = library.with_suffix(".objects")
    workspace.mkdir()

    def export() -> None:
        os.environ["TMPDIR"] = str(workspace)  # for the linker's own files, which are then removed whatever happens to it
        executable.export_library(str(library), workspace_dir=str(workspace))

    if (reason := run_in_child(export)) is not None:
        raise TilewrightError(
            f"building {library.name} failed ({reason}); gcc must be installed, and {library.parent} have room for it"
        )
