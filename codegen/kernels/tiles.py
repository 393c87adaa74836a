"""Products of the tile families, which multiply two by two AMX tiles: two groups of tokens by two times 16 outputs.

- tile_row: dense; C[tokens, outputs], the left operand is x as `rows` store it, the right one are weights.
- tile_column: blocks of 16 n outputs by 4 inputs; C[outputs, tokens], the left operand are the weights of 16 blocks, the right
  one their 16 quads of inputs. A quad of a group's tokens is 64 bytes in the layout `packed`, so gathering 16 of them is 16
  vector copies, where in `rows` it would be 256 loads of 4 bytes. All quads of a row-block are gathered before the first is
  multiplied, because tile loads cannot take what a store has not yet brought to the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tilewright.codegen import tiles
from tilewright.codegen.kernels.common import GROUP, Expr, scratch, stage, store
from tilewright.codegen.tiles import ACCUMULATORS, LEFT, RIGHT, ROW_BYTES, TILE
from tilewright.codegen.workload import KernelSpec

Operand = Callable[[Expr], tuple[Expr, int]]
"""Step to the element where an operand's first row starts, and the bytes from row to row."""


def tile_quads(spec: KernelSpec) -> int:
    """Quads of inputs that one instruction multiplies: the most that divide all of a dense kernel's, 16 of a sparse one's."""
    if spec.linear.family == "tile_column":
        return TILE
    quads = spec.k // spec.linear.operands.pack
    return next(count for count in range(TILE, 0, -1) if quads % count == 0)


def product_tiles(spec: KernelSpec, x: Any, groups: Expr, weight: Any, index: Any, indptr: Any) -> Any:
    """acc[g, nb, 16, width] (tile_row) or acc[g, nb, width, 16] (tile_column), with a group more where `groups` is odd.

    weight s8[N / width, K / 4, 1, width, 4], or s8[steps, width, 16, 4] with index u16[steps, 16] and indptr.
    """
    pairs, width, family = tirx.floordiv(groups + 1, 2), spec.linear.row_block, spec.linear.family
    shape = [GROUP, width] if family == "tile_row" else [width, GROUP]
    acc = scratch("acc", [2 * pairs, spec.n // width, *shape], "int32")
    arguments = [buffer for buffer in (x, weight, index, indptr) if buffer is not None]
    with stage("product", {"p": pairs, "nb": spec.n // width}) as (p, nb):
        T.reads(*(buffer[tuple(slice(0, extent) for extent in buffer.shape)] for buffer in arguments))
        T.writes(acc[2 * p : 2 * p + 2, nb, 0 : shape[0], 0 : shape[1]])
        if family == "tile_row":
            multiply = partial(_dense, spec, x, weight, acc, nb, width)
        else:
            gathered = scratch("gathered", [2, -(-spec.k // (4 * TILE)), TILE, ROW_BYTES], "uint8")
            multiply = partial(_sparse, x, weight, index, indptr, gathered, acc, nb, width)
        with T.If(2 * p + 1 < groups):
            with T.Then():
                multiply([2 * p, 2 * p + 1])
            with T.Else():
                multiply([2 * p])
    return acc


def _dense(spec: KernelSpec, x: Any, weight: Any, acc: Any, nb: Expr, width: int, groups: list[Expr]) -> None:
    quads = tile_quads(spec)

    def tokens(g: Expr) -> Operand:
        return lambda step: (x[g, 0, step * (4 * quads)], spec.k)

    def weights(n: int) -> Operand:
        return lambda step: (weight[nb, step * quads, 0, n, 0], 4 * width)

    for outputs in _twos(width):
        target = [[acc[g, nb, 0, n] for n in outputs] for g in groups]
        left, right = [tokens(g) for g in groups], [weights(n) for n in outputs]
        _multiply("tdpbusd", left, right, target, 4 * width, spec.k // (4 * quads))


def _sparse(
    x: Any, weight: Any, index: Any, indptr: Any, gathered: Any, acc: Any, nb: Expr, width: int, groups: list[Expr]
) -> None:
    first, entries = indptr[nb], indptr[nb + 1] - indptr[nb]
    with T.grid(entries, TILE) as (entry, quad):
        IRBuilder.name("entry", entry)
        IRBuilder.name("quad", quad)
        for place, g in enumerate(groups):
            copied = x.vload([g, T.cast(index[first + entry, quad], "int32"), 0, 0], f"uint8x{ROW_BYTES}")
            store(gathered, copied, [place, entry, quad, tirx.Ramp(0, 1, ROW_BYTES)])

    def weights(n: int) -> Operand:
        return lambda entry: (weight[first + entry, n, 0, 0], ROW_BYTES)

    def tokens(place: int) -> Operand:
        return lambda entry: (gathered[place, entry, 0, 0], ROW_BYTES)

    for outputs in _twos(width):
        target = [[acc[g, nb, n, 0] for g in groups] for n in outputs]
        left, right = [weights(n) for n in outputs], [tokens(place) for place in range(len(groups))]
        _multiply("tdpbsud", left, right, target, ROW_BYTES, entries)


def _twos(width: int) -> list[range]:
    """The first outputs of the tiles of a row-block, in twos."""
    return [range(first, min(first + 2 * TILE, width), TILE) for first in range(0, width, 2 * TILE)]


def _multiply(
    instruction: str, left: list[Operand], right: list[Operand], target: list[list[Expr]], stride: int, steps: Expr
) -> None:
    """target[i][j] = sum of left[i](step) x right[j](step) over steps; rows of target are `stride` bytes apart."""
    places = [(i, j, ACCUMULATORS[len(RIGHT) * i + j]) for i in range(len(left)) for j in range(len(right))]
    for _, _, accumulator in places:
        T.evaluate(tiles.zero(accumulator))
    with T.serial(0, steps) as step:
        IRBuilder.name("step", step)
        for registers, operands in ((LEFT, left), (RIGHT, right)):
            for register, operand in zip(registers, operands, strict=False):
                T.evaluate(tiles.load(register, *operand(step)))
        for i, j, accumulator in places:
            T.evaluate(tiles.multiply(instruction, accumulator, LEFT[i], RIGHT[j]))
    for i, j, accumulator in places:
        T.evaluate(tiles.save(accumulator, target[i][j], stride))
