"""TVM's lowering of scheduled kernels, with small buffers on the stack."""

from __future__ import annotations

from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import DataType, tirx
from tvm.tirx import get_tir_pipeline, register_tir_pipeline

PIPELINE = "tilewright"
"""The name that `tvm.compile` and `relax.build` take for `tir_pipeline`."""

STACK_BYTES = 4096
"""The largest buffer put on the stack.

TVM puts those of less than 1024 bytes there and asks its runtime for others, whose memory LLVM has to take as read elsewhere:
16 vectors of accumulators, which are just that large, would be stored after their last use, and spilled until then.
"""


def _on_stack(alloc: Any) -> Any:
    shape = alloc.buffer.shape
    if not all(isinstance(extent, tirx.IntImm) for extent in shape):
        return alloc
    if prod(int(extent) for extent in shape) * DataType(alloc.buffer.dtype).bits // 8 > STACK_BYTES:
        return alloc
    return tirx.AllocBuffer(alloc.buffer, annotations={"disable_lower_builtin": tirx.const(1, "bool")})


def _small_buffers_on_stack(func: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    return func.with_body(tvm_ffi.structural_map(func.body, [(tirx.AllocBuffer, _on_stack)]))


def _pipeline() -> tuple[Any, Any, Any]:
    lower, *finalize = get_tir_pipeline("default")
    on_stack = tirx.transform.prim_func_pass(_small_buffers_on_stack, opt_level=0, name="tilewright.small_buffers_on_stack")
    return tvm.transform.Sequential([lower, on_stack]), *finalize


register_tir_pipeline(PIPELINE, _pipeline)
