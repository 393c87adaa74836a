"""One kernel of several that were scheduled apart: the number of tokens of a call decides which of them runs.

They take the same arguments, packed weights included, so that what is best for few tokens costs code but no memory. Until they
are scheduled, those for fewer tokens travel as an attribute of the one for any number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx

from tilewright.codegen.decisions import TokenBucket
from tilewright.codegen.workload import KernelSpec
from tilewright.errors import ScheduleMismatch

BUCKETS = "tilewright.buckets"
"""PrimFunc attribute: the kernels of the spec's buckets, in their order."""


def in_buckets(spec: KernelSpec, make: Callable[[KernelSpec], tirx.PrimFunc]) -> tirx.PrimFunc:
    """The kernel that `make` makes of `spec`, carrying those of its buckets.

    Raises ScheduleMismatch unless buckets ascend and all decisions read the same weights and activations.
    """
    limits = [bucket.groups for bucket in spec.buckets]
    if limits != sorted(set(limits)) or min(limits, default=1) < 1:
        raise ScheduleMismatch(f"token buckets of {limits} groups; they must be positive and ascend")
    for bucket in spec.buckets:
        if bucket.decisions.packing != spec.linear.packing:
            raise ScheduleMismatch(
                f"{spec.op} {spec.n}x{spec.k}: the decisions for up to {bucket.groups} token groups pack weights otherwise "
                "than those for more; choose some of equal `packing`"
            )
    func = make(spec)
    if not spec.buckets:
        return func
    return func.with_attr(BUCKETS, [make(spec.of(bucket)) for bucket in spec.buckets])


def carried(func: tirx.PrimFunc) -> Sequence[tirx.PrimFunc]:
    """The kernels of the buckets that `func` carries."""
    return tuple(func.attrs[BUCKETS]) if func.attrs and BUCKETS in func.attrs else ()


def dispatch(func: tirx.PrimFunc, buckets: Sequence[TokenBucket], kernels: Sequence[tirx.PrimFunc]) -> tirx.PrimFunc:
    """`func`, but for calls of few enough token groups the kernel of the first bucket that holds them."""
    body, groups = func.body, func.params[0].shape[0]
    for bucket, kernel in reversed(list(zip(buckets, kernels, strict=True))):
        body = tirx.IfThenElse(groups <= bucket.groups, _with_arguments_of(func, kernel), body)
    return func.without_attr(BUCKETS).with_body(body) if buckets else func


def _with_arguments_of(func: tirx.PrimFunc, kernel: tirx.PrimFunc) -> Any:
    """The body of `kernel` with the arguments of `func`, and their symbolic extents, in place of its own."""
    pairs: list[tuple[Any, Any]] = []
    for own, other in zip(kernel.params, func.params, strict=True):
        extents = zip(own.shape, other.shape, strict=True)
        pairs += [(own, other), *((a, b) for a, b in extents if isinstance(a, tirx.Var))]

    def replaced(variable: Any) -> Any:
        return next((other for own, other in pairs if variable.same_as(own)), variable)

    return tvm_ffi.structural_map(kernel.body, [(tirx.Var, replaced)])
