"""The module pass that schedules every kernel of a lowered module by the rule of its op."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import tvm
from tvm.s_tir import Schedule

from tilewright.codegen.buckets import carried, dispatch
from tilewright.codegen.decisions import TokenBucket
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
            spec = specs[symbol.name_hint]
            scheduled[symbol] = _scheduled(func, spec)
            for bucket, kernel in zip(spec.buckets, carried(func), strict=True):
                scheduled[_name(symbol.name_hint, bucket)] = _scheduled(kernel, spec.of(bucket))
    done = tvm.transform.Sequential(list(KERNELS))(scheduled)
    functions = {symbol.name_hint: func for symbol, func in done.functions.items()}
    for name, spec in specs.items():
        kernels = [functions.pop(_name(name, bucket)) for bucket in spec.buckets]
        functions[name] = dispatch(functions[name], spec.buckets, kernels)
    return tvm.IRModule({done.get_global_var(name): func for name, func in functions.items()}, attrs=done.attrs)


def _name(kernel: str, bucket: TokenBucket) -> str:
    return f"{kernel}_up_to_{bucket.groups}_groups"


def _scheduled(func: tvm.tirx.PrimFunc, spec: KernelSpec) -> tvm.tirx.PrimFunc:
    sch = Schedule(tvm.IRModule({"main": func}))
    RULES[spec.op](sch, spec)
    return sch.mod["main"]


def schedule(func: tvm.tirx.PrimFunc, spec: KernelSpec) -> tvm.tirx.PrimFunc:
    """One kernel, scheduled by the decisions of `spec` and ready to be compiled."""
    return apply(tvm.IRModule({"main": func}), {"main": spec})["main"]
