"""LayerNorm over the channels of each token, with the float32 copy for the residual and the u8 copy for the next linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from tilewright.codegen.kernels.common import GROUP, Expr, arg, at, quantize, scratch, shape, stage, store
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


def norm_stages(pre: Any, groups: Expr, hidden: int, norm: Norm, operands: Operands, args: Any, outputs: Any) -> None:
    """Blocks total, spread, inverse and norm over pre f32 in the residual layout.

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
    with stage("norm", {**tokens, "c": hidden}) as (g, t, c):
        real = centered(g, t, c) * inverse[g, t] * gamma[c] + beta[c]
        store(stream, real, at(norm.stream, g, t, c))
        if norm.consumer is not None:
            small = quantize(real * quant[0], 0, 255, operands.activation, quant[1])
            store(quantized, small, at(norm.consumer, g, t, c, operands.pack))
