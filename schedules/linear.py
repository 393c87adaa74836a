"""Schedules of the linear kernels: the row family, column and gather, the tile families, and the epilogues fused to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.s_tir import Schedule

from tilewright.codegen.kernels.linear import partial_sums, row_block, rows_at_once, token_tiles
from tilewright.codegen.kernels.nest import block_name
from tilewright.codegen.kernels.tiles import tile_quads
from tilewright.codegen.tiles import TILE_TASKS
from tilewright.codegen.trim import CHUNK_AXIS, SPARSE_AXIS
from tilewright.codegen.workload import PARTS, Workload
from tilewright.errors import ScheduleMismatch
from tilewright.schedules.intrinsics import intrinsic
from tilewright.schedules.isa import ISAS
from tilewright.schedules.norm import has_block, schedule_norm


@dataclass(frozen=True)
class LinearDecisions:
    """What a tuner may choose. rows: tokens of one register tile (row family; divides 16).

    chunks: into how many the row-blocks are divided; a chunk's weights stay in the L2 cache while all token groups pass. A
    sparse matrix's chunks are of equal work rather than of equal size, so their number divides PARTS.
    """

    rows: int = 4
    chunks: int = 4


def default_decisions(workload: Workload) -> LinearDecisions:
    """Hand-chosen decisions.

    Accumulators take half (of 16) to three quarters (of 32) of the registers. Eight chunks, so that a single group of tokens
    keeps eight threads busy, or more where that leaves more than 128 K weights to a chunk; the next lower number that divides.
    """
    lanes = ISAS[workload.isa].lanes
    accumulators = 24 if lanes == 16 else 8
    rows = next(rows for rows in (16, 8, 4, 2, 1) if rows * row_block(workload) <= accumulators * lanes or rows == 1)
    stored = workload.n * workload.k * workload.density // 100
    wanted = max(8, stored // (128 << 10))
    chunks = next(count for count in range(wanted, 0, -1) if _divides(workload, count))
    return LinearDecisions(rows=rows, chunks=chunks)


def _divides(workload: Workload, chunks: int) -> bool:
    """Whether the row-blocks divide into `chunks`, and so do the parts of equal work of a sparse matrix."""
    blocks = workload.n // row_block(workload) // rows_at_once(workload)
    return blocks % chunks == 0 and (workload.block is None or PARTS % chunks == 0)


def schedule_linear(sch: Schedule, workload: Workload, decisions: LinearDecisions | None = None) -> None:
    """Apply the family's rule in place; raises ScheduleMismatch if the workload does not fit the level's intrinsics."""
    decisions = decisions or default_decisions(workload)
    blocks = workload.n // row_block(workload)
    if not _divides(workload, decisions.chunks):
        parts = "" if workload.block is None else f" and {PARTS} parts"
        raise ScheduleMismatch(f"{blocks} row-blocks{parts} do not divide into {decisions.chunks} chunks; choose a divisor")
    for tile in token_tiles(workload):
        if workload.family == "row":
            _schedule_row(sch, workload, decisions)
        elif workload.family in ("tile_row", "tile_column"):
            _schedule_tiles(sch, workload, decisions)
        else:
            _schedule_tokens(sch, workload, decisions, tile)
    if workload.residual is not None:
        schedule_norm(sch, workload.residual)


def _lanes(workload: Workload) -> int:
    return intrinsic(workload.isa, "outputs", "int8").lanes


OUTER = 2
"""Loops that `_outer` leaves around a tile of accumulators."""


def _outer(sch: Schedule, groups: Any, blocks: Any, chunks: int) -> Any:
    """Split the row-blocks into chunks and run (chunk, tile) in parallel; returns the loop over a chunk's row-blocks."""
    chunk, inner = sch.split(blocks, [chunks, None])
    sch.reorder(chunk, groups, inner)
    sch.annotate(inner, CHUNK_AXIS, chunks)
    sch.parallel(sch.fuse(chunk, groups))
    return inner


def _fuse_scatter(sch: Schedule, tile: int, loop: Any) -> None:
    """Attach the second block of an epilogue that has one, which stores what the first quantised, at `loop`."""
    scatter = block_name("scatter", tile)
    if has_block(sch, scatter):
        sch.reverse_compute_at(sch.get_sblock(scatter), loop)


def _schedule_tokens(sch: Schedule, workload: Workload, decisions: LinearDecisions, tile: int) -> None:
    """A nest of the families whose lanes are tokens: column, and gather, which interleaves the rows of an entry first.

    Partial sums are added at the end of each row-block.
    """
    product, epilogue = (sch.get_sblock(block_name(name, tile)) for name in ("product", "epilogue"))
    totals = []
    if partial_sums(workload) > 1:
        *_, part, _, _ = sch.get_loops(product)
        totals, product = [product], sch.rfactor(part, factor_axis=3)  # [q, nb, ni, part, j, t]
    q, nb, ni, j, t, e, *packs, _ = sch.get_loops(product)
    rows = rows_at_once(workload)
    outer, unrolled = ([ni], []) if rows > 1 else ([], [ni])  # row-blocks have entries of their own
    sch.reorder(q, nb, *outer, e, *packs, *unrolled, j, t)
    inner = _outer(sch, q, nb, decisions.chunks)
    for total in totals:
        sch.reverse_compute_at(total, outer[-1] if outer else inner)
    if has_block(sch, block_name("order", tile)):
        order = sch.get_sblock(block_name("order", tile))
        sch.reverse_compute_at(order, inner)
        for loop in sch.get_loops(order)[OUTER:]:
            sch.unroll(loop)
    sch.reverse_compute_at(epilogue, inner)
    _fuse_scatter(sch, tile, inner)
    if workload.family == "gather":
        sch.compute_at(sch.get_sblock(block_name("gather", tile)), e)
    sch.annotate(e, SPARSE_AXIS, rows)
    init = sch.decompose_reduction(product, e)
    sch.tensorize(t, intrinsic(workload.isa, "tokens", workload.operands.activation).name)
    for loop in (*packs, *unrolled, j):
        sch.unroll(loop)
    for block in (init, *totals, epilogue):
        above = OUTER if block is epilogue else OUTER + len(outer)
        *others, lanes = sch.get_loops(block)[above:]  # loops of one iteration are missing
        for loop in others:
            sch.unroll(loop)
        sch.vectorize(lanes)


def _schedule_tiles(sch: Schedule, workload: Workload, decisions: LinearDecisions) -> None:
    """The tile families: a task is a chunk for two groups of tokens; the product is one block that needs no schedule."""
    product = sch.get_sblock("product")
    epilogue = sch.get_sblock("epilogue")
    p, nb = sch.get_loops(product)
    inner = _outer(sch, p, nb, decisions.chunks)
    sch.annotate(sch.get_loops(product)[0], TILE_TASKS, tile_quads(workload))
    sch.reverse_compute_at(epilogue, inner)
    _fuse_scatter(sch, 1, inner)
    outputs, lane = sch.split(sch.get_loops(epilogue)[-1], [None, _lanes(workload)])
    sch.unroll(outputs)
    sch.vectorize(lane)


def _schedule_row(sch: Schedule, workload: Workload, decisions: LinearDecisions) -> None:
    lanes = _lanes(workload)
    width = row_block(workload)
    if width % lanes:
        raise ScheduleMismatch(
            f"row kernel of {workload.n}x{workload.k} on {workload.isa} got a row-block of {width} outputs; "
            f"it needs a multiple of {lanes}"
        )
    product = sch.get_sblock("product")
    epilogue = sch.get_sblock("epilogue")
    g, t, nb, ni, e, kp, ki = sch.get_loops(product)
    outer, rows = sch.split(t, [None, decisions.rows])
    vectors, lane = sch.split(ni, [None, lanes])
    sch.reorder(g, nb, outer, e, kp, rows, vectors, lane, ki)
    _outer(sch, g, nb, decisions.chunks)
    sch.reverse_compute_at(epilogue, outer)
    _fuse_scatter(sch, 1, outer)
    sch.annotate(e, SPARSE_AXIS, 1)
    init = sch.decompose_reduction(product, e)
    sch.tensorize(lane, intrinsic(workload.isa, "outputs", "int8").name)
    for loop in (rows, vectors, kp):
        sch.unroll(loop)
    loops = sch.get_loops(init)
    sch.vectorize(loops[-1])
    for loop in loops[-3:-1]:
        sch.unroll(loop)
    rows, outputs = sch.get_loops(epilogue)[-2:]
    vectors, lane = sch.split(outputs, [None, lanes])
    sch.unroll(rows)
    sch.unroll(vectors)
    sch.vectorize(lane)
