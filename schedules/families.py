"""How a family of linear kernels is added from outside (see docs/extending.md): all its table entries at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from tvm.s_tir import Schedule

from tilewright.codegen.block_sparse import BlockSparseMatrix
from tilewright.codegen.decisions import FAMILY_LANES, FAMILY_LAYOUT, Family, LinearDecisions, Storage
from tilewright.codegen.formats import Layout
from tilewright.codegen.kernels.linear import PRODUCTS, WEIGHTS, Weights
from tilewright.codegen.kernels.nest import Nest, Value
from tilewright.codegen.packing import PACKERS, PackedLinear
from tilewright.codegen.workload import KernelSpec
from tilewright.errors import ScheduleMismatch
from tilewright.schedules.blocks import LEGAL
from tilewright.schedules.isa import Isa
from tilewright.schedules.linear import FAMILY_RULES


@dataclass(frozen=True)
class FamilyEntry:
    """All that makes a family of sparse kernels.

    layout: in which it reads activations. lanes: of its accumulators, rows or columns. weights: declares the arguments of
    a matrix; pack: makes them. product: emits the blocks that sum a nest's products. rule: schedules a nest of tiles of so many
    token groups. legal: whether a level can compute with a matrix stored so.
    """

    layout: Layout
    lanes: Layout
    weights: Callable[[KernelSpec], Weights]
    pack: Callable[[LinearDecisions, BlockSparseMatrix], PackedLinear]
    product: Callable[[KernelSpec, Nest, Any, Weights], Value]
    rule: Callable[[Schedule, KernelSpec, int], None]
    legal: Callable[[Storage, Isa], bool]


def register_family(name: str, entry: FamilyEntry) -> Family:
    """Enter a family under `name`, by which `Storage` then knows it; raises ScheduleMismatch if there is one of that name."""
    family = cast(Family, name)
    if family in FAMILY_LAYOUT:
        raise ScheduleMismatch(f"there is a family {name!r} already; choose another name")
    FAMILY_LAYOUT[family], FAMILY_LANES[family] = entry.layout, entry.lanes
    WEIGHTS[family], PACKERS[family], PRODUCTS[family] = entry.weights, entry.pack, entry.product
    FAMILY_RULES[family], LEGAL[family] = entry.rule, entry.legal
    return family
