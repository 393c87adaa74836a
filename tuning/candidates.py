"""The decisions that a kernel of a model may be given: the space of its workload, less what its own weights rule out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tilewright.codegen.decisions import LinearDecisions, Storage
from tilewright.codegen.layer_kernels import Decisions, LayerKernel
from tilewright.codegen.workload import Workload
from tilewright.schedules.choice import admits
from tilewright.schedules.isa import ISAS
from tilewright.schedules.space import attention_candidates, storages
from tilewright.schedules.space import candidates as linear_candidates


def space(task: Workload, allowed: Callable[[Storage], bool] = lambda storage: True) -> tuple[Decisions, ...]:
    """All decisions that are legal for a workload, whatever its weights; of a linear, with the storages that are `allowed`."""
    if task.op == "attention":
        return attention_candidates(task)
    ways = storages(task.n, task.k, task.block, ISAS[task.isa])
    return tuple(made for way in ways if allowed(way) for made in linear_candidates(task, way))


def candidates(kernel: LayerKernel) -> tuple[Decisions, ...]:
    """All legal decisions of a kernel, those of its own spec first."""
    default, isa = kernel.spec.decisions, ISAS[kernel.spec.isa]
    assert default is not None
    weight = kernel.weight if kernel.parts else None
    found = space(kernel.workload, lambda storage: weight is None or admits(storage, isa, weight))
    return tuple(dict.fromkeys((default, *found)))


def packing(made: Decisions) -> Any:
    """What decisions of several buckets must agree in, because they read the same packed weights."""
    return made.packing if isinstance(made, LinearDecisions) else None
