"""Schedule of the attention kernel: tensorize its two products, run (head, group) in parallel."""

from __future__ import annotations

from tvm.s_tir import Schedule

from tilewright.codegen.workload import KernelSpec
from tilewright.schedules.intrinsics import intrinsic


def schedule_attention(sch: Schedule, spec: KernelSpec) -> None:
    """Apply the rule in place. Its loops over keys have run-time extents, so that tiles are the kernel's own."""
    held = spec.attention.operands
    products = {"score": (held.query, held.key), "total": (held.weight, held.query), "context": (held.weight, held.query)}
    for block, (vector, scalar) in products.items():
        sch.tensorize(sch.get_sblock(block), intrinsic(spec.isa, "tokens", vector, scalar, held.pack).name)
    sch.parallel(sch.fuse(*sch.get_loops(sch.get_sblock("attention"))))
