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
_ROUNDER_BITS = 0x4B400000


def round_to_int(x: Expr) -> Expr:
    """x rounded to the nearest int32, ties to even; |x| must be at most 2^22."""
    return T.reinterpret("int32", x + T.float32(_ROUNDER)) - T.int32(_ROUNDER_BITS)


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


# 2^f = sum (f ln 2)^i / i!, truncated at degree 6: relative error below 2e-7 for |f| <= 0.5
_EXP2 = [math.log(2.0) ** i / math.factorial(i) for i in range(6, -1, -1)]


def exp(x: Expr) -> Expr:
    """e**x, relative error below 1e-6 for |x| <= 8 and 5e-6 for -87 <= x <= 88; x is clamped to that range."""

    def from_power(power: Expr) -> Expr:
        def from_shifted(shifted: Expr) -> Expr:
            """`shifted` is power + _ROUNDER: its low bits are the exponent, itself less _ROUNDER the rounded power."""
            mantissa = _let(power - (shifted - T.float32(_ROUNDER)), lambda fraction: _horner(fraction, _EXP2))
            exponent = (T.reinterpret("int32", shifted) - T.int32(_ROUNDER_BITS - 127)) << 23
            return mantissa * T.reinterpret("float32", exponent)

        return _let(power + T.float32(_ROUNDER), from_shifted)

    return _let(T.min(T.max(x, T.float32(-87.0)), T.float32(88.0)) * T.float32(math.log2(math.e)), from_power)


# erf(x) / x as a ratio of polynomials in x^2 on |x| <= 4, beyond which erf is +-1 in float32; fitted by iteratively
# reweighted linear least squares on 4000 Chebyshev nodes; error 2.1e-8 in exact arithmetic
_ERF_NUMERATOR = [1.97483519e-06, 2.88041076e-04, 4.0036249e-03, 5.34674116e-02, 1.96248457e-01, 1.12837899]
_ERF_DENOMINATOR = [3.74809799e-05, 1.21635513e-03, 1.54443784e-02, 1.16476215e-01, 5.07251859e-01, 1.0]


def erf(x: Expr) -> Expr:
    """The error function, absolute error below 7e-7."""

    def ratio(clamped: Expr) -> Expr:
        numerator = _let(clamped * clamped, lambda square: _horner(square, _ERF_NUMERATOR))
        denominator = _let(clamped * clamped, lambda square: _horner(square, _ERF_DENOMINATOR))
        return clamped * numerator / denominator

    return _let(T.min(T.max(x, T.float32(-4.0)), T.float32(4.0)), ratio)


def tanh(x: Expr) -> Expr:
    """The hyperbolic tangent, absolute error below 1e-6."""
    return T.float32(1.0) - T.float32(2.0) / (exp(x * T.float32(2.0)) + T.float32(1.0))


def _gelu(x: Expr) -> Expr:
    return _let(x, lambda v: T.float32(0.5) * v * (T.float32(1.0) + erf(v * T.float32(math.sqrt(0.5)))))


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
