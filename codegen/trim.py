"""What ends scheduling: loops get their true run-time extents, which schedule primitives could not have followed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.s_tir import SBlockRealize
from tvm.sym import Analyzer

from tilewright.codegen.workload import PARTS

SPARSE_AXIS = "tilewright.sparse_axis"
"""Loop annotation, its value R the row-blocks that are finished together: this loop runs over the entries of a row-block."""

ROW_BLOCK, OUTPUT = "vnb", "vni"
"""The axes of a kernel's blocks that number its row-blocks, or every R row-blocks, and the outputs within."""

CHUNK_AXIS = "tilewright.chunk_axis"
"""Loop annotation, its value the number of chunks: this loop runs over the row-blocks of a chunk."""


def trim(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Replace the extents of annotated loops of a sparse kernel, skip parallel loops that are empty, drop aliases.

    A loop over entries gets indptr[nb + 1] - indptr[nb], where nb is what the blocks inside bind to ROW_BLOCK, or to R times
    ROW_BLOCK plus OUTPUT. A loop over the row-blocks of chunk c of C gets those from parts[c * PARTS / C] up to the next
    chunk's first, which is equal work instead of equal numbers. A dense kernel has neither array; its loops stay.
    """
    params = {param.name: param for param in func.params}
    body = func.body
    if "indptr" in params:
        body = _map_loops(body, CHUNK_AXIS, lambda loop, chunks: _equal_work(loop, int(chunks), params["parts"]))
        body = _map_loops(body, SPARSE_AXIS, lambda loop, _: _entries(loop, params["indptr"]))
    body = tvm_ffi.structural_map(_without_aliases(body), [(tirx.For, _skip_if_empty)])
    return func.with_body(body)


def _map_loops(body: Any, annotation: str, rewrite: Callable[[Any, Any], Any]) -> Any:
    """`body` with rewrite(loop, value) for every loop that is annotated."""

    def visit(loop: Any) -> Any:
        annotations = dict(loop.annotations)
        return rewrite(loop, annotations[annotation]) if annotation in annotations else loop

    return tvm_ffi.structural_map(body, [(tirx.For, visit)])


def row_block(loop: Any) -> Any:
    """The row-block whose entries `loop` runs over, a loop annotated as SPARSE_AXIS."""
    number, rows = _binding(loop.body, ROW_BLOCK), int(dict(loop.annotations)[SPARSE_AXIS])
    return number if rows == 1 else number * rows + _binding(loop.body, OUTPUT)


def _entries(loop: Any, indptr: Any) -> Any:
    number = row_block(loop)
    extent = tirx.BufferLoad(indptr, [number + 1]) - tirx.BufferLoad(indptr, [number])
    return tirx.For(loop.loop_var, loop.min, extent, loop.kind, loop.body, annotations=loop.annotations)


def _equal_work(loop: Any, chunks: int, parts: Any) -> Any:
    """Row-blocks `chunk * extent + i` become `first + i`, with the first of the chunk's parts."""
    zero = [(tirx.Var, lambda variable: loop.min if variable.same_as(loop.loop_var) else variable)]
    start = tvm_ffi.structural_map(_binding(loop.body, ROW_BLOCK), zero)
    chunk = Analyzer().simplify(tirx.floordiv(start, loop.extent))
    bounds = [tirx.BufferLoad(parts, [tirx.floordiv((chunk + i) * PARTS, chunks)]) for i in (0, 1)]
    first, last = (tirx.Cast("int32", bound) for bound in bounds)

    def rebind(realize: Any) -> Any:
        names = [variable.var.name.removesuffix("_o") for variable in realize.block.iter_vars]
        values = [first + loop.loop_var if name == ROW_BLOCK else v for name, v in zip(names, realize.iter_values, strict=True)]
        return SBlockRealize(values, realize.predicate, realize.block)

    body = tvm_ffi.structural_map(loop.body, [(SBlockRealize, rebind)])
    return tirx.For(loop.loop_var, loop.min, last - first, loop.kind, body)


def _without_aliases(body: Any) -> Any:
    """`common.alias` undone: lowering looks a buffer up by its own name."""
    aliases: list[Any] = []

    def drop(declaration: Any) -> Any:
        aliases.append((declaration.buffer, original(declaration.data.args[0])))
        return tirx.Evaluate(0)

    def original(variable: Any) -> Any:
        return next((buffer for alias, buffer in aliases if alias.same_as(variable)), variable)

    body = tvm_ffi.structural_map(body, [(tirx.DeclBuffer, drop)])
    return tvm_ffi.structural_map(body, [(tirx.Var, original)]) if aliases else body


def _skip_if_empty(loop: Any) -> Any:
    """Often a kernel's wider nest has no whole tile, and waking threads for nothing costs more than tiny models compute."""
    if loop.kind != tirx.ForKind.PARALLEL or isinstance(loop.extent, tirx.IntImm):
        return loop
    return tirx.IfThenElse(loop.extent > 0, loop, None)


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
