"""The most that a core can multiply: loops of nothing but dot instructions, assembled for the purpose.

Operands and accumulators stay in registers, and there are more accumulators than the instructions' latency needs, so a
loop is bound by the execution ports alone. Kernels are judged by the best loop of their ISA level. Those with sums of 16 bits
are exact where columns are packed for it (`tilewright.codegen.budget`). All figures are of one core.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tilewright.schedules.isa import ISAS


@dataclass(frozen=True)
class Loop:
    """A step of one accumulator {a}, in AT&T syntax with {t} and {u} scratch registers; `reg` is xmm, ymm, zmm or tmm.

    macs: multiplications of int8-sized values in a step. The operands lie in {x} and {y}.
    """

    name: str
    isa: str
    reg: str
    macs: int
    step: tuple[str, ...]

    @property
    def accumulators(self) -> int:
        """Independent sums."""
        return _TILES if self.reg == "tmm" else _VECTORS


_PAIRS = ("vpmaddwd {y}, {x}, {t}", "vpaddd {t}, {a}, {a}")
_SUM = ("vpmaddwd {y}, {t}, {t}", "vpaddd {t}, {a}, {a}")
_BYTES = ("vpmaddubsw {y}, {x}, {t}", *_SUM)
_TWO_BYTES = ("vpmaddubsw {y}, {x}, {t}", "vpmaddubsw {y}, {x}, {u}", "vpaddw {u}, {t}, {t}", *_SUM)

LOOPS: tuple[Loop, ...] = (
    Loop("pmaddwd", "portable", "xmm", 8, ("movdqa {x}, {t}", "pmaddwd {y}, {t}", "paddd {t}, {a}")),
    Loop("vpmaddwd", "avx2", "ymm", 16, _PAIRS),
    Loop("vpmaddubsw", "avx2", "ymm", 32, _BYTES),
    Loop("2 vpmaddubsw", "avx2", "ymm", 64, _TWO_BYTES),
    Loop("vpdpbusd ymm", "avxvnni", "ymm", 32, ("{{vex}} vpdpbusd {y}, {x}, {a}",)),
    Loop("vpmaddwd zmm", "avx512", "zmm", 32, _PAIRS),
    Loop("vpmaddubsw zmm", "avx512", "zmm", 64, _BYTES),
    Loop("2 vpmaddubsw zmm", "avx512", "zmm", 128, _TWO_BYTES),
    Loop("vpdpbusd zmm", "avx512vnni", "zmm", 64, ("vpdpbusd {y}, {x}, {a}",)),
    Loop("tdpbusd", "amx", "tmm", 16 * 16 * 64, ("tdpbusd {y}, {x}, {a}",)),
)

_VECTORS, _SCRATCH = 10, 4  # with two operands, sixteen registers; 10 covers a latency of 5 at two a cycle
_TILES = 6  # with two operands, eight registers
_TILE_CONFIG = [".balign 64", ".Lconfig:", ".byte 1, 0", ".zero 14", ".fill 8, 2, 64", ".zero 16", ".fill 8, 1, 16", ".zero 8"]
"""Palette 1; eight tiles of 16 rows of 64 bytes."""
_AROUND = {"ymm": ("", "vzeroupper"), "zmm": ("", "vzeroupper"), "tmm": ("ldtilecfg .Lconfig(%rip)", "tilerelease")}
"""What to do before and after a loop on registers of a kind."""
_UNROLL = 4
_CLOCK_STEPS = 32  # `imull %eax, %eax` takes three cycles on every x86 core since Nehalem and Zen
_CLOCK_CYCLES = 3


class Meter:
    """Runs the loops of a machine: `module` holds those of `source`, `device` is where it was loaded."""

    def __init__(self, module: Any, device: Any, features: Collection[str]) -> None:
        self._module, self._device, self._features = module, device, features
        self._iterations: dict[tuple[int, float], int] = {}

    def available(self) -> tuple[Loop, ...]:
        """The loops that its CPU can run."""
        return tuple(loop for loop in LOOPS if set(ISAS[loop.isa].features) <= set(self._features))

    def rate(self, loop: Loop, seconds: float = 0.004) -> float:
        """GMAC/s of `loop`, the best of three measurements of about `seconds` in all."""
        return self._best(LOOPS.index(loop), loop.macs * loop.accumulators * _UNROLL, seconds)

    def peak(self, isa: str, seconds: float = 0.004) -> float:
        """GMAC/s of the core's best loop of level `isa`. Raises ValueError where there is none or the CPU lacks it."""
        rates = [self.rate(loop, seconds) for loop in self.available() if loop.isa == isa]
        if not rates:
            raise ValueError(
                f"no peak loop for {isa} on this CPU; there is one for {', '.join(x.isa for x in self.available())}"
            )
        return max(rates)

    def clock(self, seconds: float = 0.004) -> float:
        """GHz of the core now, from a chain of multiplications of known latency."""
        return self._best(len(LOOPS), _CLOCK_STEPS * _CLOCK_CYCLES, seconds)

    def _best(self, number: int, per_iteration: int, seconds: float) -> float:
        iterations = self._iterations.get((number, seconds), 1 << 10)
        self._seconds(number, 1 << 10, 1)
        while (took := self._seconds(number, iterations, 1)) < seconds / 3:
            # a little more than is needed, so that it is enough the next time as well
            iterations = max(2 * iterations, int(1.2 * iterations * seconds / 3 / took))
        self._iterations[number, seconds] = iterations
        return per_iteration * iterations / min(took, self._seconds(number, iterations, 2)) / 1e9

    def _seconds(self, number: int, iterations: int, repeat: int) -> float:
        timer = self._module.time_evaluator(f"loop{number}", self._device, number=1, repeat=repeat)
        return float(timer(iterations).min)


def _body(loop: Loop) -> list[str]:
    """The steps in pairs, multiplications first: on Zen 4 the adds then leave the multiplying ports alone more often."""
    sums, reg = loop.accumulators, f"%{loop.reg}"
    x, y = (f"{reg}{number}" for number in ((6, 7) if loop.reg == "tmm" else (14, 15)))

    def scratch(step: int) -> str:
        return f"{reg}{sums + step % _SCRATCH}"

    return [
        line.format(a=f"{reg}{step % sums}", t=scratch(step), u=scratch(step + _SCRATCH // 2), x=x, y=y)
        for first in range(0, _UNROLL * sums, 2)
        for line in loop.step
        for step in (first, first + 1)
    ]


def source() -> str:
    """Assembly of functions loop0, loop1, ... (iterations), one for each of LOOPS and last the clock's, as TVM calls them."""
    lines = [".text"]
    for number, body in enumerate([*map(_body, LOOPS), ["imull %eax, %eax"] * _CLOCK_STEPS]):
        before, after = _AROUND.get(LOOPS[number].reg, ("", "")) if number < len(LOOPS) else ("", "")
        name = f"__tvm_ffi_loop{number}"
        # (handle, arguments, count, result): the first argument's value is the number of iterations, the result None
        lines += [f".globl {name}", f"{name}:", "mov 8(%rsi), %rdi", "movq $0, (%rcx)", "movq $0, 8(%rcx)"]
        lines += [before, ".p2align 6", f".L{number}:", *body, "dec %rdi", f"jnz .L{number}", after, "xor %eax, %eax", "ret"]
    lines += _TILE_CONFIG
    lines.append('.section .note.GNU-stack,"",@progbits')
    return "\n".join(lines) + "\n"
