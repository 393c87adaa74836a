"""Sparse or dense, and stored how: the one place that decides, from the workload and the CPU's rates; and a model's `Plan`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.block_sparse import BLOCKS, block_density
from tilewright.codegen.decisions import Block, Storage
from tilewright.codegen.formats import GROUP
from tilewright.codegen.model import EncoderModel, Layer, Linear
from tilewright.codegen.plan import LayerPlan, LinearPlan, Plan
from tilewright.codegen.workload import density_bucket
from tilewright.schedules.blocks import COLUMNS, DENSE, dense, legal, product, sums_in_16_bits
from tilewright.schedules.decide import decide_attention, decide_linear
from tilewright.schedules.depth import ROW_COST, choose_depth
from tilewright.schedules.isa import Isa
from tilewright.schedules.rates import Kind, LevelRates, find

Sparse = Literal["auto", "always", "never"]
"""Whether zero blocks are skipped: where the rates say that it pays, wherever there is a kernel for it, or nowhere."""


@dataclass(frozen=True)
class Choice:
    """How a matrix is stored. reason: why not as the block that was found; empty if it is, or if there was none."""

    storage: Storage
    reason: str = ""


def sparse_storage(block: Block, isa: Isa) -> Storage | None:
    """The best way to store `block` that is legal on the level and fits its registers, whether it pays or not."""
    ways = [way for way in BLOCKS.get(block, ()) if legal(way, isa)]
    fitting = [way for way in ways if _fits(way, isa)] or ways[-1:]
    # where gathering alone multiplies bytes, it outdoes kernels that were listed for their larger blocks
    return next((way for way in fitting if sums_in_16_bits(way, isa)), fitting[0] if fitting else None)


def choose(n: int, k: int, kind: Kind, block: Block | None, density: float, isa: Isa, rates: LevelRates | None) -> Choice:
    """How to store a matrix of `n` outputs and `k` inputs in which `block` was found (None: dense).

    density: share of non-zero blocks. kind: the epilogue, by its rate. rates: of the level on the CPU; without any, or where
    they know no kernel of the family, skipping blocks is taken to pay.
    """
    if block is None:
        return Choice(dense(isa))
    storage = sparse_storage(block, isa)
    if storage is None:
        return Choice(dense(isa), f"computed as dense: no kernel for block {block} on {isa.name}")
    known = rates and rates.of(storage), rates and rates.of(dense(isa))
    if known[0] and known[1]:
        sparse_cycles, dense_cycles = known[0].cycles(n, k, density, kind), known[1].cycles(n, k, 1.0, kind)
        if sparse_cycles >= dense_cycles:
            needed = known[0].break_even(n, k, kind, dense_cycles)
            pays = f"pays on {isa.name} from {1 - needed:.0%} of zero blocks on" if needed > 0 else f"never pays on {isa.name}"
            return Choice(dense(isa), f"computed as dense: block {block} {pays}")
    return Choice(storage, f"block {block} stored as {storage.block} on {isa.name}" if storage.block != block else "")


def plan(model: EncoderModel, isa: Isa, cpu: str | None = None, sparse: Sparse = "auto") -> Plan:
    """Decide every kernel of a padded `model`, and the layout of the residual stream: that of most linears' accumulators.

    cpu: the LLVM CPU whose rates tell what pays; None for what is known of the level. sparse: anything but auto overrules them.
    """
    rates = find(isa.name, cpu) if sparse == "auto" else None
    if sparse == "never":
        model = model.map_linears(lambda linear: replace(linear, block=None))
    layers = tuple(_layer(layer, model.stored_head_dim, isa, rates, sparse != "never") for layer in model.layers)
    streams = Counter(linear.decisions.storage.lanes for layer in layers for linear in layer.linears())
    return Plan(isa.name, layers, streams.most_common(1)[0][0] if streams else "rows")


def _layer(layer: Layer, head_dim: int, isa: Isa, rates: LevelRates | None, gathers: bool) -> LayerPlan:
    attention = layer.attention
    return LayerPlan(
        _linear((attention.query, attention.key, attention.value), "qkv", isa, rates, gathers),
        decide_attention(head_dim, isa),
        _linear((attention.output,), "add_norm", isa, rates, gathers),
        _linear((layer.up,), "activate", isa, rates, gathers),
        _linear((layer.down,), "add_norm", isa, rates, gathers),
    )


def _linear(parts: tuple[Linear, ...], kind: Kind, isa: Isa, rates: LevelRates | None, gathers: bool) -> LinearPlan:
    """The plan of linears that share one kernel: they must agree on the block, or the kernel is dense.

    gathers: whether a dense matrix may be kept as columns, of which those of zeros are skipped.
    """
    n, k = sum(len(part.weight) for part in parts), parts[0].weight.shape[1]
    found = {part.block for part in parts}
    block = found.pop() if len(found) == 1 else None
    density = float(np.mean([_density(part, block) for part in parts]))
    if found:
        chosen = Choice(dense(isa), "computed as dense: q, k and v have different blocks")
    else:
        chosen = choose(n, k, kind, block, density, isa, rates)
        if not all(admits(chosen.storage, isa, part.weight) for part in parts):
            chosen = Choice(dense(isa), f"computed as dense: values are out of the range of {isa.name}'s products")
    bucket = density_bucket(density) if chosen.storage.block else 100
    chosen, depth = _with_depth(chosen, np.concatenate([part.weight for part in parts]), isa, gathers)
    return LinearPlan(decide_linear(chosen.storage, n, k, bucket, isa, depth), block, bucket, chosen.reason)


def _with_depth(chosen: Choice, weight: NDArray[np.generic], isa: Isa, gathers: bool) -> tuple[Choice, int]:
    """The choice for weight s8[N, K] with the depth of its sums in 16 bits, dense matrices as columns where that is faster."""
    as_columns = gathers and sums_in_16_bits(COLUMNS, isa) and len(weight) % 4 == 0 and admits(COLUMNS, isa, weight)
    if chosen.storage == DENSE and as_columns:
        found = choose_depth(weight, 4)
        if found.cost < ROW_COST:
            reason = chosen.reason or f"dense, kept as {COLUMNS.block} columns, which {isa.name} multiplies as bytes"
            return Choice(COLUMNS, reason), found.depth
    if chosen.storage.block is None or not sums_in_16_bits(chosen.storage, isa):
        return chosen, 1
    return chosen, choose_depth(weight, chosen.storage.block[0]).depth


def _density(linear: Linear, block: Block | None) -> float:
    """The share of non-zero blocks; 1 where none were found or they do not divide the matrix."""
    density = None if block is None else block_density(linear.weight, block)
    return 1.0 if density is None else density


def admits(storage: Storage, isa: Isa, weight: NDArray[np.generic]) -> bool:
    """Whether the weights lie in the range for which the level's product is exact (tiles take any byte)."""
    dot = product(storage, isa)
    if dot is None or not weight.size:
        return True
    low, high = dot.vector_range if dot.form == "outputs" else dot.scalar_range
    return bool(low <= weight.min() and weight.max() <= high)


def _fits(storage: Storage, isa: Isa) -> bool:
    """Whether a block's accumulators leave registers for its operands: gather holds a tile's interleaved tokens beside them."""
    if storage.block is None or storage.family in ("row", "tile_column"):
        return True
    vectors = storage.block[0] * GROUP // isa.lanes
    if storage.family == "gather":
        made = decide_linear(storage, storage.block[0], storage.block[1], 100, isa)
        return vectors * made.together // (2 if made.halves else 1) <= isa.registers // 2
    return vectors <= isa.registers
