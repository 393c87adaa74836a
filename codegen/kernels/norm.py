"""LayerNorm over the channels of each token, with the float32 copy for the residual and the u8 copy for the next linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from tilewright.codegen.kernels.common import (
    GROUP,
    Expr,
    activation_at,
    alias,
    arg,
    at,
    interleaved,
    quantize,
    scratch,
    shape,
    stage,
    store,
)
from tilewright.codegen.workload import Layout, Operands


@dataclass(frozen=True)
class Norm:
    """Layouts of a LayerNorm: `residual` of its float32 input, `stream` of its float32 output, `consumer` of the u8 copy.

    There is no u8 copy if `consumer` is None.
    """

    eps: float
    residual: Layout
    stream: Layout
    consumer: Layout | None


def norm_args(hidden: int) -> tuple[Any, Any, Any]:
    """Declare gamma f32[H], beta f32[H] and quant f32[2] = (1 / scale, zero point) of the u8 copy."""
    return arg("gamma", [hidden], "float32"), arg("beta", [hidden], "float32"), arg("quant", [2], "float32")


def norm_outputs(groups: Expr, hidden: int, norm: Norm, operands: Operands) -> tuple[Any, Any]:
    """Declare the outputs: the float32 stream and, if there is a consumer, the u8 copy."""
    stream = arg("stream", shape(norm.stream, groups, hidden), "float32")
    if norm.consumer is None:
        return stream, None
    return stream, arg("quantized", shape(norm.consumer, groups, hidden, operands.pack), operands.activation)


def before_norm(groups: Expr, hidden: int, norm: Norm, outputs: tuple[Any, Any]) -> Any:
    """What is to be normalised, f32: the stream, which is then normalised in place, or scratch if that has another layout.

    In place, half as much memory takes part, and what is left of it stays in the L2 cache.
    """
    stream, _ = outputs
    return alias(stream) if norm.stream == norm.residual else scratch("pre", shape(norm.residual, groups, hidden), "float32")


def norm_stages(pre: Any, groups: Expr, hidden: int, norm: Norm, operands: Operands, args: Any, outputs: Any) -> None:
    """Blocks total, spread, inverse, norm (and pack, for a consumer of that layout) over pre f32 in the residual layout.

    The variance takes a second pass: the mean of squares minus the square of the mean loses digits where they are close.
    """
    (gamma, beta, quant), (stream, quantized) = args, outputs
    total, spread, inverse = (scratch(name, [groups, GROUP], "float32") for name in ("total", "spread", "inverse"))
    tokens: dict[str, Expr] = {"g": groups, "t": GROUP}

    def value(g: Expr, t: Expr, c: Expr) -> Expr:
        return pre[tuple(at(norm.residual, g, t, c))]

    def centered(g: Expr, t: Expr, c: Expr) -> Expr:
        return value(g, t, c) - total[g, t] * T.float32(1.0 / hidden)

    with stage("total", tokens, {"c": hidden}) as (g, t, c):
        with T.init():
            store(total, T.float32(0.0), [g, t])
        store(total, total[g, t] + value(g, t, c), [g, t])
    with stage("spread", tokens, {"c": hidden}) as (g, t, c):
        with T.init():
            store(spread, T.float32(0.0), [g, t])
        store(spread, spread[g, t] + centered(g, t, c) * centered(g, t, c), [g, t])
    with stage("inverse", tokens) as (g, t):
        store(inverse, T.float32(1.0) / T.sqrt(spread[g, t] * T.float32(1.0 / hidden) + T.float32(norm.eps)), [g, t])
    packs, pack = norm.consumer == "packed", operands.pack
    small = scratch("small", shape(norm.residual, groups, hidden), operands.activation) if packs else quantized
    with stage("norm", {**tokens, "c": hidden}) as (g, t, c):
        real = centered(g, t, c) * inverse[g, t] * gamma[c] + beta[c]
        if norm.consumer is not None:
            value_u8 = quantize(real * quant[0], 0, 255, operands.activation, quant[1])
            place = at(norm.residual, g, t, c) if packs else activation_at(norm.consumer, operands, groups, g, t, c)
            store(small, value_u8, place)
        store(stream, real, at(norm.stream, g, t, c))  # last: it may stand where `real` is read
    if packs and norm.residual == "columns":
        # the unit axis carries the region read, which reverse_compute_at has to find in terms of axes
        with stage("pack", {"g": groups, "c": hidden // pack, "t": 1}) as (g, c, t):
            T.reads(small[g, c * pack : c * pack + pack, t * GROUP : t * GROUP + GROUP])
            T.writes(quantized[g, c, 0:GROUP, 0:pack])
            rows = [small.vload([g, c * pack + p, 0], f"{operands.activation}x{GROUP}") for p in range(pack)]
            store(quantized, interleaved(rows), [g, c, 0, tirx.Ramp(0, 1, GROUP * pack)])
    elif packs:
        with stage("pack", {**tokens, "c": hidden // pack}) as (g, t, c):
            T.reads(small[g, t, c * pack : c * pack + pack])
            T.writes(quantized[g, c, t, 0:pack])
            channels = small.vload([g, t, c * pack], f"{operands.activation}x{pack}")
            store(quantized, channels, [g, c, t, tirx.Ramp(0, 1, pack)])
