"""The emulated CPU's tile instructions: compiled C, run on it, against NumPy; on a CPU without tiles they are illegal."""

from __future__ import annotations

import struct
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.emulated_functions import Functions
from tests.emulator import Array, emulate

pytestmark = pytest.mark.skipif(find_spec("bochscpu") is None, reason="bochscpu-python is not installed")
SOURCE = r"""
#include <immintrin.h>

#define STRIDE 80 /* bytes from row to row of a, b and c */

#define MULTIPLY(name)                                                            \
  void name(const void *config, const void *a, const void *b, void *c) {          \
    _tile_loadconfig(config);                                                     \
    _tile_loadd(6, c, STRIDE);                                                    \
    _tile_loadd(0, a, STRIDE);                                                    \
    _tile_stream_loadd(7, b, STRIDE);                                             \
    _tile_##name(6, 0, 7);                                                        \
    _tile_stored(6, c, STRIDE);                                                   \
    _tile_release();                                                              \
  }
MULTIPLY(dpbuud) MULTIPLY(dpbusd) MULTIPLY(dpbsud) MULTIPLY(dpbssd)

void zero(const void *config, const void *a, const void *b, void *c) {
  _tile_loadconfig(config);
  _tile_loadd(6, c, STRIDE);
  _tile_zero(6);
  _tile_stored(6, c, STRIDE);
}

/* c: the configuration stored when it is in force, and after it is released */
void store_config(const void *config, const void *a, const void *b, void *c) {
  _tile_loadconfig(config);
  _tile_storeconfig(c);
  _tile_release();
  _tile_storeconfig((char *)c + 64);
}

void configure(const void *config, const void *a, const void *b, void *c) { _tile_loadconfig(config); }

void zero_unconfigured(const void *config, const void *a, const void *b, void *c) { _tile_zero(6); }

/* c becomes a with its rows in reverse, then two numbers that lie below the stack pointer meanwhile. Addresses are relative
   to rip, to a base with and without index, and to the stack pointer. */
__asm__(
  ".globl addresses\n"
  "addresses:\n"
  "  mov %rsi, %r8\n  mov %rcx, %r10\n"
  "  movq $4660, -8(%rsp)\n  movq $22136, -128(%rsp)\n"
  "  ldtilecfg config(%rip)\n"
  "  sttilecfg -72(%rsp)\n"
  "  ldtilecfg -72(%rsp)\n"
  "  lea config-100(%rip), %r11\n  mov $9, %ecx\n  ldtilecfg 28(%r11,%rcx,8)\n"
  "  mov $-80, %r9\n  tileloadd 1200(%r8,%r9), %tmm1\n"
  "  mov $40, %eax\n  tilestored %tmm1, (%r10,%rax,2)\n"
  "  mov -8(%rsp), %rax\n  mov %rax, 1280(%r10)\n"
  "  mov -128(%rsp), %rax\n  mov %rax, 1288(%r10)\n"
  "  ret\n"
  ".balign 64\n"
  "config: .byte 1\n .zero 15\n .short 0,64,0,0,0,0,0,0\n .zero 16\n .byte 0,16,0,0,0,0,0,0\n .zero 8\n"
);
"""
STRIDE = 80
SIGNED = {"dpbuud": "BB", "dpbusd": "Bb", "dpbsud": "bB", "dpbssd": "bb"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("amx")
    (directory / "tiles.c").write_text(SOURCE)
    flags = ["-O2", "-shared", "-fPIC", "-mamx-int8", "-mamx-tile"]
    subprocess.run(["gcc", *flags, "-o", directory / "tiles.so", directory / "tiles.c"], check=True)
    return directory / "tiles.so"


def config(shapes: dict[int, tuple[int, int]], palette: int = 1, start_row: int = 0, reserved: int = 0) -> Array:
    """What ldtilecfg reads; shapes: tile to its rows and bytes of a row."""
    rows, columns = [0] * 8, [0] * 8
    for tile, shape in shapes.items():
        rows[tile], columns[tile] = shape
    packed = struct.pack("<3B13x8H16x8B8x", palette, start_row, reserved, *columns, *rows)
    return np.frombuffer(packed, np.uint8).copy()


def product_shapes(m: int, n: int, k: int) -> Array:
    """Configuration of the C functions' tiles: 6 [m, n] += 0 [m, 4 k] x 7 [k, n, 4]."""
    return config({6: (m, 4 * n), 0: (m, 4 * k), 7: (k, 4 * n)})


def operands(random: np.random.Generator, name: str, m: int, n: int, k: int, extreme: bool) -> list[Array]:
    """a [m, 4 k], b [k, 4 n] with the bytes that `name` takes, and c s32[m, n], as the left part of wider arrays."""
    arrays = []
    for kind, rows in zip(SIGNED[name], (m, k), strict=True):
        ends = np.array([np.iinfo(kind).min, np.iinfo(kind).max])
        draw = random.choice(ends, (rows, STRIDE)) if extreme else random.integers(0, 256, (rows, STRIDE))
        arrays.append(draw.astype(np.uint8).view(kind))
    return [*arrays, random.integers(-(2**31), 2**31, (m, STRIDE // 4)).astype(np.int32)]


def test_products_are_those_of_numpy(library: Path) -> None:
    """Of any shape and sign, with sums that wrap around; what lies beside a tile in memory stays."""
    random = np.random.default_rng(0)
    calls, wanted = [], []
    for number in range(60):
        name = list(SIGNED)[number % 4]
        m, n, k = (16, 16, 16) if number < 8 else (int(size) for size in random.integers(1, 17, 3))
        a, b, c = operands(random, name, m, n, k, extreme=number % 8 < 4)
        left, right = a[:, : 4 * k].reshape(m, k, 4).astype(np.int64), b[:, : 4 * n].reshape(k, n, 4).astype(np.int64)
        want = c.astype(np.int64)
        want[:, :n] += np.einsum("mkp,knp->mn", left, right)
        calls.append((name, (config({6: (m, 4 * n), 0: (m, 4 * k), 7: (k, 4 * n)}), a, b, c)))
        wanted.append((want + 2**31) % 2**32 - 2**31)
    for (name, arrays), found, want in zip(calls, emulate("sapphire_rapids", Functions(library, calls)), wanted, strict=True):
        assert not isinstance(found, str), found
        np.testing.assert_array_equal(found, want, err_msg=f"{name} {[array.shape for array in arrays]}")


def test_other_instructions(library: Path) -> None:
    random = np.random.default_rng(0)
    a, c = (random.integers(0, 256, (16, STRIDE)).astype(np.uint8) for _ in range(2))
    shapes = config({0: (1, 64), 3: (16, 4), 6: (7, 20)})
    calls = [
        ("zero", (shapes, a, a, c)),
        ("store_config", (shapes, a, a, np.full((2, 64), 7, np.uint8))),
        ("addresses", (shapes, a, a, np.zeros(16 * STRIDE + 16, np.uint8))),
    ]
    zeroed, stored, rows = emulate("sapphire_rapids", Functions(library, calls))
    expected = c.copy()
    expected[:7, :20] = 0
    np.testing.assert_array_equal(zeroed, expected)
    np.testing.assert_array_equal(stored, [shapes, np.zeros(64)])
    np.testing.assert_array_equal(rows[: 16 * STRIDE].reshape(16, STRIDE)[:, :64], a[::-1, :64])
    assert rows[16 * STRIDE :].view(np.int64).tolist() == [4660, 22136]


REFUSED = [
    ("configure", config({0: (1, 4)}, palette=2), "#GP"),
    ("configure", config({0: (17, 4)}), "#GP"),
    ("configure", config({0: (1, 65)}), "#GP"),
    ("configure", config({0: (0, 4)}), "#GP"),
    ("configure", config({0: (4, 0)}), "#GP"),
    ("configure", config({0: (1, 4)}, reserved=1), "#GP"),
    ("configure", config({0: (1, 4)}, start_row=1), "start row 1 is not interpreted"),
    ("zero_unconfigured", config({}), "#UD tile 6 is not configured"),
    ("zero", config({5: (1, 4)}), "#UD tile 6 is not configured"),
    ("dpbusd", config({6: (4, 4), 0: (4, 8), 7: (3, 4)}), "#UD shapes of tiles do not fit"),
    ("dpbusd", config({6: (4, 4), 0: (5, 8), 7: (2, 4)}), "#UD shapes of tiles do not fit"),
    ("dpbusd", config({6: (4, 8), 0: (4, 8), 7: (2, 4)}), "#UD shapes of tiles do not fit"),
    ("dpbusd", config({6: (4, 4), 0: (4, 7), 7: (2, 4)}), "#UD shapes of tiles do not fit"),
]


def test_what_a_cpu_refuses_ends_the_emulation(library: Path) -> None:
    space = np.zeros((16, STRIDE), np.uint8)
    calls = [(name, (shapes, space, space, space)) for name, shapes, _ in REFUSED]
    for found, (name, _, message) in zip(emulate("sapphire_rapids", Functions(library, calls)), REFUSED, strict=True):
        assert isinstance(found, str), name
        assert message in found
        assert "tiles.so+" in found


def test_a_cpu_without_tiles_refuses_them(library: Path) -> None:
    space = np.zeros((16, STRIDE), np.uint8)
    (found,) = emulate("icelake_u", Functions(library, [("zero", (config({6: (1, 4)}), space, space, space))]))
    assert isinstance(found, str)
    assert "#UD illegal instruction at tiles.so+" in found
