"""What follows the product of a linear kernel, fused to it: requantise, activate, or add the residual and normalise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from tilewright.codegen.epilogues import Activate, AddNorm, Epilogue, Qkv, Raw
from tilewright.codegen.formats import AttentionOperands, Layout
from tilewright.codegen.kernels.common import (
    GROUP,
    Expr,
    activation_at,
    alias,
    at,
    declare,
    interleaved,
    quantize,
    scratch,
    stage,
    store,
)
from tilewright.codegen.kernels.interleave import bytes_in_order
from tilewright.codegen.kernels.math import ACTIVATIONS
from tilewright.codegen.kernels.nest import Nest, Value
from tilewright.codegen.kernels.norm import before_norm, norm_stages
from tilewright.codegen.workload import KernelSpec

Outputs = tuple[Any, ...]

Put = Callable[[Outputs, Expr, Expr, Expr, Expr, list[Expr], Expr], None]
"""(outputs, channel, group, token, vector, channels, lanes): store the channels from the given one on.

Those of a pack together, as one vector whose last indices are `lanes`, or `channels` one by one.
"""

Emit = Callable[[Nest, Value], None]
"""Emits what follows the product of one nest, which the second argument gives."""


@contextmanager
def _raw(spec: KernelSpec, epilogue: Raw, groups: Expr, lanes: Layout) -> Iterator[Emit]:
    (out,) = declare(epilogue.outputs(groups, spec.n, lanes))

    def emit(nest: Nest, value: Value) -> None:
        sums = nest.written(out)
        with nest.epilogue() as (_, axis):
            store(sums, value(axis), at(lanes, nest.group(axis), axis["t"], nest.output(axis)))

    yield emit


@contextmanager
def _qkv(spec: KernelSpec, epilogue: Qkv, groups: Expr, lanes: Layout) -> Iterator[Emit]:
    """Which of the three outputs a pack belongs to does not vary within it, because hidden is a multiple of pack."""
    operands, hidden = epilogue.operands, spec.n // 3
    pack = operands.pack
    outputs = declare(epilogue.outputs(groups, spec.n, lanes))

    def put(into: Outputs, first: Expr, g: Expr, t: Expr, packed: Expr, channels: list[Expr], lane: Expr) -> None:
        query, key, values = into
        with T.If(first < hidden):
            with T.Then():
                store(query, packed, [g, first // pack, t, lane])
            with T.Else(), T.If(first < 2 * hidden):
                with T.Then():
                    store(key, _offset(packed, operands, lane.lanes), [g, first // pack - hidden // pack, t, lane])
                with T.Else():
                    for index, channel in enumerate(channels):
                        last = t if lanes == "rows" else tirx.Ramp(0, 1, GROUP)
                        store(values, channel, [g, first + index - 2 * hidden, last])

    def emit(nest: Nest, value: Value) -> None:
        small = scratch(nest.block("small"), list(nest.axes.values()), operands.query)
        with nest.epilogue() as (variables, axis):
            store(small, quantize(value(axis), -127, 127, operands.query), variables)
        _scatter(nest, lanes, small, tuple(nest.written(output) for output in outputs), put, pack)

    yield emit


def _scatter(nest: Nest, lanes: Layout, small: Any, into: Outputs, put: Put, pack: int) -> None:
    """The stage `scatter`: small, in the order of the accumulators, goes to outputs that hold `pack` channels together."""
    width, axes = nest.axes["ni"], nest.axes
    whole = width % pack == 0  # else a pack spans row-blocks, and its channels are stored with a stride
    # unit axes carry the region read, which reverse_compute_at has to find in terms of axes
    if lanes == "rows":
        loops = {"q": axes["q"], "t": GROUP, "nb": axes["nb"], "i": 1}
    else:
        loops = {"q": axes["q"], "nb": axes["nb"], "j": axes["j"], "i": 1, "t": 1}
    with stage(nest.block("scatter"), loops) as variables:
        axis = dict(zip(loops, variables, strict=True))
        g, t, i = nest.group(axis), axis["t"], axis["i"]
        outputs = slice(i * width, i * width + width)
        if lanes == "rows":
            T.reads(small[axis["q"], t, axis["nb"], outputs])
        else:
            T.reads(small[axis["q"], axis["nb"], outputs, axis["j"], t * GROUP : t * GROUP + GROUP])
        T.writes(*(buffer[(g, *(slice(0, extent) for extent in buffer.shape[1:]))] for buffer in into))
        for first in range(0, width, pack if whole else 1):
            n = axis["nb"] * width + first
            if lanes == "rows":
                place = [axis["q"], t, axis["nb"]]
                packed = small.vload([*place, first], f"{small.dtype}x{pack}")
                put(into, n, g, t, packed, [small[(*place, first + p)] for p in range(pack)], tirx.Ramp(0, 1, pack))
                continue
            rows = [
                small.vload([axis["q"], axis["nb"], first + p, axis["j"], 0], f"{small.dtype}x{GROUP}")
                for p in range(pack if whole else 1)
            ]
            if whole:
                put(into, n, g, 0, interleaved(rows), rows, tirx.Ramp(0, 1, GROUP * pack))
            else:
                put(into, n, g, 0, rows[0], rows, tirx.Ramp(n % pack, pack, GROUP))


def orders_bytes(epilogue: Epilogue, tile: int, halved: bool) -> bool:
    """Whether the epilogue takes the accumulators of a `mixed` nest: bytes are put in order with a quarter of the shuffles.

    They are stored as rows of `tile` groups, so that the consumer's groups must stand together so. Two groups must be `halved`
    (see `bytes_in_order`).
    """
    if not isinstance(epilogue, Activate) or (tile == 2 and not halved):
        return False
    return (epilogue.consumer.layout, epilogue.consumer.dtype, epilogue.consumer.together) == ("columns", "uint8", tile)


def _scatter_tile(nest: Nest, small: Any, into: Any) -> None:
    """The stage `scatter` of a mixed nest: small s32, 0 to 255, goes to the rows of bytes of a tile of columns."""
    width, tile, axes = nest.axes["ni"], nest.tile, nest.axes
    with stage(nest.block("scatter"), {"q": axes["q"], "nb": axes["nb"], "i": 1, "j": 1, "t": 1}) as (q, nb, i, j, t):
        g = nest.group({"q": q})
        mixed = slice(j * tile, j * tile + tile), slice(t * GROUP, t * GROUP + GROUP)
        T.reads(small[(q, nb, slice(i * width, i * width + width), *mixed)])
        T.writes(into[(slice(g, g + tile), *(slice(0, extent) for extent in into.shape[1:]))])
        for n in range(width):
            vectors = [small.vload([q, nb, n, part, 0], f"int32x{GROUP}") for part in range(tile)]
            row = tirx.Ramp((nb * width + n) * tile * GROUP, 1, tile * GROUP)
            store(into, bytes_in_order(vectors), [g, 0, row])


def _offset(packed: Expr, operands: AttentionOperands, lanes: int) -> Expr:
    """`packed` s8 as the keys' dtype: adding 128 to a byte flips its highest bit."""
    if not operands.key_offset:
        return packed
    flipped = tirx.reinterpret(f"{operands.key}x{lanes}", packed)
    return tirx.bitwise_xor(flipped, tirx.Broadcast(tirx.const(operands.key_offset, operands.key), lanes))


@contextmanager
def _activate(spec: KernelSpec, epilogue: Activate, groups: Expr, lanes: Layout) -> Iterator[Emit]:
    consumer = epilogue.consumer
    pack, stored = consumer.pack, consumer.dtype
    (quant,) = declare(epilogue.inputs(groups, spec.n))
    (out,) = declare(epilogue.outputs(groups, spec.n, lanes))

    def put(into: Outputs, first: Expr, g: Expr, t: Expr, packed: Expr, _: list[Expr], lane: Expr) -> None:
        store(into[0], packed, [g, first // pack, t, lane])

    def emit(nest: Nest, value: Value) -> None:
        activated = nest.written(out)
        scatters = nest.mixed or (consumer.layout == "packed" and nest.axes["ni"] % pack == 0)
        dtype = "int32" if nest.mixed else stored
        small = scratch(nest.block("small"), list(nest.axes.values()), dtype) if scatters else activated
        with nest.epilogue() as (variables, axis):
            real = ACTIVATIONS[epilogue.activation](value(axis)) * quant[0]
            place = activation_at(consumer, groups, nest.group(axis), axis["t"], nest.output(axis))
            store(small, quantize(real, 0, 255, dtype, quant[1]), variables if scatters else place)
        if nest.mixed:
            _scatter_tile(nest, small, activated)
        elif scatters:
            _scatter(nest, lanes, small, (activated,), put, pack)

    yield emit


@contextmanager
def _add_norm(spec: KernelSpec, epilogue: AddNorm, groups: Expr, lanes: Layout) -> Iterator[Emit]:
    norm, hidden = epilogue.norm, spec.n
    residual, *args = declare(epilogue.inputs(groups, hidden))
    outputs = declare(epilogue.outputs(groups, hidden, lanes))
    pre = before_norm(groups, hidden, norm, outputs)

    def emit(nest: Nest, value: Value) -> None:
        sums = nest.written(pre)
        with nest.epilogue() as (_, axis):
            place = at(norm.residual, nest.group(axis), axis["t"], nest.output(axis))
            store(sums, value(axis) + residual[tuple(place)], place)

    yield emit
    norm_stages(alias(pre), groups, hidden, norm, tuple(args), outputs)


EPILOGUES: dict[type, Any] = {
    Raw: _raw,
    Qkv: _qkv,
    Activate: _activate,
    AddNorm: _add_norm,
}
"""Epilogue to what declares its arguments (spec, epilogue, number of groups, layout of the lanes) and yields its Emit."""
