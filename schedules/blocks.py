"""Block shapes and the kernel that serves each: a table. Supporting a new shape is a new entry."""

from __future__ import annotations

from collections import Counter

from tilewright.codegen.model import EncoderModel, Linear
from tilewright.codegen.plan import LayerPlan, LinearPlan, Plan
from tilewright.schedules.isa import Isa

DENSE = LinearPlan("row", None)

BLOCKS: dict[tuple[int, int], LinearPlan] = {
    (4, 1): LinearPlan("gather", (4, 1)),
    (16, 1): LinearPlan("gather", (4, 1), "stored as (4, 1): 16 outputs x 16 tokens do not fit the registers"),
    (4, 4): LinearPlan("gather", (4, 1), "stored as (4, 1): its columns are gathered one by one"),
    (16, 4): LinearPlan("row", (16, 4)),
    (32, 4): LinearPlan("row", (32, 4)),
    (1, 4): LinearPlan("row", None, "computed as dense: no kernel keeps its vector lanes busy with one output"),
}
"""What runs for each block shape that `block_sparse.detect_block` may find."""


def plan(model: EncoderModel, isa: Isa) -> Plan:
    """Choose family and stored block for every linear kernel, and the layout of the residual stream most of them use."""
    layers = tuple(
        LayerPlan(
            _merged(layer.attention.query, layer.attention.key, layer.attention.value),
            _merged(layer.attention.output),
            _merged(layer.up),
            _merged(layer.down),
        )
        for layer in model.layers
    )
    layouts = Counter(linear.layout for layer in layers for linear in layer.linears())
    return Plan(isa.name, isa.operands, layers, layouts.most_common(1)[0][0] if layouts else "rows")


def _merged(*linears: Linear) -> LinearPlan:
    """The plan of linears that share one kernel: they must agree, or the kernel is dense."""
    plans = {BLOCKS[linear.block] if linear.block else DENSE for linear in linears}
    if len(plans) == 1:
        return plans.pop()
    if len({(plan.family, plan.block) for plan in plans}) == 1:
        return LinearPlan(*next((plan.family, plan.block) for plan in plans), "stored block shared by q, k and v")
    return LinearPlan("row", None, "computed as dense: q, k and v have different blocks")
