"""Schedule of the LayerNorm stages that linear and embedding kernels share."""

from __future__ import annotations

from tvm.s_tir import Schedule

from tilewright.codegen.formats import Layout

VECTOR = 16
"""float32 lanes of one TIR vector; LLVM splits it for narrower registers, so one schedule serves every level."""


CHAINS = 4
"""Partial sums of a token where lanes are tokens: one chain of additions would wait for each to finish."""


def schedule_norm(sch: Schedule, layout: Layout) -> None:
    """Fuse the stages total, spread, inverse, norm and pack, if there is one, into one parallel loop over token groups.

    Vector lanes lie along the contiguous axis of `layout`: tokens, with CHAINS partial sums each, or channels with one
    partial sum per lane.
    """
    sums = [name for stage in ("total", "spread") for name in (_partial_sums(sch, stage, layout), stage)]
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


def _partial_sums(sch: Schedule, name: str, layout: Layout) -> str:
    """Split the sum `name` over channels into partial sums and the sum of those; the partial block's name."""
    channel = sch.get_loops(sch.get_sblock(name))[-1]
    count = CHAINS if layout == "columns" else vector_lanes(sch, channel)
    partial = sch.rfactor(sch.split(channel, [None, count])[1], factor_axis=1 if layout == "columns" else 2)
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
    _, *loops = sch.get_loops(block)
    if len(loops) == 3:  # partial sums
        part, token, channel = loops
        order = [channel, part, token] if layout == "columns" else [token, channel, part]
    elif layout == "columns":
        order = loops
    else:  # the sum of the partial sums is too short to be worth a vector
        return
    sch.reorder(*order)
    for loop in order[1:-1] if layout == "columns" else ():
        sch.unroll(loop)
    sch.vectorize(order[-1])
    channel = order[0] if layout == "columns" else order[1]
    sch.vectorize(sch.get_loops(sch.decompose_reduction(block, channel))[-1])
