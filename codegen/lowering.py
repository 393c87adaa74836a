"""Small buffers of a kernel on the stack."""

from __future__ import annotations

from math import prod
from typing import Any

import tvm_ffi
from tvm import DataType, tirx

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


def small_buffers_on_stack(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """`func` with every buffer of up to STACK_BYTES on the stack."""
    return func.with_body(tvm_ffi.structural_map(func.body, [(tirx.AllocBuffer, _on_stack)]))
