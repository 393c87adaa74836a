"""Block shapes and the kernels that serve each: a table. Supporting a new shape is one entry (see docs/extending.md)."""

from __future__ import annotations

import dataclasses
from collections import Counter

from tilewright.codegen.block_sparse import BLOCK_SHAPES, block_density
from tilewright.codegen.model import EncoderModel, Linear
from tilewright.codegen.plan import LayerPlan, LinearPlan, Plan
from tilewright.codegen.tiles import TILE
from tilewright.codegen.workload import FAMILY_LANES, GROUP, Family
from tilewright.errors import ScheduleMismatch
from tilewright.schedules.intrinsics import intrinsic
from tilewright.schedules.isa import ISAS, Isa

Block = tuple[int, int]

DENSE, DENSE_TILES = LinearPlan("row", None), LinearPlan("tile_row", None)

BLOCKS: dict[Block, tuple[LinearPlan, ...]] = {
    (1, 4): (LinearPlan("column", (1, 4)),),
    (4, 1): (LinearPlan("gather", (4, 1)),),
    (4, 4): (LinearPlan("column", (4, 4)),),
    (8, 1): (LinearPlan("gather", (8, 1)), LinearPlan("gather", (4, 1))),
    (8, 2): (LinearPlan("row", (8, 2)), LinearPlan("gather", (8, 1)), LinearPlan("gather", (4, 1))),
    (8, 4): (LinearPlan("column", (8, 4)), LinearPlan("column", (4, 4))),
    (16, 1): (LinearPlan("gather", (16, 1)), LinearPlan("gather", (4, 1))),
    (16, 4): (LinearPlan("tile_column", (16, 4)), LinearPlan("row", (16, 4))),
    (32, 4): (LinearPlan("tile_column", (32, 4)), LinearPlan("row", (32, 4))),
}
"""What may run for each block shape, best first: the first that is legal and fits the registers of an ISA level is used.

A plan may store smaller blocks than were found, as (8, 1) blocks are stored as (4, 1) where registers are few for their tile.
"""

PAYS_ON_TILES: dict[Family, float] = {"tile_column": 0.5, "row": 0.09, "column": 0.09, "gather": 0.07}
"""The largest share of non-zero blocks with which a family takes less time than dense tiles, which make 1024 products a cycle.

Modelled, not measured, from Intel's optimization manual: a product of tiles takes 16 cycles; gathering takes tile_column as
long again where blocks have 16 outputs; two vpdpbusd make 128 products a cycle, of which row and column kernels reach 70 %
and gather 60 % (docs/benchmarks.md).
"""


def register_block(block: Block, *plans: LinearPlan) -> None:
    """Add a block shape: it is looked for in every model from now on and runs as the first of `plans` that is legal.

    Raises ScheduleMismatch if a plan's block does not tile `block`, or if no plan is legal on some ISA level.
    """
    for plan in plans:
        if plan.block is None or block[0] % plan.block[0] or block[1] % plan.block[1]:
            raise ScheduleMismatch(f"block {block} cannot be stored as {plan.block}; choose a block that divides it")
    for isa in ISAS.values():
        if not any(legal(plan, isa) for plan in plans):
            raise ScheduleMismatch(f"block {block} has no kernel on {isa.name}; add a plan that is legal there")
    BLOCKS[block] = plans
    if block not in BLOCK_SHAPES:
        BLOCK_SHAPES.append(block)


def legal(plan: LinearPlan, isa: Isa) -> bool:
    """Whether the level's intrinsics can compute `plan`."""
    if plan.family in ("tile_row", "tile_column") and not isa.tiles:
        return False
    if plan.block is None or plan.family == "tile_row":
        return plan.block is None and plan.family in ("row", "tile_row")
    (outputs, inputs), pack = plan.block, isa.operands.pack
    if plan.family == "tile_column":
        return outputs % TILE == 0 and inputs == pack
    if plan.family == "row":
        return outputs % intrinsic(isa.name, "outputs", "int8").lanes == 0 and inputs % pack == 0
    return inputs % pack == 0 if plan.family == "column" else inputs == 1


def _fits(plan: LinearPlan, isa: Isa) -> bool:
    """Whether a block's accumulators leave registers for its operands: gather holds a tile's interleaved tokens beside them."""
    if plan.block is None or plan.family in ("row", "tile_column"):
        return True
    registers, vectors = 32 if isa.lanes == GROUP else 16, plan.block[0] * GROUP // isa.lanes
    return vectors * isa.operands.columns <= registers // 2 if plan.family == "gather" else vectors <= registers


def plan(model: EncoderModel, isa: Isa) -> Plan:
    """Choose family and stored block for every linear kernel, and the layout of the residual stream most of them add to."""
    layers = tuple(
        LayerPlan(
            _merged(isa, layer.attention.query, layer.attention.key, layer.attention.value),
            _merged(isa, layer.attention.output),
            _merged(isa, layer.up),
            _merged(isa, layer.down),
        )
        for layer in model.layers
    )
    streams = Counter(FAMILY_LANES[linear.family] for layer in layers for linear in layer.linears())
    return Plan(isa.name, isa.operands, layers, streams.most_common(1)[0][0] if streams else "rows")


def dense(isa: Isa, reason: str = "") -> LinearPlan:
    """The plan for a dense linear."""
    return dataclasses.replace(DENSE_TILES if isa.tiles else DENSE, reason=reason)


def choose(block: Block | None, isa: Isa, density: float = 0.0) -> LinearPlan:
    """The plan for a linear in which `block` was found (None: dense), with a share `density` of its blocks non-zero.

    A density of 0 gives the sparse plan of the level, however it compares with dense tiles.
    """
    if block is None:
        return dense(isa)
    plans = [plan for plan in BLOCKS.get(block, ()) if legal(plan, isa)]
    if not plans:
        return dense(isa, f"computed as dense: no kernel for block {block} on {isa.name}")
    chosen = next((plan for plan in plans if _fits(plan, isa)), plans[-1])
    if isa.tiles and density > (pays := PAYS_ON_TILES[chosen.family]):
        return dense(isa, f"computed as dense: on {isa.name} block {block} pays up to {pays:.0%} of non-zero blocks")
    if chosen.block != block:
        return dataclasses.replace(chosen, reason=f"block {block} stored as {chosen.block} on {isa.name}")
    return chosen


def _merged(isa: Isa, *linears: Linear) -> LinearPlan:
    """The plan of linears that share one kernel: they must agree, or the kernel is dense."""
    plans = [choose(linear.block, isa, _density(linear)) for linear in linears]
    if len({(plan.family, plan.block) for plan in plans}) == 1:
        return max(plans, key=lambda plan: plan.reason)
    return dense(isa, "computed as dense: q, k and v have different blocks")


def _density(linear: Linear) -> float:
    """The share of non-zero blocks."""
    density = None if linear.block is None else block_density(linear.weight, linear.block)
    return 1.0 if density is None else density
