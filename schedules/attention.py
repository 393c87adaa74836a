"""Schedule of the attention kernel: tensorize its two products, run (head, group) in parallel."""

from __future__ import annotations

from tvm.s_tir import Schedule

from tilewright.codegen.workload import Workload
from tilewright.schedules.intrinsics import intrinsic


def schedule_attention(sch: Schedule, workload: Workload) -> None:
    """Apply the rule in place. Tile sizes are the kernel's own: its loops over keys have run-time extents."""
    operands = workload.operands
    for block, vector in (("score", operands.attention), ("total", operands.activation), ("context", operands.activation)):
        sch.tensorize(sch.get_sblock(block), intrinsic(workload.isa, "tokens", vector).name)
    sch.parallel(sch.fuse(*sch.get_loops(sch.get_sblock("attention"))))
