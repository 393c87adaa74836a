"""The module pass that schedules every kernel of a lowered module by the rule of its op."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tvm
from tvm.s_tir import Schedule

from tilewright.codegen.passes import KERNELS
from tilewright.codegen.workload import KernelSpec
from tilewright.schedules.attention import schedule_attention
from tilewright.schedules.elementwise import (
    schedule_embedding,
    schedule_pool,
    schedule_sequence_head,
    schedule_token_head,
)
from tilewright.schedules.linear import schedule_linear

RULES: dict[str, Callable[[Schedule, KernelSpec], None]] = {
    "linear": schedule_linear,
    "attention": schedule_attention,
    "embedding": schedule_embedding,
    "token_head": schedule_token_head,
    "sequence_head": schedule_sequence_head,
    "pool": schedule_pool,
}
"""Op of a spec to the rule that schedules it."""


def apply(module: tvm.IRModule, specs: Mapping[str, KernelSpec]) -> tvm.IRModule:
    """The module with every PrimFunc that `specs` names scheduled by its decisions; others are left as they are.

    Raises ScheduleMismatch if decisions do not fit a kernel. (Inside a pass of TVM's it would lose its type.)
    """
    scheduled = tvm.IRModule(module.functions, attrs=module.attrs)
    for symbol, func in module.functions.items():
        if symbol.name_hint in specs:
            spec, sch = specs[symbol.name_hint], Schedule(tvm.IRModule({"main": func}))
            RULES[spec.op](sch, spec)
            scheduled[symbol] = sch.mod["main"]
    return tvm.transform.Sequential(list(KERNELS))(scheduled)


def schedule(func: tvm.tirx.PrimFunc, spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """One kernel, scheduled by the decisions of `spec` and ready to be compiled."""
    return apply(tvm.IRModule({"main": func}), {"main": spec})["main"]
