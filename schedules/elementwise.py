"""Schedules of the embedding and head kernels."""

from __future__ import annotations

from typing import Any

from tvm.s_tir import Schedule

from tilewright.codegen.workload import KernelSpec
from tilewright.schedules.norm import schedule_norm

TOKENS = 4
"""Tokens whose float32 accumulators are live together in a head's projection."""


def schedule_embedding(sch: Schedule, spec: KernelSpec) -> None:
    """One parallel loop over groups: the lookup, whose vectors are the kernel's own, and the LayerNorm."""
    schedule_norm(sch, spec.residual or "rows")
    sch.compute_at(sch.get_sblock("embed"), sch.get_loops(sch.get_sblock("norm"))[0])


def schedule_token_head(sch: Schedule, _: KernelSpec) -> None:
    """Register tiles of 4 tokens x 16 outputs, parallel over groups."""
    project = sch.get_sblock("project")
    g, t, no, ni, k = sch.get_loops(project)
    outer, inner = sch.split(t, [None, TOKENS])
    sch.reorder(g, no, outer, k, inner, ni)
    sch.parallel(g)
    _vectorize_sum(sch, project, k, [inner], ni)


def schedule_sequence_head(sch: Schedule, spec: KernelSpec) -> None:
    """One sequence at a time, vectorised over outputs."""
    for name in ("pre", "project") if spec.epilogue else ("project",):
        block = sch.get_sblock(name)
        _, _, ni, k = sch.get_loops(block)
        sch.reorder(k, ni)
        _vectorize_sum(sch, block, k, [], ni)


def schedule_pool(sch: Schedule, _: KernelSpec) -> None:
    """Nothing to choose: its loops over channels are vectorised by LLVM."""


def _vectorize_sum(sch: Schedule, block: Any, k: Any, tile: list[Any], lanes: Any) -> None:
    for loop in tile:
        sch.unroll(loop)
    sch.vectorize(lanes)
    init = sch.decompose_reduction(block, k)
    loops = sch.get_loops(init)
    sch.vectorize(loops[-1])
    for loop in loops[len(loops) - 1 - len(tile) : -1]:
        sch.unroll(loop)
