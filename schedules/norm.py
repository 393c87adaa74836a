"""Schedule of the LayerNorm stages that linear and embedding kernels share."""

from __future__ import annotations

from tvm.s_tir import Schedule

from tilewright.codegen.workload import Layout

VECTOR = 16
"""float32 lanes of one TIR vector; LLVM splits it for narrower registers, so one schedule serves every level."""


def schedule_norm(sch: Schedule, layout: Layout) -> None:
    """Fuse the stages total, spread, inverse, norm and pack, if there is one, into one parallel loop over token groups.

    Vector lanes lie along the contiguous axis of `layout`: tokens, or channels with one partial sum per lane.
    """
    sums = ["total", "spread"]
    if layout == "rows":
        sums = [name for stage in sums for name in (_partial_sums(sch, stage), stage)]
    group, token, channel = sch.get_loops(sch.get_sblock("norm"))
    for name in reversed([*sums, "inverse"]):
        sch.compute_at(sch.get_sblock(name), group)
    if has_block(sch, "pack"):
        sch.reverse_compute_at(sch.get_sblock("pack"), group)
    sch.parallel(group)
    for name in sums:
        _schedule_sum(sch, name, layout)
    sch.vectorize(sch.get_loops(sch.get_sblock("inverse"))[-1])
    if layout == "columns":
        sch.reorder(channel, token)
        sch.vectorize(token)
    else:
        sch.vectorize(sch.split(channel, [None, vector_lanes(sch, channel)])[1])


def _partial_sums(sch: Schedule, name: str) -> str:
    """Split the sum `name` over channels into one partial sum per lane and the sum of those; the partial block's name."""
    channel = sch.get_loops(sch.get_sblock(name))[-1]
    lane = sch.split(channel, [None, vector_lanes(sch, channel)])[1]
    partial = sch.rfactor(lane, factor_axis=2)
    return str(sch.get(partial).name_hint)


def has_block(sch: Schedule, name: str) -> bool:
    """Whether the kernel has a block `name`."""
    return any(sch.get(block).name_hint == name for block in sch.get_child_blocks(sch.get_sblock("root")))


def vector_lanes(sch: Schedule, channel: object) -> int:
    """The widest vector that divides the extent of loop `channel`."""
    extent = int(sch.get(channel).extent)
    return next(lanes for lanes in (VECTOR, 8, 4, 2, 1) if extent % lanes == 0)


def _schedule_sum(sch: Schedule, name: str, layout: Layout) -> None:
    block = sch.get_sblock(name)
    _, first, *rest = sch.get_loops(block)
    if layout == "columns":
        lanes, (channel,) = first, rest
    elif len(rest) == 2:  # a block of partial sums: loops lane, token, channel
        lanes, (token, channel) = first, rest
        sch.reorder(token, channel)
    else:  # the sum of the partial sums is too short to be worth a vector
        return
    sch.reorder(channel, lanes)
    sch.vectorize(lanes)
    sch.vectorize(sch.get_loops(sch.decompose_reduction(block, channel))[-1])
