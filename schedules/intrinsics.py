"""Tensor intrinsics: the integer dot products of each ISA level, with their declared operand layouts.

Every intrinsic is C s32[lanes] += sum over p < pack of vector[lanes, p] * scalar[p], over `depth` such operands at a time
where that is more than 1 (vector [depth, lanes, pack], scalar [depth, pack]). `form` tells where it is used:
- tokens: lanes are the 16 tokens of a group; `vector` holds activations, `scalar` weights (column, gather, attention);
- outputs: lanes are outputs; `vector` holds weights s8, `scalar` the activations of one token (row).

Names are a file format, because tuning records contain them: `tw.dot_<activations><weights>s32_<m>x<n>x<k>.<isa>`
with m tokens, n outputs and k = depth * pack products.
TVM does not check operand layout when it tensorizes, so a schedule must pass buffers in the layout declared here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tilewright.codegen.budget import BUDGET
from tilewright.codegen.formats import GROUP
from tilewright.codegen.kernels.common import stage, store
from tilewright.errors import ScheduleMismatch
from tilewright.schedules.isa import ISAS

Form = Literal["tokens", "outputs"]
Emit = Callable[..., Any]


@dataclass(frozen=True)
class IntrinSpec:
    """One dot product, exact for all values within `vector_range` and `scalar_range` (inclusive) that keep its `budget`.

    Layout: vector [lanes, pack], scalar [pack] and C [lanes], each row-major and contiguous; behind depth if it is not 1.
    step: lanes of one instruction. emit: (spec, C, vector, scalar repeated step times) -> C, as TIR vectors; with a
    depth, it gets that many vectors and scalars in turn.
    budget: None if no sum can saturate. Else a precondition: products p = 0, 1 and p = 2, 3 of all of depth are each summed in
    16 bits, and in either half the positive values of scalar sum to at most `budget`, the negative ones to at least -budget.
    """

    isa: str
    form: Form
    vector: str
    scalar: str
    lanes: int
    pack: int
    step: int
    emit: Emit
    vector_range: tuple[int, int]
    scalar_range: tuple[int, int]
    depth: int = 1
    budget: int | None = None

    @property
    def name(self) -> str:
        """The registered name."""
        short = {"int8": "s8", "uint8": "u8", "int16": "s16", "int32": "s32"}
        vector, scalar = short[self.vector], short[self.scalar]
        if self.form == "tokens":
            return f"tw.dot_{vector}{scalar}s32_{self.lanes}x1x{self.depth * self.pack}.{self.isa}"
        return f"tw.dot_{scalar}{vector}s32_1x{self.lanes}x{self.depth * self.pack}.{self.isa}"

    def reference(self, acc: NDArray[Any], vector: NDArray[Any], scalar: NDArray[Any]) -> NDArray[np.int32]:
        """What the intrinsic computes, in NumPy: s32[lanes]."""
        products = vector.astype(np.int64) * np.expand_dims(scalar.astype(np.int64), -2)
        sums: NDArray[np.int64] = products.reshape(self.depth, self.lanes, self.pack).sum(axis=(0, 2))
        return (acc + sums).astype(np.int32)


_PMADDWD = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
_PMADDUBSW = {8: "llvm.x86.avx2.pmadd.ub.sw", 16: "llvm.x86.avx512.pmaddubs.w.512"}


def _madd(spec: IntrinSpec, acc: Any, vector: Any, scalar: Any) -> Any:
    """pmaddwd and paddd: a pair of s16 products cannot exceed s32 unless all four factors are -32768."""
    wide = tirx.Cast(f"int16x{spec.step * 2}", vector) if spec.vector == "int8" else vector
    return acc + tirx.call_llvm_pure_intrin(f"int32x{spec.step}", _PMADDWD[spec.step], wide, scalar)


def _maddubs(spec: IntrinSpec, acc: Any, *operands: Any) -> Any:
    """vpmaddubsw, vpaddw, vpmaddwd by ones and vpaddd: pairs of u8 x s8 are summed in s16, where the first saturates."""
    halves = f"int16x{2 * spec.step}"
    total = None
    for vector, scalar in zip(operands[::2], operands[1::2], strict=True):
        signed = (tirx.reinterpret(f"int8x{4 * spec.step}", operand) for operand in (vector, scalar))
        pairs = tirx.call_llvm_pure_intrin(halves, _PMADDUBSW[spec.step], *signed)
        total = pairs if total is None else total + pairs
    ones = tirx.Broadcast(tirx.const(1, "int16"), 2 * spec.step)
    return acc + tirx.call_llvm_pure_intrin(f"int32x{spec.step}", _PMADDWD[spec.step], total, ones)


def _vpdpbusd(spec: IntrinSpec, acc: Any, vector: Any, scalar: Any) -> Any:
    """vpdpbusd: four u8 x s8 products and the accumulator summed in s32 without saturation. The u8 operand comes first.

    LLVM has one intrinsic per width; it encodes the 256-bit one as VEX where the CPU has avxvnni but no AVX-512.
    """
    ordered = (vector, scalar) if spec.vector == "uint8" else (scalar, vector)
    signed = (tirx.reinterpret(f"int8x{spec.step * 4}", operand) for operand in ordered)
    return tirx.call_llvm_pure_intrin(f"int32x{spec.step}", f"llvm.x86.avx512.vpdpbusd.{spec.step * 32}", acc, *signed)


_S16, _S8, _U8 = (-32767, 32767), (-128, 127), (0, 255)

INTRINSICS: dict[str, IntrinSpec] = {
    spec.name: spec
    for spec in (
        IntrinSpec("portable", "tokens", "int16", "int16", GROUP, 2, 4, _madd, _S16, _S16),
        IntrinSpec("portable", "outputs", "int8", "int16", 8, 2, 4, _madd, _S8, _S16),
        IntrinSpec("avx2", "tokens", "int16", "int16", GROUP, 2, 8, _madd, _S16, _S16),
        IntrinSpec("avx2", "outputs", "int8", "int16", 8, 2, 8, _madd, _S8, _S16),
        IntrinSpec("avx2", "tokens", "uint8", "int8", GROUP, 4, 8, _maddubs, _U8, _S8, 1, BUDGET),
        IntrinSpec("avx2", "tokens", "uint8", "int8", GROUP, 4, 8, _maddubs, _U8, _S8, 2, BUDGET),
        IntrinSpec("avxvnni", "tokens", "uint8", "int8", GROUP, 4, 8, _vpdpbusd, _U8, _S8),
        IntrinSpec("avxvnni", "tokens", "int8", "uint8", GROUP, 4, 8, _vpdpbusd, _S8, _U8),
        IntrinSpec("avxvnni", "outputs", "int8", "uint8", 8, 4, 8, _vpdpbusd, _S8, _U8),
        IntrinSpec("avx512", "tokens", "int16", "int16", GROUP, 2, 16, _madd, _S16, _S16),
        IntrinSpec("avx512", "outputs", "int8", "int16", 16, 2, 16, _madd, _S8, _S16),
        IntrinSpec("avx512", "tokens", "uint8", "int8", GROUP, 4, 16, _maddubs, _U8, _S8, 1, BUDGET),
        IntrinSpec("avx512", "tokens", "uint8", "int8", GROUP, 4, 16, _maddubs, _U8, _S8, 2, BUDGET),
        IntrinSpec("avx512vnni", "tokens", "uint8", "int8", GROUP, 4, 16, _vpdpbusd, _U8, _S8),
        IntrinSpec("avx512vnni", "tokens", "int8", "uint8", GROUP, 4, 16, _vpdpbusd, _S8, _U8),
        IntrinSpec("avx512vnni", "outputs", "int8", "uint8", 16, 4, 16, _vpdpbusd, _S8, _U8),
    )
}


def find_intrinsic(isa: str, form: Form, vector: str, scalar: str, pack: int, depth: int = 1) -> IntrinSpec | None:
    """The spec for a level, a form, the dtypes of both operands and the products summed; None if the level has none."""
    wanted = (ISAS[isa].vectors or isa, form, vector, scalar, pack, depth)
    return next((s for s in INTRINSICS.values() if (s.isa, s.form, s.vector, s.scalar, s.pack, s.depth) == wanted), None)


def intrinsic(isa: str, form: Form, vector: str, scalar: str, pack: int, depth: int = 1) -> IntrinSpec:
    """As `find_intrinsic`, registered with TVM on first use; raises ScheduleMismatch if there is none."""
    spec = find_intrinsic(isa, form, vector, scalar, pack, depth)
    if spec is None:
        raise ScheduleMismatch(
            f"{isa} has no dot product of {pack} {vector} (vector) by {scalar} with lanes over {form}; choose operands of "
            "INTRINSICS in schedules/intrinsics.py"
        )
    if TensorIntrin.get(spec.name, allow_missing=True) is None:
        TensorIntrin.register(spec.name, _describe(spec), _implement(spec))
    return spec


def _function(spec: IntrinSpec, body: Callable[[Any, Any, Any], None]) -> Any:
    """A function of both operands, activations first, and C; `body` gets C, vector and scalar."""
    deep = [spec.depth] if spec.depth > 1 else []
    vector, scalar = ([*deep, spec.lanes, spec.pack], spec.vector), ([*deep, spec.pack], spec.scalar)
    operands = (vector, scalar) if spec.form == "tokens" else (scalar, vector)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("dot")
        buffers = [
            T.arg(name, T.Buffer(tuple(shape), dtype, offset_factor=1))
            for name, (shape, dtype) in zip("ABC", (*operands, ([spec.lanes], "int32")), strict=True)
        ]
        left, right, total = (buffer[tuple(slice(0, extent) for extent in buffer.shape)] for buffer in buffers)
        with T.sblock("root"):
            T.reads(total, left, right)
            T.writes(total)
            body(buffers[2], *(buffers[:2] if spec.form == "tokens" else buffers[1::-1]))
    return builder.get()


def _describe(spec: IntrinSpec) -> Any:
    """The semantics, in the shape in which kernels write their products: activations are the left factor."""

    def body(total: Any, vector: Any, scalar: Any) -> None:
        deep = {"d": spec.depth} if spec.depth > 1 else {}
        with stage("dot", {"i": spec.lanes}, {**deep, "k": spec.pack}) as (i, *d, k):
            factors = vector[(*d, i, k)], scalar[(*d, k)]
            left, right = factors if spec.form == "tokens" else factors[::-1]
            T.reads(total[i], left, right)
            T.writes(total[i])
            store(total, total[i] + T.cast(left, "int32") * T.cast(right, "int32"), [i])

    return _function(spec, body)


def _implement(spec: IntrinSpec) -> Any:
    def body(total: Any, vector: Any, scalar: Any) -> None:
        with T.unroll(spec.lanes // spec.step) as part:
            IRBuilder.name("part", part)
            first = part * spec.step
            store(total, _product(spec, total, vector, scalar, first), [tirx.Ramp(first, 1, spec.step)])

    return _function(spec, body)


def _product(spec: IntrinSpec, C: Any, vector: Any, scalar: Any, first: int) -> Any:
    """C for `step` lanes from lane `first`; a scalar operand has 32 bits."""
    pack, step = spec.pack, spec.step
    operands: list[Any] = []
    for d in range(spec.depth):
        at = [d] if spec.depth > 1 else []
        word = tirx.reinterpret("int32", scalar.vload([*at, 0], f"{spec.scalar}x{pack}"))
        repeated = tirx.reinterpret(f"{spec.scalar}x{pack * step}", tirx.Broadcast(word, step))
        operands += [vector.vload([*at, first, 0], f"{spec.vector}x{pack * step}"), repeated]
    return spec.emit(spec, C.vload([first], f"int32x{step}"), *operands)
