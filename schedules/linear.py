"""Schedules of the linear kernels: the row family, column and gather, the tile families, and the epilogues fused to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.s_tir import Schedule

from tilewright.codegen.decisions import Family, LinearDecisions
from tilewright.codegen.formats import Operands
from tilewright.codegen.kernels.nest import block_name
from tilewright.codegen.kernels.tiles import tile_quads
from tilewright.codegen.prefetch import FETCH_AHEAD
from tilewright.codegen.tiles import TILE_TASKS
from tilewright.codegen.trim import CHUNK_AXIS, SPARSE_AXIS
from tilewright.codegen.workload import PARTS, KernelSpec
from tilewright.errors import ScheduleMismatch
from tilewright.schedules.intrinsics import IntrinSpec, intrinsic
from tilewright.schedules.norm import has_block, schedule_norm


def schedule_linear(sch: Schedule, spec: KernelSpec) -> None:
    """Apply the family's rule in place; raises ScheduleMismatch if the decisions do not fit the level's intrinsics."""
    made = spec.linear
    if not divides(made, spec.n, made.chunks):
        parts = "" if made.block is None else f" and {PARTS} parts"
        blocks = spec.n // made.row_block
        raise ScheduleMismatch(f"{blocks} row-blocks{parts} do not divide into {made.chunks} chunks; choose a divisor")
    for tile in made.token_tiles:
        FAMILY_RULES[made.family](sch, spec, tile)
    if spec.residual is not None:
        schedule_norm(sch, spec.residual)


def divides(made: LinearDecisions, n: int, chunks: int) -> bool:
    """Whether the row-blocks of `n` outputs divide into `chunks`, and so do the parts of equal work of a sparse matrix."""
    blocks = n // made.row_block // made.rows_at_once
    return blocks % chunks == 0 and (made.block is None or PARTS % chunks == 0)


def outputs_intrinsic(isa: str, operands: Operands) -> IntrinSpec:
    """The dot product of the row family: vectors of s8 weights, broadcast activations."""
    return intrinsic(isa, "outputs", "int8", operands.activation, operands.pack)


OUTER = 2
"""Loops that `outer_loops` leaves around a tile of accumulators."""


def outer_loops(sch: Schedule, groups: Any, blocks: Any, chunks: int) -> Any:
    """Split the row-blocks into chunks and run (chunk, tile) in parallel; returns the loop over a chunk's row-blocks."""
    chunk, inner = sch.split(blocks, [chunks, None])
    sch.reorder(chunk, groups, inner)
    sch.annotate(inner, CHUNK_AXIS, chunks)
    sch.parallel(sch.fuse(chunk, groups))
    return inner


def fuse_scatter(sch: Schedule, tile: int, loop: Any) -> None:
    """Attach the second block of an epilogue that has one, which stores what the first quantised, at `loop`."""
    scatter = block_name("scatter", tile)
    if has_block(sch, scatter):
        sch.reverse_compute_at(sch.get_sblock(scatter), loop)


def _over_entries(sch: Schedule, loop: Any, made: LinearDecisions) -> None:
    """Mark the loop over a row-block's entries for the passes that follow."""
    sch.annotate(loop, SPARSE_AXIS, made.rows_at_once)
    if made.prefetch:
        sch.annotate(loop, FETCH_AHEAD, made.prefetch)


def _schedule_tokens(sch: Schedule, spec: KernelSpec, tile: int) -> None:
    """A nest of the families whose lanes are tokens: column, and gather, which interleaves the rows of an entry first.

    Partial sums are added at the end of each row-block.
    """
    product, epilogue = (sch.get_sblock(block_name(name, tile)) for name in ("product", "epilogue"))
    made, totals = spec.linear, []
    if made.partial_sums > 1:
        *_, part, _, _ = sch.get_loops(product)
        totals, product = [product], sch.rfactor(part, factor_axis=3)  # [q, nb, ni, part, j, t]
    q, nb, ni, j, t, e, *packs, _ = sch.get_loops(product)
    rows, halves = made.rows_at_once, made.halves and tile > 1
    outer, unrolled = ([ni], [j]) if rows > 1 else ([], [ni, j])  # row-blocks have entries of their own
    if halves:  # which half is known to each copy of its loop
        outer, unrolled = [j], [ni]
    deep = [packs.pop()] if made.depth > 1 else []
    sch.reorder(q, nb, *outer, e, *packs, *unrolled, t, *deep)
    inner = outer_loops(sch, q, nb, made.chunks)
    for total in totals:
        sch.reverse_compute_at(total, outer[-1] if outer else inner)
    if has_block(sch, block_name("order", tile)):
        order = sch.get_sblock(block_name("order", tile))
        sch.reverse_compute_at(order, inner)
        for loop in sch.get_loops(order)[OUTER:]:
            sch.unroll(loop)
    sch.reverse_compute_at(epilogue, inner)
    fuse_scatter(sch, tile, inner)
    if made.family == "gather":
        sch.compute_at(sch.get_sblock(block_name("gather", tile)), e)
    _over_entries(sch, e, made)
    init = sch.decompose_reduction(product, e)
    held = made.operands
    sch.tensorize(t, intrinsic(spec.isa, "tokens", held.activation, held.weight, held.pack, max(made.depth, 1)).name)
    for loop in (*packs, *unrolled, *([j] if halves else [])):
        sch.unroll(loop)
    for block in (init, *totals, epilogue):
        above = OUTER if block is epilogue else OUTER + len(outer)
        *others, lanes = sch.get_loops(block)[above:]  # loops of one iteration are missing
        for loop in others:
            sch.unroll(loop)
        sch.vectorize(lanes)


def _schedule_tiles(sch: Schedule, spec: KernelSpec, _: int) -> None:
    """The tile families: a task is a chunk for two groups of tokens; the product is one block that needs no schedule."""
    product = sch.get_sblock("product")
    epilogue = sch.get_sblock("epilogue")
    p, nb = sch.get_loops(product)
    inner = outer_loops(sch, p, nb, spec.linear.chunks)
    sch.annotate(sch.get_loops(product)[0], TILE_TASKS, tile_quads(spec))
    sch.reverse_compute_at(epilogue, inner)
    fuse_scatter(sch, 1, inner)
    outputs, lane = sch.split(sch.get_loops(epilogue)[-1], [None, outputs_intrinsic(spec.isa, spec.linear.operands).lanes])
    sch.unroll(outputs)
    sch.vectorize(lane)


def _schedule_row(sch: Schedule, spec: KernelSpec, _: int) -> None:
    made, dot = spec.linear, outputs_intrinsic(spec.isa, spec.linear.operands)
    lanes, width = dot.lanes, made.row_block
    if width % lanes:
        raise ScheduleMismatch(
            f"row kernel of {spec.n}x{spec.k} on {spec.isa} got a row-block of {width} outputs; it needs a multiple of {lanes}"
        )
    product = sch.get_sblock("product")
    epilogue = sch.get_sblock("epilogue")
    g, t, nb, ni, e, kp, ki = sch.get_loops(product)
    outer, rows = sch.split(t, [None, made.rows])
    vectors, lane = sch.split(ni, [None, lanes])
    sch.reorder(g, nb, outer, e, kp, rows, vectors, lane, ki)
    outer_loops(sch, g, nb, made.chunks)
    sch.reverse_compute_at(epilogue, outer)
    fuse_scatter(sch, 1, outer)
    _over_entries(sch, e, made)
    init = sch.decompose_reduction(product, e)
    sch.tensorize(lane, dot.name)
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


FAMILY_RULES: dict[Family, Callable[[Schedule, KernelSpec, int], None]] = {
    "row": _schedule_row,
    "column": _schedule_tokens,
    "gather": _schedule_tokens,
    "tile_row": _schedule_tiles,
    "tile_column": _schedule_tiles,
}
"""Family to what schedules its nest of tiles of so many token groups."""
