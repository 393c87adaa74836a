"""The pass that gives sparse loops their true extent, once scheduling no longer needs them to be affine."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlockRealize

SPARSE_AXIS = "tilewright.sparse_axis"
"""Loop annotation: this loop runs over the entries of a row-block."""


def trim_sparse_axis(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Replace the extent of every loop annotated with SPARSE_AXIS by indptr[nb + 1] - indptr[nb].

    nb is what the blocks inside the loop bind to their axis `vnb`. A dense kernel has no indptr; its loops stay.
    """
    indptr = next((param for param in func.params if param.name == "indptr"), None)
    if indptr is None:
        return func

    def rewrite(loop: Any) -> Any:
        if SPARSE_AXIS not in dict(loop.annotations):
            return loop
        row_block = _binding(loop.body, "vnb")
        extent = tirx.BufferLoad(indptr, [row_block + 1]) - tirx.BufferLoad(indptr, [row_block])
        return tirx.For(loop.loop_var, loop.min, extent, loop.kind, loop.body)

    return func.with_body(tvm_ffi.structural_map(func.body, [(tirx.For, rewrite)]))


def _binding(body: Any, axis: str) -> Any:
    """The value bound to block axis `axis` (or its blockized copy) by an outermost block of `body`: maps visit those last."""
    found: list[Any] = []

    def visit(realize: Any) -> Any:
        for variable, value in zip(realize.block.iter_vars, realize.iter_values, strict=True):
            if variable.var.name.removesuffix("_o") == axis:
                found.append(value)
        return realize

    tvm_ffi.structural_map(body, [(SBlockRealize, visit)])
    return found[-1]
