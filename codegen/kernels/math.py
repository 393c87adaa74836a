"""Vectorisable float32 functions: polynomials instead of libm calls, which would be made per element."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

Expr = Any  # tirx.PrimExpr; TVM ships no type information


# 1.5 * 2^23: adding it to x leaves round(x) in the low bits of the sum, by the rounding of the addition itself. TVM does not
# vectorise nearbyint, and SSE2 has no instruction for it.
_ROUNDER = 12582912.0
ROUNDED_ABOVE = 0x4B400000
"""What `rounded_bits` leaves above a number: its bits for 0."""


def rounded_bits(x: Expr) -> Expr:
    """ROUNDED_ABOVE + x rounded to the nearest int32, ties to even; |x| must be at most 2^22."""
    return T.reinterpret("int32", x + T.float32(_ROUNDER))


def round_to_int(x: Expr) -> Expr:
    """x rounded to the nearest int32, ties to even; |x| must be at most 2^22."""
    return rounded_bits(x) - T.int32(ROUNDED_ABOVE)


def _let(value: Expr, body: Callable[[Expr], Expr]) -> Expr:
    """body(v) with v bound to `value` once: an expression tree would repeat it at every use."""
    variable = tirx.Var("v", "float32")
    return tirx.Let(variable, value, body(variable))


def _horner(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Polynomial with `coefficients` from the highest degree down."""
    result: Expr = T.float32(coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + T.float32(coefficient)
    return result


def _halves(x: Expr, coefficients: Sequence[float]) -> Expr:
    """As `_horner`, an even number of coefficients: odd and even powers apart, because one long chain would wait for itself."""
    square = tirx.Var("v", "float32")
    odd, even = _horner(square, coefficients[::2]), _horner(square, coefficients[1::2])
    return tirx.Let(square, x * x, odd * x + even)


# 2^f for |f| <= 1/2, 1 at 0, from the highest degree down: relative error 9.2e-8 in exact arithmetic; fitted as _PHI is
_EXP2 = [1.3264727151e-3, 9.6715126429e-3, 5.5507337434e-2, 2.4022242085e-1, 6.931469776e-1, 1.0]

_POWER_ROUNDER = _ROUNDER + 127.0  # whose sum with a power has the exponent's bits lowest, biased as in a float32


def exp2(power: Expr) -> Expr:
    """2**power, relative error below 4e-7, for -126 <= power <= 127."""

    def from_power(power: Expr) -> Expr:
        def from_shifted(shifted: Expr) -> Expr:
            mantissa = _let(power - (shifted - T.float32(_POWER_ROUNDER)), lambda fraction: _horner(fraction, _EXP2))
            return mantissa * T.reinterpret("float32", T.reinterpret("int32", shifted) << 23)

        return _let(power + T.float32(_POWER_ROUNDER), from_shifted)

    return _let(power, from_power)


def exp(x: Expr) -> Expr:
    """e**x, relative error below 1e-6 for |x| <= 8 and 5e-6 for -87 <= x <= 88; x is clamped to that range."""
    return exp2(T.min(T.max(x, T.float32(-87.0)), T.float32(88.0)) * T.float32(math.log2(math.e)))


def tanh(x: Expr) -> Expr:
    """The hyperbolic tangent, absolute error below 1e-6."""
    return T.float32(1.0) - T.float32(2.0) / (exp(x * T.float32(2.0)) + T.float32(1.0))


# (Phi(x) - 1/2) / x, where Phi is the normal distribution function, on |x| <= _TAIL, beyond which Phi is 0 or 1 to 8e-8: a
# polynomial in u = 2 (x / _TAIL)^2 - 1, in which the coefficients' magnitudes add up to 0.4, so that float32 loses nothing. One
# polynomial takes fewer cycles than a ratio of two shorter ones. Fitted by iteratively reweighted linear least squares on 6000
# Chebyshev nodes to the least error of x Phi(x), 2.0e-7.
_TAIL = 5.25
_PHI = [
    -0.000414876225,
    0.00134586062,
    -0.00172137415,
    0.00215367486,
    -0.00471698987,
    0.00880057847,
    -0.0131470531,
    0.0184421081,
    -0.0249514988,
    0.0320421218,
    -0.0397726645,
    0.0496454042,
    -0.067126551,
    0.134659348,
]


def _gelu(x: Expr) -> Expr:
    """x Phi(x), error below 5e-7 (1 + |x|)."""

    def cumulative(clamped: Expr) -> Expr:
        u = clamped * clamped * T.float32(2 / _TAIL**2) - T.float32(1.0)
        return clamped * _let(u, lambda u: _halves(u, _PHI)) + T.float32(0.5)

    return _let(x, lambda v: v * _let(T.min(T.max(v, T.float32(-_TAIL)), T.float32(_TAIL)), cumulative))


def _gelu_tanh(x: Expr) -> Expr:
    scale = T.float32(math.sqrt(2.0 / math.pi))
    return _let(
        x,
        lambda v: T.float32(0.5) * v * (T.float32(1.0) + tanh(scale * (v + T.float32(0.044715) * v * v * v))),
    )


ACTIVATIONS: dict[str, Callable[[Expr], Expr]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: T.max(x, T.float32(0.0)),
    "tanh": tanh,
}
