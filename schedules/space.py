"""The space of decisions: which values each field of a kernel's record may take, as tables beside the defaults of `decide.py`.

A table lists fields in the order in which they are decided, each with a function of what was decided so far; fields that it
does not list keep their defaults. `candidates` makes all combinations. Each of them compiles and is exact; what a CPU cannot
profit from, such as more accumulators than it has registers, is left out. Adding a decision is a field and its entry here; from
outside the package the entry alone (see docs/extending.md), which is then one of `LinearDecisions.extra`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from tilewright.codegen.block_sparse import BLOCKS
from tilewright.codegen.decisions import AttentionDecisions, Block, Family, LinearDecisions, Storage
from tilewright.codegen.formats import GROUP, PAIRS, QUADS, Operands
from tilewright.codegen.workload import Workload
from tilewright.schedules.blocks import COLUMNS, DENSE, dense, legal, product, sums_in_16_bits
from tilewright.schedules.decide import PREFETCH, decide_attention, decide_linear
from tilewright.schedules.intrinsics import find_intrinsic
from tilewright.schedules.isa import ISAS, Isa
from tilewright.schedules.linear import divides

Legal = Callable[[Any, Workload], Iterable[Any]]
"""(decisions so far, workload) to the legal values of a field."""

INDEX_STEP = 4
"""The largest distance of neighbouring rows of a group, of 16 bits each, in units of `codegen.kernels.linear.index_step`."""

MOST_CHUNKS = 64
"""More would be fewer row-blocks a task than its start is worth."""


def storages(n: int, k: int, block: Block | None, isa: Isa) -> tuple[Storage, ...]:
    """Every way that level `isa` may store a matrix of `n` outputs and `k` inputs in which `block` was found, None if dense.

    As blocks that divide the one found, or dense. Where bytes can only be multiplied in columns, so may a dense matrix be.
    """
    found = [dense(isa), DENSE] + ([COLUMNS] if sums_in_16_bits(COLUMNS, isa) else [])
    if block is not None:
        found += [way for ways in BLOCKS.values() for way in ways if way.block and _divides(way.block, *block)]
    return tuple(dict.fromkeys(way for way in found if legal(way, isa) and _holds(way, n, k, isa)))


def candidates(workload: Workload, storage: Storage) -> tuple[LinearDecisions, ...]:
    """All legal decisions for a matrix stored so; which is best at which density they do not say.

    Those of equal `packing` read the same packed weights.
    """
    isa = ISAS[workload.isa]
    start = decide_linear(storage, workload.n, workload.k, workload.density if storage.block else 100, isa)
    return tuple(_combinations(start, workload, LINEAR.get(storage.family, ANY)))


def attention_candidates(workload: Workload) -> tuple[AttentionDecisions, ...]:
    """All legal decisions for attention of `workload.n` heads of `workload.k` channels."""
    return tuple(_combinations(decide_attention(workload.k, ISAS[workload.isa]), workload, ATTENTION))


def _combinations(start: Any, workload: Workload, table: Mapping[str, Legal]) -> list[Any]:
    made = [start]
    for name, values in table.items():
        made = [decided for one in made for decided in _decided(one, name, tuple(dict.fromkeys(values(one, workload))))]
    return list(dict.fromkeys(made))


def _decided(made: Any, name: str, values: tuple[Any, ...]) -> list[Any]:
    """`made` with each of the values for a field; for a decision from outside, the first is that of a kernel without it."""
    if hasattr(made, name):
        return [replace(made, **{name: value}) for value in values]
    return [made, *(made.with_extra(name, value) for value in values[1:])]


def _divides(inner: Block, n: int, k: int) -> bool:
    return n % inner[0] == 0 and k % inner[1] == 0


def _holds(storage: Storage, n: int, k: int, isa: Isa) -> bool:
    """Whether the shape divides into what is stored, and 16 bits count its row-blocks and reach its inputs."""
    if storage.block is not None:
        return _divides(storage.block, n, k) and max(n // storage.block[0], k * INDEX_STEP) < 1 << 16
    return k % isa.operands.pack == 0 and n % min(_widths(isa)) == 0


def _widths(isa: Isa) -> list[int]:
    """Outputs of a dense row-block: one to six vectors as the products of rows, or tiles, come."""
    dot = product(DENSE, isa)
    step = max(GROUP if isa.tiles else 1, dot.lanes if dot else GROUP)
    return [step * vectors for vectors in range(1, 7)]


def _fills(vectors: int, isa: Isa, beside: int) -> bool:
    """Whether so many accumulators leave `beside` registers free, and are a quarter of those that there are."""
    return isa.registers // 4 <= vectors <= isa.registers - beside


def _chunks(made: LinearDecisions, workload: Workload) -> Iterable[int]:
    return (count for count in range(1, MOST_CHUNKS + 1) if divides(made, workload.n, count))


def _row_block(made: LinearDecisions, workload: Workload) -> Iterable[int]:
    """A sparse block's outputs; a dense matrix may be packed in any number that divides its own."""
    if made.block is not None:
        return (made.row_block,)
    return (width for width in _widths(ISAS[workload.isa]) if workload.n % width == 0)


def _rows(made: LinearDecisions, workload: Workload) -> Iterable[int]:
    """A vector of weights and the activations of a token stand beside the accumulators."""
    isa = ISAS[workload.isa]
    counts = [count for count in (1, 2, 4, 8, 16) if _fills(count * made.row_block // isa.lanes, isa, 2)]
    return counts or [made.rows]


def _operands(made: LinearDecisions, workload: Workload) -> Iterable[Operands]:
    """What the level multiplies exactly: a column kernel cannot choose which products share a lane of 16 bits."""
    for held in (PAIRS, QUADS):
        if find_intrinsic(workload.isa, "tokens", held.activation, held.weight, held.pack) is not None:
            yield held


def _depth(made: LinearDecisions, workload: Workload) -> Iterable[int]:
    held = made.operands
    found = find_intrinsic(workload.isa, "tokens", held.activation, held.weight, held.pack)
    return (1, 2) if found is not None and found.budget is not None else (0,)


def _together(made: LinearDecisions, workload: Workload) -> Iterable[int]:
    """Up to as many groups as a register holds the bytes of."""
    isa = ISAS[workload.isa]
    if made.operands.pack != 4:
        return (1,)
    return tuple(count for count in (1, 2, 4) if count * GROUP <= 4 * isa.lanes)


def _halves(made: LinearDecisions, workload: Workload) -> Iterable[bool]:
    """A tile's rows, interleaved, take as many registers as groups; a half needs half as many of them and of accumulators."""
    isa, vectors = ISAS[workload.isa], GROUP // ISAS[workload.isa].lanes
    fitting = [
        halves
        for halves in ((False, True) if made.together > 1 else (False,))
        if (made.row_block + 1) * vectors * made.together // (1 + halves) < isa.registers
    ]
    return fitting or [made.together > 1]


def _gather_tiles(made: LinearDecisions, workload: Workload) -> Iterable[tuple[int, ...]]:
    """Those in which the input stands."""
    return (made.input.tiles,)


def _column_tiles(made: LinearDecisions, workload: Workload) -> Iterable[tuple[int, ...]]:
    isa = ISAS[workload.isa]
    return [
        tiles
        for tiles in ((1,), (2, 1), (4, 2, 1))
        if tiles == (1,) or tiles[0] * made.row_block * GROUP // isa.lanes < isa.registers
    ]


def _rows_at_once(made: LinearDecisions, workload: Workload) -> Iterable[int]:
    pack = made.operands.pack
    counts = (1, pack, 2 * pack, 4 * pack) if made.row_block == 1 else (1,)
    return (count for count in counts if workload.n % count == 0)


def _partial_sums(made: LinearDecisions, workload: Workload) -> Iterable[int]:
    return (1, 2, 4) if made.row_block == 1 else (1,)


def _prefetch(made: LinearDecisions, workload: Workload) -> Iterable[int]:
    """CPUs foresee a dense matrix's lines better than it pays to ask. What pays tell only weights that are in no cache."""
    return (0, PREFETCH, 2 * PREFETCH) if made.block is not None else (0,)


LINEAR: dict[Family, dict[str, Legal]] = {
    "row": {"row_block": _row_block, "rows": _rows, "chunks": _chunks, "prefetch": _prefetch},
    "column": {
        "partial_sums": _partial_sums,
        "token_tiles": _column_tiles,
        "rows_at_once": _rows_at_once,
        "chunks": _chunks,
        "prefetch": _prefetch,
    },
    "gather": {
        "operands": _operands,
        "depth": _depth,
        "together": _together,
        "halves": _halves,
        "token_tiles": _gather_tiles,
        "chunks": _chunks,
        "prefetch": _prefetch,
    },
    "tile_row": {"row_block": _row_block, "chunks": _chunks},
    "tile_column": {"chunks": _chunks},
}
"""Family to the fields that are decided for it, in order, with their legal values."""

ANY: dict[str, Legal] = {"chunks": _chunks}
"""As an entry of LINEAR, for families from outside that have none."""


def _keys(made: AttentionDecisions, workload: Workload) -> Iterable[int]:
    """No tile may straddle two groups, and no pack two tiles."""
    isa, pack = ISAS[workload.isa], made.operands.pack
    return (count for count in (2, 4, 8, 16) if count % pack == 0 and count * GROUP // isa.lanes <= isa.registers)


def _channels(made: AttentionDecisions, workload: Workload) -> Iterable[int]:
    isa = ISAS[workload.isa]
    return (count for count in (2, 4, 8, 16) if workload.k % count == 0 and count * GROUP // isa.lanes <= isa.registers)


ATTENTION: dict[str, Legal] = {"keys": _keys, "channels": _channels}
"""As an entry of LINEAR, for attention."""
