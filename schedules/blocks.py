"""What an ISA level can do with a block shape, and how a shape is added from outside (see docs/extending.md)."""

from __future__ import annotations

from collections.abc import Callable

from tilewright.codegen.block_sparse import BLOCKS
from tilewright.codegen.decisions import Block, Family, Storage
from tilewright.codegen.formats import QUADS, Operands
from tilewright.codegen.tiles import TILE
from tilewright.errors import ScheduleMismatch
from tilewright.schedules.intrinsics import IntrinSpec, find_intrinsic
from tilewright.schedules.isa import ISAS, Isa

DENSE, DENSE_TILES, COLUMNS = Storage("row", None), Storage("tile_row", None), Storage("gather", (4, 1))


def register_block(block: Block, *ways: Storage) -> None:
    """Add a block shape: it is looked for in every model from now on and stored as the first of `ways` that is legal.

    Raises ScheduleMismatch if a block of `ways` does not tile `block`, or if no way is legal on some ISA level.
    """
    for way in ways:
        if way.block is None or block[0] % way.block[0] or block[1] % way.block[1]:
            raise ScheduleMismatch(f"block {block} cannot be stored as {way.block}; choose a block that divides it")
    for isa in ISAS.values():
        if not any(legal(way, isa) for way in ways):
            raise ScheduleMismatch(f"block {block} has no kernel on {isa.name}; add a way that is legal there")
    BLOCKS[block] = ways


def dense(isa: Isa) -> Storage:
    """How the level stores a dense matrix."""
    return DENSE_TILES if isa.tiles else DENSE


def operands(family: Family, isa: Isa) -> Operands:
    """What the level's kernels of a family multiply.

    Products of bytes that are summed in 16 bits are exact only if the packer can choose which share a lane: where columns are
    gathered.
    """
    dot = find_intrinsic(isa.name, "tokens", QUADS.activation, QUADS.weight, QUADS.pack) if family == "gather" else None
    return QUADS if dot is not None and dot.budget is not None else isa.operands


def product(storage: Storage, isa: Isa) -> IntrinSpec | None:
    """The vector intrinsic that multiplies a matrix stored so; None for tiles, and where the level has none."""
    held = operands(storage.family, isa)
    if storage.family == "row":
        return find_intrinsic(isa.name, "outputs", "int8", held.activation, held.pack)
    if storage.family in ("column", "gather"):
        return find_intrinsic(isa.name, "tokens", held.activation, held.weight, held.pack)
    return None


def sums_in_16_bits(storage: Storage, isa: Isa) -> bool:
    """Whether the level's product is one of bytes with a budget, that of `codegen/budget.py`."""
    dot = product(storage, isa)
    return dot is not None and dot.budget is not None


def legal(storage: Storage, isa: Isa) -> bool:
    """Whether the level can compute with a matrix stored so."""
    return LEGAL[storage.family](storage, isa)


def _row(storage: Storage, isa: Isa) -> bool:
    dot = product(storage, isa)
    if dot is None or storage.block is None:
        return dot is not None
    outputs, inputs = storage.block
    return outputs % dot.lanes == 0 and inputs % isa.operands.pack == 0


def _column(storage: Storage, isa: Isa) -> bool:
    return storage.block is not None and product(storage, isa) is not None and storage.block[1] % isa.operands.pack == 0


def _gather(storage: Storage, isa: Isa) -> bool:
    return storage.block is not None and product(storage, isa) is not None and storage.block[1] == 1


def _tile_row(storage: Storage, isa: Isa) -> bool:
    return storage.block is None and isa.tiles


def _tile_column(storage: Storage, isa: Isa) -> bool:
    if storage.block is None or not isa.tiles:
        return False
    return storage.block[0] % TILE == 0 and storage.block[1] == isa.operands.pack


LEGAL: dict[Family, Callable[[Storage, Isa], bool]] = {
    "row": _row,
    "column": _column,
    "gather": _gather,
    "tile_row": _tile_row,
    "tile_column": _tile_column,
}
"""Family to what it asks of a block and an ISA level."""
