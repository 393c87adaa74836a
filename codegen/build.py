"""Scheduled module to a shared library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.target import Target

from tilewright.codegen.lowering import PIPELINE
from tilewright.errors import TilewrightError

_CHECKS = {"vm.builtin.check_tensor_info", "vm.builtin.match_shape"}


def build(module: tvm.IRModule, target: Target, library: Path) -> None:
    """Compile a scheduled `module` and link it to the shared library `library` (needs a C compiler as linker).

    Only the passes a straight-line module of TIR calls needs: the default pipeline's fusion passes would look for operators,
    and its release of each tensor after the last use would cost time in every call, while memory is planned as a whole.
    """
    passes = tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.CanonicalizeBindings(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.function_pass(_trust_parameters, opt_level=0, name="tilewright.trust_parameters"),
            relax.transform.AttachGlobalSymbol(),
        ]
    )
    executable = relax.build(module, target, relax_pipeline=passes, tir_pipeline=PIPELINE)
    try:
        executable.export_library(str(library))
    except RuntimeError as error:
        raise TilewrightError(f"linking {library.name} failed ({str(error).splitlines()[0]}); is gcc installed?") from error


def _trust_parameters(func: relax.Function, _module: tvm.IRModule, _context: Any) -> relax.Function:
    """`func` without the checks of the parameters' dtypes and shapes, which every call would repeat.

    The parameters come from the artifact, whose files the engine checks, and kernels check their arguments themselves.
    """
    parameters = func.params[-1]
    (block,) = func.body.blocks
    items = {
        b.var for b in block.bindings if isinstance(b.value, relax.TupleGetItem) and b.value.tuple_value.same_as(parameters)
    }

    def check(value: Any) -> bool:
        named = isinstance(value, relax.Call) and isinstance(value.op, relax.ExternFunc) and value.op.global_symbol in _CHECKS
        return bool(named and value.args[0] in items)

    only_checked = {b.value.args[0] for b in block.bindings if check(b.value)}  # the kernels' arguments are taken out again
    kept = [b for b in block.bindings if not check(b.value) and b.var not in only_checked]
    body = relax.SeqExpr([relax.BindingBlock(kept)], func.body.body)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)
