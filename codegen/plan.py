"""`Plan`: what the schedules decided about a model before any kernel exists. Lowering follows it."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.codegen.workload import FAMILY_LAYOUT, Family, Layout, Operands


@dataclass(frozen=True)
class LinearPlan:
    """How one linear kernel is built: its family and the block its weights are stored in (None: dense).

    reason: why a block that was found is not used as it is; empty when it is.
    """

    family: Family
    block: tuple[int, int] | None
    reason: str = ""

    @property
    def layout(self) -> Layout:
        """The layout in which the kernel reads its activations."""
        return FAMILY_LAYOUT[self.family]


@dataclass(frozen=True)
class LayerPlan:
    """The four linear kernels of an encoder layer."""

    qkv: LinearPlan
    output: LinearPlan
    up: LinearPlan
    down: LinearPlan

    def linears(self) -> tuple[LinearPlan, ...]:
        """All four, in processing order."""
        return self.qkv, self.output, self.up, self.down


@dataclass(frozen=True)
class Plan:
    """The plan of a whole model for one ISA level. `residual` is the layout of the float32 stream."""

    isa: str
    operands: Operands
    layers: tuple[LayerPlan, ...]
    residual: Layout
