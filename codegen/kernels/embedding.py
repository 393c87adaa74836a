"""Embedding lookup, sum and LayerNorm."""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.tirx.script import builder as T

from tilewright.codegen.epilogues import Norm
from tilewright.codegen.formats import Format
from tilewright.codegen.kernels.common import GROUP, Expr, arg, declare, prim_func, scratch, stage, store
from tilewright.codegen.kernels.interleave import transposed
from tilewright.codegen.kernels.norm import norm_stages
from tilewright.codegen.workload import KernelSpec


def embedding(spec: KernelSpec, norm: Norm, positions: int, token_types: int, coded: bool = False) -> tvm.tirx.PrimFunc:
    """The embedding kernel for a vocabulary of `n` words and `k` channels.

    Arguments: input_ids, position_ids and (if token_types > 0) token_type_ids i32[G, 16], the tables word f32[V, H],
    position f32[P, H] and token_type f32[T, H], then gamma, beta, quant and the outputs of `norm_stages`.
    coded: word is u8 and followed by its grid, f32[2], as in `coding.CodedTable`.
    """
    vocabulary, hidden = spec.n, spec.k

    def body() -> None:
        groups = tirx.Var("G", "int32")
        names = ["word", "position"] + (["token_type"] if token_types else [])
        ids = [arg(f"{name}_ids", [groups, GROUP], "int32") for name in names]
        sizes = {"position": positions, "token_type": token_types}
        word = arg("word", [vocabulary, hidden], "uint8" if coded else "float32")
        grid = arg("grid", [2], "float32") if coded else None
        tables = [arg(name, [sizes[name], hidden], "float32") for name in names[1:]]
        args, outputs = declare(norm.inputs(hidden)), declare(norm.outputs(groups, hidden))
        pre = scratch("pre", Format(norm.residual, "float32").shape(groups, hidden), "float32")
        # squares of GROUP tokens by GROUP channels: tables hold a token's channels together, the stream may hold tokens so;
        # the unit axis carries the written region, which compute_at has to find in terms of axes
        with stage("embed", {"g": groups, "c": hidden // GROUP, "t": 1}) as (g, c, unit):
            channels, group = (slice(axis * GROUP, axis * GROUP + GROUP) for axis in (c, unit))
            sources = [word, *tables, *([grid] if grid is not None else [])]
            T.reads(
                *(index[g, 0:GROUP] for index in ids), *(table[tuple(slice(0, n) for n in table.shape)] for table in sources)
            )
            T.writes(pre[(g, group, channels) if norm.residual == "rows" else (g, channels, group)])
            tokens = []
            for t in range(GROUP):
                total: Expr = word.vload([ids[0][g, t], c * GROUP], f"{word.dtype}x{GROUP}")
                if grid is not None:
                    total = (tirx.Cast(f"float32x{GROUP}", total) - tirx.Broadcast(grid[1], GROUP)) * tirx.Broadcast(
                        grid[0], GROUP
                    )
                for table, index in zip(tables, ids[1:], strict=True):
                    total = total + table.vload([index[g, t], c * GROUP], f"float32x{GROUP}")
                tokens.append(total)
            lines = tokens if norm.residual == "rows" else transposed(tokens)
            for i, line in enumerate(lines):
                place = [g, i, c * GROUP] if norm.residual == "rows" else [g, c * GROUP + i, 0]
                store(pre, line, [*place[:-1], tirx.Ramp(place[-1], 1, GROUP)])
        norm_stages(pre, groups, hidden, norm, args, outputs)

    return prim_func(spec, body)
