"""Parallel loops whose workers, once done with their own share of the tasks, run what is left of the others'.

TVM's runtime gives each worker of a launch an equal, contiguous share of a parallel loop, so that a call takes what the
slowest core takes. Here a worker begins with its share, in whose tasks a chunk's weights stay in its core's L2 cache, and then
goes round all others. A flag for each span of tasks tells whether a worker has claimed it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import StringImm
from tvm.s_tir import SBlock, SBlockRealize

SPANS = 256
"""Largest number of spans of a loop, and with it of workers: flags of one byte that fit the stack of the calling function."""

_IS_FREE, _CLAIM = "tilewright_is_free", "tilewright_claim"

_FLAGS = f"""
define linkonce_odr hidden i32 @{_IS_FREE}(ptr %flag) alwaysinline nounwind {{
  %now = load atomic i8, ptr %flag monotonic, align 1
  %free = icmp eq i8 %now, 0
  %result = zext i1 %free to i32
  ret i32 %result
}}

define linkonce_odr hidden i32 @{_CLAIM}(ptr %flag) alwaysinline nounwind {{
  %seen = load atomic i8, ptr %flag monotonic, align 1
  %free = icmp eq i8 %seen, 0
  br i1 %free, label %try, label %taken
try:
  %before = atomicrmw xchg ptr %flag, i8 1 monotonic
  %first = icmp eq i8 %before, 0
  %result = zext i1 %first to i32
  ret i32 %result
taken:
  ret i32 0
}}
"""
"""LLVM IR of two functions that ask a flag and return 0 or 1, since TIR has no atomics for CPUs. Both are inlined.

They order nothing else: what workers write is read by others after the launch, which ends when all have ended.
"""


def steal_tasks(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Let the workers of every parallel loop of a scheduled `func` share its tasks by what they get done.

    `for task in parallel(count)` becomes

        for worker in parallel(spans):                # a worker of TVM's pool has several of these
            if is_free(flag[worker]):                 # else all is claimed, since a turn ends with nothing left
                for lap, span in grid(2, spans):      # from its own share to the end, then from the first on
                    if span >= worker or lap == 1:
                        if claim(flag[span]):
                            for task in span: ...

    with flags that belong to the launch, so that any number of pools may run the function at once.
    """
    return func.with_body(tvm_ffi.structural_map(func.body, [(tirx.For, _share)]))


def _share(loop: Any) -> Any:
    if loop.kind != tirx.ForKind.PARALLEL:
        return loop
    # never 0, not even for the negative extents that simplification considers, because it divides by it
    size = tirx.floordiv(tirx.max(loop.extent, 0), SPANS) + 1
    spans = tirx.floordiv(loop.extent + (size - 1), size)
    flags = tirx.decl_buffer((SPANS,), "uint8", "flags")

    def ask(function: str, span: Any) -> Any:
        return tirx.call_extern("int32", function, tirx.address_of(tirx.BufferLoad(flags, [span]))) != 0

    def turn(worker: Any) -> Any:
        return _loop("lap", 2, lambda lap: _loop("span", spans, lambda span: visit(worker, lap, span)))

    def visit(worker: Any, lap: Any, span: Any) -> Any:
        first = span * size
        count = tirx.min(size, loop.extent - first)
        tasks = tirx.For(loop.loop_var, first, count, tirx.ForKind.SERIAL, loop.body, annotations=loop.annotations)
        return tirx.IfThenElse(span >= worker * (1 - lap), tirx.IfThenElse(ask(_CLAIM, span), tasks, None), None)

    clear = tirx.BufferStore(flags, tirx.Broadcast(tirx.IntImm("uint8", 0), SPANS), [tirx.Ramp(0, 1, SPANS)])
    work = _loop(
        "worker", spans, lambda worker: tirx.IfThenElse(ask(_IS_FREE, worker), turn(worker), None), tirx.ForKind.PARALLEL
    )
    body = tirx.AttrStmt(0, "pragma_import_llvm", StringImm(_FLAGS), tirx.SeqStmt([clear, work]))
    return SBlockRealize([], True, SBlock([], [], [], "tasks", body, alloc_buffers=[flags]))


def _loop(name: str, extent: Any, body: Callable[[Any], Any], kind: Any = tirx.ForKind.SERIAL) -> Any:
    variable = tirx.Var(name, "int32")
    return tirx.For(variable, 0, extent, kind, body(variable))
