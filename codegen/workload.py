"""`Workload`: the identity of a kernel, shared by lowering, schedules and tuning records."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

GROUP = 16
"""Tokens of one group: the unit to which the packed token axis is rounded up."""

PARTS = 64
"""Parts of equal work that a sparse matrix's row-blocks are divided into, for schedules to hand to threads."""

SCHEMA = 1
"""Version of `Workload.key()`; part of every tuning record."""

ATTRIBUTE = "tilewright.workload"
"""PrimFunc attribute that carries the workload's JSON."""

Layout = Literal["rows", "columns", "packed"]
"""Order of an activation's axes: rows is [G, 16, C], columns is [G, C, 16], packed is [G, C / pack, 16, pack].

The columns that `gather` reads, at a level with W = `Operands.columns` > 1: every W groups, from the first on, stand as
[C, W, 16], so that W groups of a channel are one vector register. Of the G % W groups left over, W / 2 stand as
[C, W / 2, 16] if there are so many, and so on down to single groups (`Operands.tiles`). The declared shape stays [G, C, 16].
Other columns (float32, sums, attention's values) are as declared.
"""

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
class Operands:
    """How the integer operands of one ISA level are stored.

    pack: neighbouring products summed by one instruction lane (2 for 16-bit, 4 for 8-bit operands).
    activation: dtype that holds u8 activations (int16 where the multiplier is 16-bit, else uint8).
    weight: dtype of broadcast weights in the column and gather families; `row` always stores int8.
    attention: dtype of queries and values. key: dtype of keys, stored as s8 value + key_offset: an unsigned key
    adds key_offset * sum(query) to all scores of a query, which softmax cancels exactly.
    row_blocks: outputs a dense `row` weight may be kept together in, widest first; the first that divides N is used.
    columns: token groups whose channels stand together in the activations of `gather` (see `Layout`).
    accumulators: vectors of 16 s32 that a `column` kernel sums at a time, at most, over several token groups; a block of more
    outputs takes one group.
    """

    pack: int
    activation: str
    weight: str
    attention: str
    key: str
    key_offset: int
    row_blocks: tuple[int, ...] = (16, 8)
    columns: int = 1
    accumulators: int = 1

    @property
    def tiles(self) -> tuple[int, ...]:
        """Groups of each tile size of integer columns, widest first: `columns`, a power of two, and its halves down to 1."""
        return tuple(1 << size for size in reversed(range(self.columns.bit_length())))


INT16_PAIRS = Operands(2, "int16", "int16", "int16", "int16", 0)
INT8_QUADS = Operands(4, "uint8", "int8", "int8", "uint8", 128)


@dataclass(frozen=True)
class Workload:
    """What a kernel computes, free of the weights' values and of the number of tokens.

    op: linear, attention, embedding, token_head, sequence_head or pool. n, k: outputs and inputs (heads and head_dim
    for attention, words and channels for embedding).
    block: sparse block (outputs, inputs), None if dense. epilogue: what follows the product, with the layouts it writes.
    residual: layout of the float32 stream, where the kernel has a LayerNorm. density: percent of non-zero blocks rounded
    up to a multiple of 5. tokens: bucket a record was tuned for, 0 if it serves any.
    """

    op: str
    n: int
    k: int
    isa: str
    operands: Operands
    epilogue: str = ""
    family: Family | None = None
    block: tuple[int, int] | None = None
    residual: Layout | None = None
    density: int = 100
    tokens: int = 0
    threads: int = 0

    def key(self) -> str:
        """The tuning-record key: one line, stable across processes and TVM versions."""
        block = "dense" if self.block is None else f"{self.block[0]}x{self.block[1]}"
        operands = f"{self.operands.activation}x{self.operands.weight}"
        return (
            f"v{SCHEMA}:{self.op}:{self.n}x{self.k}:{block}:{self.family or '-'}:d{self.density}:{operands}:"
            f"{self.epilogue or '-'}:t{self.tokens}:c{self.threads}:{self.isa}"
        )

    def to_json(self) -> str:
        """All fields as JSON, for ATTRIBUTE."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """Inverse of `to_json`."""
        fields = json.loads(text)
        operands = fields["operands"]
        fields["operands"] = Operands(**{**operands, "row_blocks": tuple(operands["row_blocks"])})
        fields["block"] = tuple(fields["block"]) if fields["block"] else None
        return cls(**fields)
