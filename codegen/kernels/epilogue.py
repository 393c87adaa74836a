"""What follows the product of a linear kernel, fused to it: requantise, activate, or add the residual and normalise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from tilewright.codegen.kernels.common import GROUP, Expr, arg, at, interleaved, quantize, scratch, shape, stage, store
from tilewright.codegen.kernels.math import ACTIVATIONS
from tilewright.codegen.kernels.norm import Norm, norm_args, norm_outputs, norm_stages
from tilewright.codegen.workload import Layout, Operands, Workload


@dataclass(frozen=True)
class Qkv:
    """Epilogue: the concatenated q, k, v as attention wants them.

    q, k: [G, H / pack, 16, pack], neighbouring channels of a token adjacent. v: [G, H, 16].
    """


@dataclass(frozen=True)
class Activate:
    """Epilogue: activation function, then u8 in the layout of the next linear."""

    activation: str
    consumer: Layout


@dataclass(frozen=True)
class AddNorm:
    """Epilogue: residual add and LayerNorm."""

    norm: Norm


@dataclass(frozen=True)
class Raw:
    """Epilogue: the int32 sums with the zero point folded in, [G, C, 16] or [G, 16, C]; what tests compare bit for bit."""


Epilogue = Qkv | Activate | AddNorm | Raw


def _epilogue_raw(workload: Workload, _: Raw, axes: dict[str, Expr], value: Any, layout: Layout) -> None:
    out = arg("sums", shape(layout, axes["g"], workload.n), "int32")
    with stage("epilogue", axes) as variables:
        axis = dict(zip(axes, variables, strict=True))
        store(out, value(**axis), at(layout, axis["g"], axis["t"], axis["nb"] * axes["ni"] + axis["ni"]))


def _epilogue_qkv(workload: Workload, _: Qkv, axes: dict[str, Expr], value: Any, layout: Layout) -> None:
    """Two blocks: `epilogue` quantises to s8 in the order of the accumulators, `scatter` stores `pack` channels at a time.

    Which of the three outputs a pack belongs to does not vary within it, because hidden is a multiple of pack.
    """
    operands, hidden, width = workload.operands, workload.n // 3, axes["ni"]
    groups, pack = axes["g"], operands.pack
    query = arg("query", [groups, hidden // pack, GROUP, pack], operands.attention)
    key = arg("key", [groups, hidden // pack, GROUP, pack], operands.key)
    values = arg("value", [groups, hidden, GROUP], operands.attention)
    small = scratch("small", list(axes.values()), operands.attention)
    with stage("epilogue", axes) as variables:
        real = value(**dict(zip(axes, variables, strict=True)))
        store(small, quantize(real, -127, 127, operands.attention), variables)

    def put(first: Expr, g: Expr, t: Expr, packed: Expr, channels: list[Expr], lanes: Expr) -> None:
        """Store the channels from `first` on: `packed` at `lanes` of their pack in q and k, `channels` one by one in v."""
        with T.If(first < hidden):
            with T.Then():
                store(query, packed, [g, first // pack, t, lanes])
            with T.Else(), T.If(first < 2 * hidden):
                with T.Then():
                    store(key, _offset(packed, operands, lanes.lanes), [g, first // pack - hidden // pack, t, lanes])
                with T.Else():
                    for index, channel in enumerate(channels):
                        last = t if layout == "rows" else tirx.Ramp(0, 1, GROUP)
                        store(values, channel, [g, first + index - 2 * hidden, last])

    whole = width % pack == 0  # else a pack spans row-blocks, and its channels are stored with a stride
    if layout == "columns":
        with stage("scatter", {"g": axes["g"], "nb": axes["nb"], "i": 1, "t": 1}) as (g, nb, i, t):
            T.reads(small[g, nb, i * width : i * width + width, t * GROUP : t * GROUP + GROUP])
            T.writes(query[g, :, :, :], key[g, :, :, :], values[g, :, :])
            for first in range(0, width, pack if whole else 1):
                n = nb * width + first
                rows = [
                    small.vload([g, nb, first + p, 0], f"{operands.attention}x{GROUP}") for p in range(pack if whole else 1)
                ]
                if whole:
                    put(n, g, 0, interleaved(rows), rows, tirx.Ramp(0, 1, GROUP * pack))
                else:
                    put(n, g, 0, rows[0], rows, tirx.Ramp(n % pack, pack, GROUP))
    else:
        with stage("scatter", {"g": axes["g"], "t": GROUP, "nb": axes["nb"], "i": 1}) as (g, t, nb, i):
            T.reads(small[g, t, nb, i * width : i * width + width])
            T.writes(query[g, :, t, :], key[g, :, t, :], values[g, :, t])
            for first in range(0, width, pack):
                packed = small.vload([g, t, nb, first], f"{operands.attention}x{pack}")
                channels = [small[g, t, nb, first + p] for p in range(pack)]
                put(nb * width + first, g, t, packed, channels, tirx.Ramp(0, 1, pack))


def _offset(packed: Expr, operands: Operands, lanes: int) -> Expr:
    """`packed` s8 as the keys' dtype: adding 128 to a byte flips its highest bit."""
    if not operands.key_offset:
        return packed
    flipped = tirx.reinterpret(f"{operands.key}x{lanes}", packed)
    return tirx.bitwise_xor(flipped, tirx.Broadcast(tirx.const(operands.key_offset, operands.key), lanes))


def _epilogue_activate(workload: Workload, epilogue: Activate, axes: dict[str, Expr], value: Any, layout: Layout) -> None:
    """A second block, `scatter`, stores `pack` channels at a time where the consumer wants them packed."""
    quant = arg("quant", [2], "float32")
    pack, stored, width = workload.operands.pack, workload.operands.activation, axes["ni"]
    out = arg("activated", shape(epilogue.consumer, axes["g"], workload.n, pack), stored)
    scatters = epilogue.consumer == "packed" and width % pack == 0
    small = scratch("small", list(axes.values()), stored) if scatters else out
    with stage("epilogue", axes) as variables:
        axis = dict(zip(axes, variables, strict=True))
        real = ACTIVATIONS[epilogue.activation](value(**axis)) * quant[0]
        n = axis["nb"] * width + axis["ni"]
        index = variables if scatters else at(epilogue.consumer, axis["g"], axis["t"], n, pack)
        store(small, quantize(real, 0, 255, stored, quant[1]), index)
    if not scatters:
        return
    if layout == "columns":
        with stage("scatter", {"g": axes["g"], "nb": axes["nb"], "i": 1, "t": 1}) as (g, nb, i, t):
            T.reads(small[g, nb, i * width : i * width + width, t * GROUP : t * GROUP + GROUP])
            T.writes(out[g, :, :, :])
            for first in range(0, width, pack):
                rows = [small.vload([g, nb, first + p, 0], f"{stored}x{GROUP}") for p in range(pack)]
                store(out, interleaved(rows), [g, (nb * width + first) // pack, 0, tirx.Ramp(0, 1, GROUP * pack)])
    else:
        with stage("scatter", {"g": axes["g"], "t": GROUP, "nb": axes["nb"], "i": 1}) as (g, t, nb, i):
            T.reads(small[g, t, nb, i * width : i * width + width])
            T.writes(out[g, :, t, :])
            for first in range(0, width, pack):
                packed = small.vload([g, t, nb, first], f"{stored}x{pack}")
                store(out, packed, [g, (nb * width + first) // pack, t, tirx.Ramp(0, 1, pack)])


def _epilogue_add_norm(workload: Workload, epilogue: AddNorm, axes: dict[str, Expr], value: Any, _: Layout) -> None:
    norm, groups, hidden = epilogue.norm, axes["g"], workload.n
    residual = arg("residual", shape(norm.residual, groups, hidden), "float32")
    args = norm_args(hidden)
    outputs = norm_outputs(groups, hidden, norm, workload.operands)
    pre = scratch("pre", shape(norm.residual, groups, hidden), "float32")
    with stage("epilogue", axes) as variables:
        axis = dict(zip(axes, variables, strict=True))
        index = at(norm.residual, axis["g"], axis["t"], axis["nb"] * axes["ni"] + axis["ni"])
        store(pre, value(**axis) + residual[tuple(index)], index)
    norm_stages(pre, groups, hidden, norm, workload.operands, args, outputs)


EPILOGUES: dict[type, Any] = {
    Raw: _epilogue_raw,
    Qkv: _epilogue_qkv,
    Activate: _epilogue_activate,
    AddNorm: _epilogue_add_norm,
}
"""Epilogue to the function that emits its stages: (workload, epilogue, axes in accumulator order, value, lanes' layout)."""
