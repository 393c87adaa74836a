"""Scheduled module to a shared library of its kernels and the program that calls them."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.target import Target

from tilewright.codegen.child import run_in_child
from tilewright.codegen.flatten import flatten
from tilewright.codegen.passes import PIPELINE, PROGRAM
from tilewright.errors import TilewrightError
from tilewright.program import Program

_LINK = ("gcc", "-shared", "-fPIC", "-O2", "-Wl,-Bsymbolic", "-Wl,--strip-debug", "-Wl,-z,noexecstack")

_SUPPORT = """\
void (*tilewright_raise)(const char *kind, const char **parts, int count);

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int count)
{
    if (tilewright_raise) tilewright_raise(kind, parts, count);
}
"""
"""What kernels call when arguments do not fit. It is part of the library, so that the library needs no other to be loaded; the
runtime sets the variable, as it sets those by which kernels launch parallel loops (`runtime/kernel.c`)."""


def build(module: tvm.IRModule, target: Target, library: Path, parameters: Sequence[str]) -> Program:
    """Compile the kernels of a scheduled `module` into the shared library `library`; returns the program of its main function.

    parameters: the names of the elements of the last argument of main. Linking needs gcc.
    """
    planned = tvm.transform.Sequential(list(PROGRAM))(module)
    build_library(planned, target, library)
    return flatten(planned["main"], parameters)


def build_library(module: tvm.IRModule, target: Target, library: Path) -> None:
    """Compile the kernels of `module`, which keep their names, into the shared library `library`, and the object beside it."""
    kernels = {
        variable.name_hint: function.with_attr("global_symbol", variable.name_hint)
        for variable, function in module.functions.items()
        if isinstance(function, tirx.PrimFunc)
    }
    compiled = tvm.compile(tvm.IRModule(dict(sorted(kernels.items()))), target=target, tir_pipeline=PIPELINE).mod
    with tempfile.TemporaryDirectory(dir=library.parent) as workspace:
        if (reason := run_in_child(lambda: _link(compiled, Path(workspace), library.absolute()))) is not None:
            raise TilewrightError(
                f"building {library.name} failed ({reason}); gcc must be installed, and {library.parent} have room for it"
            )


def _link(compiled: Any, workspace: Path, library: Path) -> None:
    kernels = library.with_suffix(".o")
    compiled.write_to_file(str(kernels))
    (workspace / "support.c").write_text(_SUPPORT)
    environment = os.environ | {"TMPDIR": str(workspace)}  # the linker's own files are then removed whatever happens to it
    command = [*_LINK, "-o", str(library), str(kernels), "support.c"]
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip() or f"gcc ended with status {done.returncode}")
