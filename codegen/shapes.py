"""Functions that compute shapes, made the same in every run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tvm
from tvm import tirx


def order_shapes(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """A function that computes shapes, with its stores in the order of their places.

    VMShapeLower emits them in the order of a hash table of addresses, which differs from run to run; the library would, too.
    """
    body = func.body
    if not isinstance(body, tirx.SeqStmt) or not all(isinstance(part, tirx.BufferStore) for part in body.seq):
        return func
    read = {place for store in body.seq for place in _reads(store.value)}
    places = [int(store.indices[0]) for store in body.seq]
    if read & set(places):
        return func  # an order that matters is not one of chance
    ordered = sorted(body.seq, key=lambda store: int(store.indices[0]))
    return func.with_body(tirx.SeqStmt(ordered))


def _reads(value: Any) -> Iterator[int]:
    """Places that the expression `value` reads, of the arithmetic that shapes are made of."""
    if hasattr(value, "indices"):  # a load, whose class differs between versions of TVM
        yield int(value.indices[0])
    for part in (getattr(value, name, None) for name in ("a", "b", "value")):
        if isinstance(part, tvm.ir.Expr):
            yield from _reads(part)
