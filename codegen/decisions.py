"""What is decided about a kernel before any code of it exists: frozen records that packing, kernel and schedule only read.

They are chosen in `schedules/` and carried by the plan. Adding a decision is a field here, its default in
`schedules/decide.py`, its legal values in `schedules/space.py` and whoever reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from tilewright.codegen.formats import AttentionOperands, Format, Layout, Operands

Block = tuple[int, int]

Family = Literal["row", "column", "gather", "tile_row", "tile_column"]
"""Where a linear kernel's lanes lie: over outputs (row, tile_row) or over tokens; tile families multiply AMX tiles."""

FAMILY_LAYOUT: dict[Family, Layout] = {
    "row": "rows",
    "column": "packed",
    "gather": "columns",
    "tile_row": "rows",
    "tile_column": "packed",
}
"""The layout in which each family reads its activations."""

FAMILY_LANES: dict[Family, Layout] = {
    "row": "rows",
    "column": "columns",
    "gather": "columns",
    "tile_row": "rows",
    "tile_column": "columns",
}
"""The layout of each family's accumulators, and so of the float32 stream it adds to without transposing."""


@dataclass(frozen=True)
class Storage:
    """How a matrix is stored: the family of its kernel and the block of its weights (outputs, inputs), None if dense."""

    family: Family
    block: Block | None

    @property
    def lanes(self) -> Layout:
        """The layout of the accumulators."""
        return FAMILY_LANES[self.family]


@dataclass(frozen=True)
class LinearDecisions:
    """All that is decided about one linear kernel.

    row_block: outputs of one row-block: the stored block's, or those that a dense matrix is packed in.
    together: token groups whose channels stand together in the input of a gather kernel (see `Format`).
    token_tiles: token groups of a register tile in each of the kernel's loop nests, widest first; the last is always 1. A nest
    takes as many whole tiles as there are, the next one what is left over; (4, 2, 1), (2, 1) and (1,) are known to work.
    depth: 0 where products are summed in 32 bits. Else they are summed in 16 bits, results of so many instructions at a time,
    and columns are packed so that no sum can overflow (`codegen/budget.py`).
    halves: whether a tile of several groups is multiplied in two halves, one after the other, because its accumulators do not
    fit the registers.
    rows_at_once: row-blocks whose outputs a kernel finishes together, so that an epilogue stores whole packs of channels.
    partial_sums: blocks of a column kernel's entry, each of which is added to accumulators of its own; 1 unless row-blocks are
    single outputs.
    rows: tokens of one register tile of a row kernel; divides 16.
    chunks: into how many the row-blocks are divided; a chunk's weights stay in the L2 cache while all token groups pass. A
    sparse matrix's chunks are of equal work rather than of equal size, so their number divides PARTS.
    prefetch: how many bytes of weights ahead of their use they are fetched, 0 if it is left to the CPU (`codegen/prefetch.py`).
    extra: decisions that rules from outside this package read, as (name, value) in order of names.
    """

    storage: Storage
    operands: Operands
    row_block: int
    together: int = 1
    token_tiles: tuple[int, ...] = (1,)
    depth: int = 0
    halves: bool = False
    rows_at_once: int = 1
    partial_sums: int = 1
    rows: int = 4
    chunks: int = 1
    prefetch: int = 0
    extra: tuple[tuple[str, int], ...] = ()

    def with_extra(self, name: str, value: int) -> LinearDecisions:
        """These, and `value` for a decision from outside."""
        return replace(self, extra=tuple(sorted({**dict(self.extra), name: value}.items())))

    @property
    def family(self) -> Family:
        """That of the storage."""
        return self.storage.family

    @property
    def block(self) -> Block | None:
        """That of the storage."""
        return self.storage.block

    @property
    def packing(self) -> tuple[Any, ...]:
        """What the packed weights and the format of the activations follow: decisions that agree in it read the same arrays."""
        return self.storage, self.operands, self.row_block, self.together, self.depth, self.rows_at_once, self.partial_sums

    @property
    def input(self) -> Format:
        """The format in which the kernel reads its activations."""
        layout = FAMILY_LAYOUT[self.family]
        return Format(layout, self.operands.activation, self.operands.pack if layout == "packed" else 1, self.together)


@dataclass(frozen=True)
class TokenBucket:
    """Decisions for calls of at most `groups` token groups."""

    groups: int
    decisions: LinearDecisions


@dataclass(frozen=True)
class AttentionDecisions:
    """All that is decided about an attention kernel.

    keys: whose scores are summed together, a multiple of the operands' pack that divides 16. channels: whose context is summed
    together; divides a head's.
    """

    operands: AttentionOperands
    keys: int
    channels: int
