"""Heads: from the last hidden state, f32[G, 16, H], to the model's outputs. All float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import tirx
from tvm.script import tirx as TS
from tvm.tirx.script import builder as T

from tilewright.codegen.kernels.common import GROUP, Expr, arg, prim_func, scratch, stage, store
from tilewright.codegen.kernels.math import ACTIVATIONS
from tilewright.codegen.model import Pooling
from tilewright.codegen.workload import ATTRIBUTE, KernelSpec

VECTOR = 16
"""Outputs are padded to a multiple of this in the packed weight, so that every vector is whole."""

LEAST_NORM = 1e-12
"""What a smaller L2 norm counts as when an embedding is normalised (`eps` of torch.nn.functional.normalize)."""


def padded_width(width: int) -> int:
    """`width` rounded up to whole vectors."""
    return -(-width // VECTOR) * VECTOR


def _dense(name: str, rows: dict[str, Expr], inputs: int, width: int, x: Callable[..., Expr]) -> Any:
    """Block `name`: x(rows, k) @ weight + nothing, f32[rows, blocks, 16]; declares the argument weight f32[K, blocks, 16]."""
    blocks = padded_width(width) // VECTOR
    weight = arg(f"{name}_weight", [inputs, blocks, VECTOR], "float32")
    sums = scratch(f"{name}_sums", [*rows.values(), blocks, VECTOR], "float32")
    with stage(name, {**rows, "no": blocks, "ni": VECTOR}, {"k": inputs}) as (*axes, k):
        *row, no, ni = axes
        with T.init():
            store(sums, T.float32(0.0), axes)
        store(sums, sums[tuple(axes)] + x(*row, k) * weight[k, no, ni], axes)
    return sums


def token_head(spec: KernelSpec, split: bool) -> tvm.tirx.PrimFunc:
    """logits f32[G, 16, n] = stream f32[G, 16, k] @ weight f32[k, padded n] + bias f32[n].

    split: one output [G, 16, 1] per column instead of one of all columns.
    """
    width, hidden = spec.n, spec.k

    def body() -> None:
        groups = tirx.Var("G", "int32")
        stream = arg("stream", [groups, GROUP, hidden], "float32")
        sums = _dense("project", {"g": groups, "t": GROUP}, hidden, width, lambda g, t, k: stream[g, t, k])
        bias = arg("bias", [width], "float32")
        columns = [(column, 1) for column in range(width)] if split else [(0, width)]
        for first, count in columns:
            out = arg(f"out{first}", [groups, GROUP, count], "float32")
            with stage(f"output{first}", {"g": groups, "t": GROUP, "n": count}) as (g, t, n):
                column = n + first
                store(out, sums[g, t, column // VECTOR, column % VECTOR] + bias[column], [g, t, n])

    return prim_func(spec, body)


def sequence_head(spec: KernelSpec, pre_activation: str | None) -> tvm.tirx.PrimFunc:
    """logits f32[B, n] from the first token of each sequence.

    Arguments: stream f32[G, 16, k], offsets i32[B + 1]; with `pre_activation`, weight f32[k, padded k] and bias f32[k] of the
    layer before; weight f32[k, padded n], bias f32[n]; logits.
    """
    width, hidden = spec.n, spec.k

    def body() -> None:
        groups, ends = tirx.Var("G", "int32"), tirx.Var("ends", "int32")
        stream = arg("stream", [groups, GROUP, hidden], "float32")
        offsets = arg("offsets", [ends], "int32")
        batch = {"b": ends - 1}

        def first(b: Expr, k: Expr) -> Expr:
            return stream[offsets[b] // GROUP, offsets[b] % GROUP, k]

        x = first
        if pre_activation is not None:
            sums = _dense("pre", batch, hidden, hidden, first)
            pre_bias = arg("pre_bias", [hidden], "float32")
            activated = scratch("activated", [ends - 1, hidden], "float32")
            with stage("activate", {**batch, "c": hidden}) as (b, c):
                value = sums[b, c // VECTOR, c % VECTOR] + pre_bias[c]
                store(activated, ACTIVATIONS[pre_activation](value), [b, c])

            def x(b: Expr, k: Expr) -> Expr:
                return activated[b, k]

        sums = _dense("project", batch, hidden, width, x)
        bias = arg("bias", [width], "float32")
        out = arg("logits", [ends - 1, width], "float32")
        with stage("output0", {**batch, "n": width}) as (b, n):
            store(out, sums[b, n // VECTOR, n % VECTOR] + bias[n], [b, n])

    return prim_func(spec, body)


def pool(spec: KernelSpec, pooling: Pooling, normalize: bool) -> tvm.tirx.PrimFunc:
    """embedding f32[B, k] of each sequence of stream f32[G, 16, k], offsets i32[B + 1], as `Head` says."""
    hidden, mean, largest = spec.k, pooling == "mean", pooling == "max"

    # an `if` on a Python value is decided when the kernel is made
    @TS.prim_func(s_tir=True)
    def pool(stream_: TS.handle, offsets_: TS.handle, embedding_: TS.handle):
        TS.func_attr({"tirx.noalias": True, ATTRIBUTE: spec.key()})
        groups = TS.int32()
        ends = TS.int32()
        stream = TS.match_buffer(stream_, (groups, GROUP, hidden), "float32")
        offsets = TS.match_buffer(offsets_, (ends,), "int32")
        embedding = TS.match_buffer(embedding_, (ends - 1, hidden), "float32")
        for b in TS.serial(ends - 1):
            with TS.sblock("pool"):
                vb = TS.axis.spatial(ends - 1, b)
                TS.reads(stream[:, :, :], offsets[:])
                TS.writes(embedding[vb, 0:hidden])
                for c in TS.serial(hidden):
                    embedding[vb, c] = stream[offsets[vb] // GROUP, offsets[vb] % GROUP, c]
                if mean or largest:
                    for token in TS.serial(offsets[vb + 1] - offsets[vb] - 1):
                        for c in TS.serial(hidden):
                            value = stream[(offsets[vb] + token + 1) // GROUP, (offsets[vb] + token + 1) % GROUP, c]
                            if mean:
                                embedding[vb, c] = embedding[vb, c] + value
                            if largest:
                                embedding[vb, c] = TS.max(embedding[vb, c], value)
                if mean:
                    for c in TS.serial(hidden):
                        embedding[vb, c] = embedding[vb, c] / TS.cast(offsets[vb + 1] - offsets[vb], "float32")
                if normalize:
                    square = TS.sblock_alloc_buffer((1,), "float32")
                    square[0] = TS.float32(0.0)
                    for c in TS.serial(hidden):
                        square[0] = square[0] + embedding[vb, c] * embedding[vb, c]
                    for c in TS.serial(hidden):
                        embedding[vb, c] = embedding[vb, c] / TS.max(TS.sqrt(square[0]), TS.float32(LEAST_NORM))

    return pool
