"""LayerNorm over the channels of each token, with the float32 copy for the residual and the u8 copy for the next linear."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from tilewright.codegen.epilogues import Norm
from tilewright.codegen.formats import Format
from tilewright.codegen.kernels.common import (
    GROUP,
    Expr,
    activation_at,
    alias,
    at,
    interleaved,
    quantize,
    scratch,
    stage,
    store,
)


def before_norm(groups: Expr, hidden: int, norm: Norm, outputs: tuple[Any, ...]) -> Any:
    """What is to be normalised, f32: the stream, which is then normalised in place, or scratch if that has another form.

    In place, half as much memory takes part, and what is left of it stays in the L2 cache.
    """
    if norm.stream == norm.residual and norm.written(hidden) == hidden:
        return alias(outputs[0])
    return scratch("pre", Format(norm.residual, "float32").shape(groups, hidden), "float32")


def norm_stages(pre: Any, groups: Expr, hidden: int, norm: Norm, args: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    """Blocks total, spread, inverse, norm (and pack, for a consumer of that layout) over pre f32 in the residual layout.

    The variance takes a second pass: the mean of squares minus the square of the mean loses digits where they are close.
    """
    (gamma, beta, quant), (stream, *copy), consumer = args, outputs, norm.consumer
    total, spread, inverse = (scratch(name, [groups, GROUP], "float32") for name in ("total", "spread", "inverse"))
    tokens: dict[str, Expr] = {"g": groups, "t": GROUP}
    channels = norm.channels or hidden

    def value(g: Expr, t: Expr, c: Expr) -> Expr:
        return pre[tuple(at(norm.residual, g, t, c))]

    def centered(g: Expr, t: Expr, c: Expr) -> Expr:
        difference = value(g, t, c) - total[g, t] * T.float32(1.0 / channels)
        return difference if channels == hidden else T.Select(c < channels, difference, T.float32(0.0))

    with stage("total", tokens, {"c": hidden}) as (g, t, c):
        with T.init():
            store(total, T.float32(0.0), [g, t])
        store(total, total[g, t] + value(g, t, c), [g, t])
    with stage("spread", tokens, {"c": hidden}) as (g, t, c):
        with T.init():
            store(spread, T.float32(0.0), [g, t])
        store(spread, spread[g, t] + centered(g, t, c) * centered(g, t, c), [g, t])
    with stage("inverse", tokens) as (g, t):
        store(inverse, T.float32(1.0) / T.sqrt(spread[g, t] * T.float32(1.0 / channels) + T.float32(norm.eps)), [g, t])
    packs = consumer is not None and consumer.layout == "packed"
    small: Any = copy[0] if copy else None
    if packs and consumer is not None:
        small = scratch("small", Format(norm.residual, consumer.dtype).shape(groups, hidden), consumer.dtype)
    with stage("norm", {**tokens, "c": norm.written(hidden)}) as (g, t, c):
        real = centered(g, t, c) * inverse[g, t] * gamma[c] + beta[c]
        if consumer is not None:
            value_u8 = quantize(real * quant[0], 0, 255, consumer.dtype, quant[1])
            place = at(norm.residual, g, t, c) if packs else activation_at(consumer, groups, g, t, c)
            store(small, value_u8, place)
        store(stream, real, at(norm.stream, g, t, c))  # last: it may stand where `real` is read
    if consumer is None or not packs:
        return
    pack, (quantized,) = consumer.pack, copy
    if norm.residual == "columns":
        # the unit axis carries the region read, which reverse_compute_at has to find in terms of axes
        with stage("pack", {"g": groups, "c": hidden // pack, "t": 1}) as (g, c, t):
            T.reads(small[g, c * pack : c * pack + pack, t * GROUP : t * GROUP + GROUP])
            T.writes(quantized[g, c, 0:GROUP, 0:pack])
            rows = [small.vload([g, c * pack + p, 0], f"{consumer.dtype}x{GROUP}") for p in range(pack)]
            store(quantized, interleaved(rows), [g, c, 0, tirx.Ramp(0, 1, GROUP * pack)])
    else:
        with stage("pack", {**tokens, "c": hidden // pack}) as (g, t, c):
            T.reads(small[g, t, c * pack : c * pack + pack])
            T.writes(quantized[g, c, t, 0:pack])
            channels = small.vload([g, t, c * pack], f"{consumer.dtype}x{pack}")
            store(quantized, channels, [g, c, t, tirx.Ramp(0, 1, pack)])
