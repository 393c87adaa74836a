"""Weights on their way to the cache before a kernel needs them.

A model's weights do not fit the caches that a core has alone, so that every call finds them in a cache that is shared, or in
memory, and a kernel of few tokens waits for each line of them: CPUs foresee the streams of a sparse matrix badly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm_ffi
from tvm import DataType, tirx

from tilewright.codegen.trim import row_block

FETCH_AHEAD = "tilewright.fetch_ahead"
"""Loop annotation, its value a number of bytes: this loop over the entries of a row-block fetches those so far ahead of it."""

LINE = 64
"""Bytes of a cache line."""


def fetch_ahead(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Let each iteration of annotated loops of a trimmed kernel prefetch the lines of an entry further on.

    It lies so many bytes of weights ahead, in the next row-blocks at the end of one; past the last of all nothing is read,
    because a prefetch of an address that does not exist does nothing.
    """
    params = {param.name: param for param in func.params}

    def visit(loop: Any) -> Any:
        annotations = dict(loop.annotations)
        if FETCH_AHEAD not in annotations:
            return loop
        entry = _entry(loop, params)
        ahead = -(-int(annotations[FETCH_AHEAD]) // _size(params["weight"], len(entry)))
        fetches = [
            fetch
            for name in ("weight", "index")
            if name in params
            for fetch in _lines(params[name], [*entry[:-1], entry[-1] + ahead])
        ]
        body = tirx.SeqStmt([*fetches, loop.body])
        return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, annotations=loop.annotations)

    return func.with_body(tvm_ffi.structural_map(func.body, [(tirx.For, visit)]))


def _entry(loop: Any, params: Mapping[str, Any]) -> list[Any]:
    """The first indices of the entry that an iteration reads: of a dense matrix its row-block and its place there."""
    place = tirx.Cast("int64", loop.loop_var)
    if "indptr" not in params:
        return [tirx.Cast("int64", row_block(loop)), place]
    return [tirx.Cast("int64", tirx.BufferLoad(params["indptr"], [row_block(loop)])) + place]


def _size(buffer: Any, outer: int) -> int:
    """Bytes of an element of the first `outer` axes."""
    elements = 1
    for extent in buffer.shape[outer:]:
        elements *= int(extent)
    return elements * int(DataType(buffer.dtype).bits) // 8


def _lines(buffer: Any, entry: list[Any]) -> list[Any]:
    """A prefetch for each line of an entry, to all caches."""
    width = int(DataType(buffer.dtype).bits) // 8
    inner = len(buffer.shape) - len(entry)
    how = [tirx.const(value, "int32") for value in (0, 3, 1)]  # to be read, and kept, by the data caches
    found = []
    for first in range(0, _size(buffer, len(entry)), LINE):
        rest = [tirx.const(0, "int64")] * (inner - 1) + [tirx.const(first // width, "int64")] if inner else []
        address = tirx.address_of(tirx.BufferLoad(buffer, [*entry, *rest]))
        found.append(tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", address, *how)))
    return found
