"""Whether a record still holds: its kernels are those that were measured, and are as fast."""

from __future__ import annotations

from tilewright.codegen.layer_kernels import Decisions
from tilewright.tuning.rebuilt import rebuilt
from tilewright.tuning.records import Record
from tilewright.tuning.replay import Stale, check


def still_valid(record: Record) -> Decisions | Stale:
    """The decisions of `record`, or why a compile would skip it."""
    kernel = rebuilt(record)
    return kernel if isinstance(kernel, Stale) else check(record, kernel)
