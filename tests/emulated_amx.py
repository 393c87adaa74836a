"""The instructions of AMX-TILE and AMX-INT8 in NumPy, for an emulated CPU that refuses them as illegal.

Bochs 3 multiplies the signed operands of AMX-INT8 as unsigned, so the emulated CPU has no tiles of its own. Source: Intel's
Software Developer's Manual, volume 2 (instructions) and volume 1, chapter 18 (palette 1: 8 tiles of 16 rows of 64 bytes).
Not interpreted, because no code here needs it: restarting a tile load or store at a row other than 0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TILES, ROWS, ROW_BYTES = 8, 16, 64
Bytes = NDArray[np.uint8]

# by the mandatory prefix of the opcode: signedness of the left and of the right operand of tdpb..d
_OPERANDS = {0: (np.uint8, np.uint8), 1: (np.uint8, np.int8), 2: (np.int8, np.uint8), 3: (np.int8, np.int8)}
_NONE, _66, _F3, _F2 = range(4)
_CONFIGURE, _MOVE, _MULTIPLY = 0x49, 0x4B, 0x5E


class TileFault(Exception):
    """The exception that a CPU would raise in place of the instruction."""


@dataclass(frozen=True)
class _Instruction:
    """VEX.128.0F38.W0 `prefix` `opcode`. tile is ModRM.reg; right is VEX.vvvv. ModRM.rm is the tile `left` or, where that is
    None, memory: `base` and `index` (scaled) in bytes. sib: whether the address has an index at all."""

    prefix: int
    opcode: int
    tile: int
    left: int | None
    right: int
    base: int
    index: int
    sib: bool
    length: int


class Tiles:
    """Tile registers of one CPU. `memory(address, size)` is a writable view of guest memory or raises."""

    def __init__(self, memory: Callable[[int, int], Bytes]) -> None:
        self._memory = memory
        self._configure(bytes(64))

    def execute(self, code: bytes, address: int, register: Callable[[int], int]) -> int:
        """Execute the tile instruction that `code`, found at `address`, begins with; returns its length, 0 if there is none.

        register: number of a general register to its value. Raises TileFault.
        """
        instruction = _decode(code, address, register)
        if instruction is None:
            return 0
        form = (instruction.opcode, instruction.prefix, instruction.left is None)
        if form == (_CONFIGURE, _NONE, True):
            self._configure(self._memory(instruction.base + instruction.index, 64).tobytes())
        elif form == (_CONFIGURE, _66, True):
            self._memory(instruction.base + instruction.index, 64)[:] = np.frombuffer(self._config, np.uint8)
        elif form == (_CONFIGURE, _NONE, False) and (instruction.tile, instruction.left) == (0, 0):
            self._configure(bytes(64))
        elif form == (_CONFIGURE, _F2, False) and instruction.left == 0:
            self._held(instruction.tile)[:] = 0
        elif form in ((_MOVE, _F2, True), (_MOVE, _66, True)) and instruction.sib:
            self._set(instruction.tile, self._rows(instruction))
        elif form == (_MOVE, _F3, True) and instruction.sib:
            held = self._held(instruction.tile)
            for line, row in zip(self._lines(instruction), held, strict=True):
                line[:] = row
        elif instruction.opcode == _MULTIPLY and instruction.left is not None:
            self._multiply(instruction.prefix, instruction.tile, instruction.left, instruction.right)
        else:
            return 0
        return instruction.length

    def _configure(self, config: bytes) -> None:
        """ldtilecfg of 64 bytes; palette 0 is the state after tilerelease."""
        palette, start_row = config[:2]
        columns, rows = struct.unpack_from("<8H", config, 16), config[48 : 48 + TILES]
        if palette:
            reserved = config[2:16] + config[32:48] + config[56:]
            sizes = all(c <= ROW_BYTES and r <= ROWS and (c > 0) == (r > 0) for c, r in zip(columns, rows, strict=True))
            if palette > 1 or any(reserved) or not sizes:
                raise TileFault(f"#GP bad tile configuration {config.hex()}")
            if start_row:
                raise TileFault(f"start row {start_row} is not interpreted")
        self._config = config if palette else bytes(64)
        self._data = np.zeros((TILES, ROWS, ROW_BYTES), np.uint8)
        self._shapes = list(zip(rows, columns, strict=True)) if palette else [(0, 0)] * TILES

    def _held(self, tile: int) -> Bytes:
        """The configured part of a tile, [rows, bytes]."""
        rows, columns = self._shapes[tile] if tile < TILES else (0, 0)
        if not rows:
            raise TileFault(f"#UD tile {tile} is not configured")
        return self._data[tile, :rows, :columns]

    def _set(self, tile: int, value: Bytes) -> None:
        """Write a tile; what lies outside its configured part becomes zero."""
        self._data[tile] = 0
        self._held(tile)[:] = value

    def _lines(self, instruction: _Instruction) -> list[Bytes]:
        """Memory of each row; the index register holds the distance of rows, signed."""
        rows, columns = self._held(instruction.tile).shape
        return [self._memory((instruction.base + row * instruction.index) % 2**64, columns) for row in range(rows)]

    def _rows(self, instruction: _Instruction) -> Bytes:
        return np.stack(self._lines(instruction))

    def _multiply(self, prefix: int, tile: int, left: int, right: int) -> None:
        """tile s32[m, n] += left [m, k, 4] x right [k, n, 4], modulo 2**32."""
        if len({tile, left, right}) < 3:
            raise TileFault(f"#UD operands {tile}, {left}, {right} are not three tiles")
        c, a, b = (self._held(number) for number in (tile, left, right))
        (m, width), (k, _) = c.shape, b.shape
        if width % 4 or a.shape != (m, 4 * k) or b.shape[1] != width:
            raise TileFault(f"#UD shapes of tiles do not fit: {c.shape} += {a.shape} x {b.shape}")
        left_type, right_type = _OPERANDS[prefix]
        quads = a.reshape(m, k, 4).view(left_type).astype(np.int64)
        columns = b.reshape(k, width // 4, 4).view(right_type).astype(np.int64)
        total = np.einsum("mkp,knp->mn", quads, columns) + np.ascontiguousarray(c).view(np.int32)
        self._set(tile, np.ascontiguousarray((total % 2**32).astype(np.uint32)).view(np.uint8))


def _decode(code: bytes, address: int, register: Callable[[int], int]) -> _Instruction | None:
    if code[0] != 0xC4 or code[1] & 0x1F != 2 or code[2] & 0x84:
        return None
    high = [8 * (~code[1] >> bit & 1) for bit in (7, 6, 5)]  # R, X and B, which VEX holds inverted
    mode, reg, rm = code[4] >> 6, code[4] >> 3 & 7, code[4] & 7
    tile, right = reg + high[0], ~code[2] >> 3 & 15
    base = index = 0
    end, sib = 5, mode != 3 and rm == 4
    if mode != 3:
        size, relative = (0, 1, 4)[mode], False
        if sib:
            scale, number, rm = code[5] >> 6, code[5] >> 3 & 7, code[5] & 7
            end += 1
            if number + high[1] != 4:
                index = register(number + high[1]) << scale
        if rm == 5 and mode == 0:  # no base register: a displacement from 0, or without SIB from the next instruction
            size, relative = 4, not sib
        else:
            base = register(rm + high[2])
        base += int.from_bytes(code[end : end + size], "little", signed=True)
        end += size
        base += address + end if relative else 0
    return _Instruction(code[2] & 3, code[3], tile, rm + high[2] if mode == 3 else None, right, base, index, sib, end)
