"""What every kernel shares: stages, layouts, quantised stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tilewright.codegen.epilogues import Argument
from tilewright.codegen.formats import GROUP, Format, Layout
from tilewright.codegen.kernels.math import round_to_int
from tilewright.codegen.workload import ATTRIBUTE, KernelSpec

Expr = Any  # tirx.PrimExpr; TVM ships no type information


def at(layout: Layout, group: Expr, token: Expr, channel: Expr, pack: int = 1) -> list[Expr]:
    """Indices of one element of an activation (see `Layout`; `pack` is that of the packed one)."""
    if layout == "packed":
        return [group, channel // pack, token, channel % pack]
    return [group, token, channel] if layout == "rows" else [group, channel, token]


def activation_at(stored: Format, groups: Expr, group: Expr, token: Expr, channel: Expr) -> list[Expr]:
    """Indices of one element of an activation of `groups` groups in format `stored`.

    Where groups stand together only the place counted from the tile's start is meaningful: the last index runs past its axis.
    """
    if stored.together == 1:
        return at(stored.layout, group, token, channel, stored.pack)
    size, inner = tirx.const(1, "int32"), tirx.const(0, "int32")
    for tile in reversed(stored.tiles[:-1]):
        whole = group < groups // tile * tile
        size, inner = tirx.Select(whole, tile, size), tirx.Select(whole, group % tile, inner)
    return [group - inner, 0, (channel * size + inner) * GROUP + token]


def prim_func(spec: KernelSpec, body: Callable[[], None]) -> tvm.tirx.PrimFunc:
    """Run `body` inside a new PrimFunc tagged with `spec`; `body` declares arguments with `arg`."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(spec.op)
        T.func_attr({"tirx.noalias": True, ATTRIBUTE: spec.key()})
        body()
    return builder.get()


def arg(name: str, shape: Sequence[Expr], dtype: str) -> Any:
    """Declare the next argument of the current PrimFunc: a buffer of `shape` and `dtype`."""
    return T.arg(name, T.Buffer(tuple(shape), dtype))


def declare(arguments: Sequence[Argument]) -> tuple[Any, ...]:
    """Declare several arguments, in order."""
    return tuple(arg(*argument) for argument in arguments)


def scratch(name: str, shape: Sequence[Expr], dtype: str) -> Any:
    """Allocate a buffer in the current block."""
    buffer = T.sblock_alloc_buffer(tuple(shape), dtype)
    IRBuilder.name(name, buffer)
    return buffer


def alias(buffer: Any) -> Any:
    """Another buffer on the memory of `buffer`: to schedules, a buffer has one writer, which writes all that is read."""
    other = T.decl_buffer(buffer.shape, buffer.dtype, data=buffer.data)
    IRBuilder.name(f"{buffer.name}_alias", other)
    return other


@contextmanager
def stage(name: str, spatial: dict[str, Expr], reduced: dict[str, Expr] | None = None) -> Iterator[list[Expr]]:
    """A loop nest around one block `name`; yields the block's axes, spatial ones first, named after the keys."""
    extents = {**spatial, **(reduced or {})}
    with T.grid(*extents.values()) as loops:
        variables = list(loops) if len(extents) > 1 else [loops if isinstance(loops, tirx.Var) else loops[0]]
        for key, loop in zip(extents, variables, strict=True):
            IRBuilder.name(key, loop)
        with T.sblock(name):
            axes = []
            for index, ((key, extent), loop) in enumerate(zip(extents.items(), variables, strict=True)):
                kind = T.axis.spatial if index < len(spatial) else T.axis.reduce
                axes.append(kind(extent, loop))
                IRBuilder.name(f"v{key}", axes[-1])
            yield axes


def store(buffer: Any, value: Expr, indices: list[Expr]) -> None:
    """buffer[indices] = value."""
    T.buffer_store(buffer, value, indices)


def quantize(value: Expr, low: int, high: int, dtype: str, zero_point: Expr | None = None, offset: int = 0) -> Expr:
    """clip(rne(value) + zero_point, low, high) + offset as `dtype`; value is already divided by the scale.

    zero_point is a whole number in float32. The value is clipped first, to bounds that are whole too, so that it can be rounded
    by `round_to_int`; clipping and rounding to such bounds commute.
    """
    zero_point = T.float32(0.0) if zero_point is None else zero_point
    clipped = T.min(T.max(value, T.float32(low) - zero_point), T.float32(high) - zero_point)
    return T.cast(round_to_int(clipped) + T.cast(zero_point, "int32") + offset, dtype)


def interleaved(rows: list[Expr]) -> Expr:
    """Vectors of a group's tokens, one for each channel, as one vector in which the channels of a token are adjacent."""
    return tirx.Shuffle(rows, [GROUP * row + token for token in range(GROUP) for row in range(len(rows))])


__all__ = [
    "GROUP",
    "Expr",
    "activation_at",
    "alias",
    "arg",
    "at",
    "declare",
    "interleaved",
    "prim_func",
    "quantize",
    "scratch",
    "stage",
    "store",
]
