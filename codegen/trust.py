"""A compiled module's main function without checks that its caller has already made."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

_CHECKS = {"vm.builtin.check_tensor_info", "vm.builtin.match_shape"}


def trust_parameters(func: relax.Function, _module: tvm.IRModule, _context: Any) -> relax.Function:
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
