"""`Plan`: what the schedules decided about a model before any kernel exists. Packing, lowering and scheduling follow it."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.codegen.decisions import AttentionDecisions, Block, LinearDecisions, TokenBucket
from tilewright.codegen.formats import Format, Layout

RUN_TOKENS = 256
"""So many tokens' activations stay in a core's L2 cache."""


@dataclass(frozen=True)
class LinearPlan:
    """How one linear kernel is built, and what that was decided on.

    found: the block found in the matrix, None if dense; density: percent of its non-zero blocks (`density_bucket`).
    reason: why a block that was found is not used as it is; empty when it is. buckets: as in `KernelSpec`.
    """

    decisions: LinearDecisions
    found: Block | None = None
    density: int = 100
    reason: str = ""
    buckets: tuple[TokenBucket, ...] = ()

    @property
    def input(self) -> Format:
        """The format in which the kernel reads its activations."""
        return self.decisions.input


@dataclass(frozen=True)
class LayerPlan:
    """The kernels of an encoder layer."""

    qkv: LinearPlan
    attention: AttentionDecisions
    output: LinearPlan
    up: LinearPlan
    down: LinearPlan

    def linears(self) -> tuple[LinearPlan, ...]:
        """All four linears, in processing order."""
        return self.qkv, self.output, self.up, self.down


@dataclass(frozen=True)
class Plan:
    """The plan of a whole model for one ISA level.

    residual: layout of the float32 stream. run_tokens: tokens that one run takes for each thread, if it has more than one
    sequence.
    """

    isa: str
    layers: tuple[LayerPlan, ...]
    residual: Layout
    run_tokens: int = RUN_TOKENS
