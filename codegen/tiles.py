"""AMX tiles: the instructions that tile kernels are made of, and the pass that configures the tiles for a kernel's tasks.

Eight tile registers hold 16 rows of up to 64 bytes. Their numbers are immediates of the instructions, so kernels allot them:
four accumulators and, in twos, the operands, which makes four products of every four loads. By Intel's optimization manual
(throughput: tdpb..d 16 cycles, tileload 8, tilestore 16) the products then take twice the time of the loads.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm_ffi
from numpy.typing import NDArray
from tvm import tirx
from tvm.s_tir import SBlock, SBlockRealize

TILE = 16
"""Rows of a tile, and int32 in a row: the side of an accumulator. An operand has up to as many quads of bytes."""

ROW_BYTES = 64
ACCUMULATORS, LEFT, RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)
"""Tiles by their part in a kernel; accumulator 2 i + j is of left operand i and right operand j."""

TILE_TASKS = "tilewright.tile_tasks"
"""Loop annotation, the quads of an operand: iterations are tasks that multiply tiles."""


@dataclass(frozen=True)
class TileSpec:
    """One multiply-add of tiles, exact modulo 2**32: C s32[16, 16] += left [16, quads, 4] x right [quads, 16, 4].

    Layout: the rows of C and right have 64 bytes, those of left 4 * quads; where a row starts in memory is free. quads is up to
    16, and the same for all products of a kernel. Bytes have the dtypes `left` and `right` and any value.
    """

    instruction: str
    left: str
    right: str

    def reference(self, acc: NDArray[Any], left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.int32]:
        """What the instruction computes, in NumPy: s32[16, 16]."""
        total = acc + np.einsum("mkp,knp->mn", left.astype(np.int64), right.astype(np.int64))
        return np.asarray(total, np.int64).astype(np.int32)


TILE_SPECS = {spec.instruction: spec for spec in (TileSpec("tdpbusd", "uint8", "int8"), TileSpec("tdpbsud", "int8", "uint8"))}


def zero(tile: int) -> Any:
    """Clear `tile`."""
    return _call("tilezero", _number(tile))


def load(tile: int, first: Any, stride: int) -> Any:
    """Load `tile` from rows `stride` bytes apart; first: the buffer element where the first row starts."""
    return _call("tileloadd64", _number(tile), _address(first), tirx.IntImm("int64", stride))


def multiply(instruction: str, accumulator: int, left: int, right: int) -> Any:
    """accumulator += left x right, by an instruction of TILE_SPECS."""
    return _call(instruction, _number(accumulator), _number(left), _number(right))


def save(tile: int, first: Any, stride: int) -> Any:
    """Store `tile`, as `load` loads it."""
    return _call("tilestored64", _number(tile), _address(first), tirx.IntImm("int64", stride))


def configuration(quads: int) -> bytes:
    """The operand of ldtilecfg for left operands [16, quads, 4] and right operands [quads, 16, 4]."""
    rows = [quads if tile in RIGHT else TILE for tile in range(8)]
    columns = [4 * quads if tile in LEFT else ROW_BYTES for tile in range(8)]
    return struct.pack("<B15x8H16x8B8x", 1, *columns, *rows)  # palette 1


def configure_tiles(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Configure the tiles at the start of every iteration of a loop annotated with TILE_TASKS, and release them at its end.

    A thread's tiles are its own, so that each task configures them; Linux need not save those of a thread that released them.
    """

    def rewrite(loop: Any) -> Any:
        quads = dict(loop.annotations).get(TILE_TASKS)
        if quads is None:
            return loop
        config = tirx.decl_buffer((8,), "int64", "tile_config")
        words = np.frombuffer(configuration(int(quads)), np.int64)
        stores = [tirx.BufferStore(config, tirx.IntImm("int64", int(word)), [i]) for i, word in enumerate(words)]
        configure = _call("ldtilecfg", _address(tirx.BufferLoad(config, [0])))
        body = tirx.SeqStmt([*stores, tirx.Evaluate(configure), loop.body, tirx.Evaluate(_call("tilerelease"))])
        task = SBlockRealize([], True, SBlock([], [], [], "tiles", body, alloc_buffers=[config]))
        return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, task)

    return func.with_body(tvm_ffi.structural_map(func.body, [(tirx.For, rewrite)]))


def _number(tile: int) -> Any:
    return tirx.IntImm("int8", tile)


def _address(element: Any) -> Any:
    return tirx.address_of(element)


def _call(name: str, *arguments: Any) -> Any:
    return tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments)
