"""The default decisions of a kernel: hand-made rules over the facts of the ISA level, the shape and the matrix's density."""

from __future__ import annotations

from tilewright.codegen.decisions import AttentionDecisions, LinearDecisions, Storage
from tilewright.codegen.formats import GROUP, Operands
from tilewright.codegen.workload import PARTS
from tilewright.schedules.blocks import operands, sums_in_16_bits
from tilewright.schedules.isa import Isa

CHUNK_WEIGHTS = 128 << 10
"""Stored weights that a chunk holds at most, so that they stay in the L2 cache beside the activations."""

PREFETCH = 1024
"""Bytes of weights that are fetched ahead: what a kernel of 16 tokens reads until a line of the last cache is there."""


def decide_linear(storage: Storage, n: int, k: int, density: int, isa: Isa, depth: int = 1) -> LinearDecisions:
    """Decisions for a matrix of `n` outputs and `k` inputs, `density` percent of whose blocks are non-zero.

    depth: that of `LinearDecisions`, where products are summed in 16 bits.
    """
    held, rows = operands(storage.family, isa), _row_block(storage, n, isa)
    narrow = sums_in_16_bits(storage, isa)
    at_once = _rows_at_once(storage, rows, n, isa)
    together = _together(storage, held, narrow, isa)
    blocks = n // rows // at_once
    return LinearDecisions(
        storage=storage,
        operands=held,
        row_block=rows,
        together=together,
        token_tiles=_token_tiles(storage, rows, together, isa),
        depth=depth if narrow else 0,
        halves=together > 1 and isa.registers < 32,
        rows_at_once=at_once,
        partial_sums=_partial_sums(storage, rows, isa),
        rows=_rows(rows, isa),
        chunks=_chunks(blocks, n * k * density // 100, storage.block is not None),
        prefetch=_prefetch(storage, rows),
    )


def decide_attention(channels: int, isa: Isa) -> AttentionDecisions:
    """Four keys, or channels, by 16 lanes fill half of 16 registers. Of 32 wide ones 8 are few, but hide products' latency."""
    together = 8 if isa.registers == 32 and channels % 8 == 0 else 4
    return AttentionDecisions(isa.attention, together, together)


def _row_block(storage: Storage, n: int, isa: Isa) -> int:
    """A sparse block's outputs. Dense: of 32 registers, three vectors leave room for eight tokens' accumulators."""
    if storage.block is not None:
        return storage.block[0]
    widths = (48, 32, 16) if isa.registers == 32 else (16, 8)
    return next(width for width in widths if n % width == 0)


def _together(storage: Storage, held: Operands, narrow: bool, isa: Isa) -> int:
    """As many groups as a register holds bytes of, where bytes are gathered and its size permits.

    vpdpbusd with 16 registers takes single groups: in two halves it would load rows twice.
    """
    if storage.family != "gather" or held.pack != 4:
        return 1
    return 4 if isa.registers == 32 else 2 if narrow else 1


def _token_tiles(storage: Storage, rows: int, together: int, isa: Isa) -> tuple[int, ...]:
    """Wider tiles use a weight (column) or a gathered row (gather) for more tokens.

    16 accumulators hide the latency of a column kernel's dot products; eight groups of (1, 4) blocks would be read from the L2
    cache.
    """
    if storage.family == "gather":
        return tuple(together >> halved for halved in range(together.bit_length()))
    fits = storage.family == "column" and isa.registers == 32 and 4 * rows <= 16
    return (4, 2, 1) if fits else (1,)


def _rows_at_once(storage: Storage, rows: int, n: int, isa: Isa) -> int:
    """As many as make a pack, where row-blocks are single outputs."""
    single = storage.family == "column" and rows == 1
    return isa.operands.pack if single and n % isa.operands.pack == 0 else 1


def _partial_sums(storage: Storage, rows: int, isa: Isa) -> int:
    """Two where `vpdpbusd` sums single outputs.

    A tile of four groups then has four accumulators, and a CPU that begins two products a cycle, which take five, would wait
    for them. After `pmaddwd` it waits for an addition of one cycle only.
    """
    return 2 if storage.family == "column" and rows == 1 and isa.operands.pack == 4 else 1


def _prefetch(storage: Storage, rows: int) -> int:
    """Of sparse matrices, whose lines CPUs do not foresee. Single outputs' entries are too small to be worth two instructions.

    A row kernel needs a line for so many products only that twice as many are on their way.
    """
    if storage.block is None or rows == 1 or storage.family not in ("row", "column", "gather"):
        return 0
    return 2 * PREFETCH if storage.family == "row" else PREFETCH


def _rows(row_block: int, isa: Isa) -> int:
    """Accumulators take half (of 16) to three quarters (of 32) of the registers."""
    accumulators = 24 if isa.registers == 32 else 8
    return next(rows for rows in (GROUP, 8, 4, 2, 1) if rows * row_block <= accumulators * isa.lanes or rows == 1)


def _chunks(blocks: int, stored: int, sparse: bool) -> int:
    """Eight, so that a single group of tokens keeps eight threads busy, or more where chunks would hold too many weights.

    The next lower number that divides the row-blocks and, of a sparse matrix, the parts of equal work.
    """
    wanted = max(8, stored // CHUNK_WEIGHTS)
    return next(count for count in range(wanted, 0, -1) if blocks % count == 0 and (not sparse or PARTS % count == 0))
