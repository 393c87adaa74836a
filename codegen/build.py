"""Scheduled module to a shared library."""

from __future__ import annotations

from pathlib import Path

import tvm
from tvm import relax
from tvm.target import Target

from tilewright.errors import TilewrightError


def build(module: tvm.IRModule, target: Target, library: Path) -> None:
    """Compile a scheduled `module` and link it to the shared library `library` (needs a C compiler as linker).

    Only the passes a straight-line module of TIR calls needs: the default pipeline's fusion passes would look for operators.
    """
    passes = tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )
    executable = relax.build(module, target, relax_pipeline=passes)
    try:
        executable.export_library(str(library))
    except RuntimeError as error:
        raise TilewrightError(f"linking {library.name} failed ({str(error).splitlines()[0]}); is gcc installed?") from error
