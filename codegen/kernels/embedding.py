"""Embedding lookup, sum and LayerNorm."""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.tirx.script import builder as T

from tilewright.codegen.kernels.common import GROUP, Expr, alias, arg, at, prim_func, stage, store
from tilewright.codegen.kernels.norm import Norm, before_norm, norm_args, norm_outputs, norm_stages
from tilewright.codegen.workload import Workload


def embedding(workload: Workload, norm: Norm, positions: int, token_types: int, coded: bool = False) -> tvm.tirx.PrimFunc:
    """The embedding kernel for a vocabulary of `n` words and `k` channels.

    Arguments: input_ids, position_ids and (if token_types > 0) token_type_ids i32[G, 16], the tables word f32[V, H],
    position f32[P, H] and token_type f32[T, H], then gamma, beta, quant and the outputs of `norm_stages`.
    coded: word is u8 and followed by its grid, f32[2], as in `coding.CodedTable`.
    """
    vocabulary, hidden = workload.n, workload.k

    def body() -> None:
        groups = tirx.Var("G", "int32")
        names = ["word", "position"] + (["token_type"] if token_types else [])
        ids = [arg(f"{name}_ids", [groups, GROUP], "int32") for name in names]
        sizes = {"position": positions, "token_type": token_types}
        word = arg("word", [vocabulary, hidden], "uint8" if coded else "float32")
        grid = arg("grid", [2], "float32") if coded else None
        tables = [arg(name, [sizes[name], hidden], "float32") for name in names[1:]]
        args = norm_args(hidden)
        outputs = norm_outputs(groups, hidden, norm, workload.operands)
        pre = before_norm(groups, hidden, norm, outputs)
        with stage("embed", {"g": groups, "t": GROUP, "c": hidden}) as (g, t, c):
            total: Expr = word[ids[0][g, t], c]
            if grid is not None:
                total = (T.cast(total, "float32") - grid[1]) * grid[0]
            for table, index in zip(tables, ids[1:], strict=True):
                total = total + table[index[g, t], c]
            store(pre, total, at(norm.residual, g, t, c))
        norm_stages(alias(pre), groups, hidden, norm, workload.operands, args, outputs)

    return prim_func(workload, body)
