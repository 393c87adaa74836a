"""The module pass that schedules every kernel of a lowered module by the rule of its op."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import tvm
from tvm.s_tir import Schedule

from tilewright.codegen.stealing import steal_tasks
from tilewright.codegen.tiles import configure_tiles
from tilewright.codegen.trim import trim
from tilewright.codegen.workload import ATTRIBUTE, Workload
from tilewright.schedules.attention import schedule_attention
from tilewright.schedules.elementwise import (
    schedule_embedding,
    schedule_pool,
    schedule_sequence_head,
    schedule_token_head,
)
from tilewright.schedules.linear import default_decisions, schedule_linear

RULES: dict[str, Callable[[Schedule, Workload], None]] = {
    "linear": schedule_linear,
    "attention": schedule_attention,
    "embedding": schedule_embedding,
    "token_head": schedule_token_head,
    "sequence_head": schedule_sequence_head,
    "pool": schedule_pool,
}
"""Op of a workload to the rule that schedules it."""


def apply(module: tvm.IRModule) -> tvm.IRModule:
    """The module with every PrimFunc that carries a workload scheduled; others are left as they are."""

    def transform(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        scheduled = tvm.IRModule(mod.functions, attrs=mod.attrs)
        for symbol, func in mod.functions.items():
            if ATTRIBUTE in (func.attrs or {}):
                scheduled[symbol] = schedule(func)
        return scheduled

    return tvm.transform.module_pass(transform, opt_level=0, name="tilewright.schedule")(module)


def schedule(func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """The scheduled form of one kernel that carries a workload."""
    workload = Workload.from_json(str(func.attrs[ATTRIBUTE]))
    sch = Schedule(tvm.IRModule({"main": func}))
    RULES[workload.op](sch, workload)
    return steal_tasks(configure_tiles(trim(sch.mod["main"])))


def describe(workload: Workload) -> str:
    """The decisions a linear kernel was scheduled with, for the manifest."""
    decisions = dataclasses.asdict(default_decisions(workload))
    return "default " + " ".join(f"{name}={value}" for name, value in decisions.items())
