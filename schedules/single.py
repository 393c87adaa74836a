"""One kernel on its own, as tests, benchmarks and tuners build it: its spec, and the compiled function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import tvm

from tilewright.codegen.decisions import Storage
from tilewright.codegen.epilogues import Epilogue
from tilewright.codegen.kernels.linear import linear
from tilewright.codegen.passes import PIPELINE
from tilewright.codegen.workload import KernelSpec
from tilewright.schedules.apply import schedule
from tilewright.schedules.decide import decide_linear
from tilewright.schedules.isa import ISAS, Isa


def linear_spec(
    isa: Isa, storage: Storage, n: int, k: int, epilogue: Epilogue, density: int = 100, **decided: Any
) -> KernelSpec:
    """The spec of a linear kernel with the default decisions, of which `decided` replaces some.

    density: percent of non-zero blocks, as in `density_bucket`.
    """
    decisions = replace(decide_linear(storage, n, k, density, isa), **decided)
    return KernelSpec("linear", n, k, isa.name, epilogue.label, decisions, epilogue.residual)


@dataclass(frozen=True)
class Single:
    """A kernel scheduled by the decisions of its spec and compiled for its level.

    module: holds one function, `main`. parameters: (name, shape, dtype) of its arguments, in order.
    """

    spec: KernelSpec
    scheduled: tvm.tirx.PrimFunc

    @cached_property
    def module(self) -> Any:
        """The compiled code, made on first use."""
        alone = tvm.IRModule({"main": self.scheduled.with_attr("global_symbol", "main")})
        return tvm.compile(alone, target=ISAS[self.spec.isa].target(), tir_pipeline=PIPELINE).mod

    @property
    def parameters(self) -> tuple[tuple[str, tuple[Any, ...], str], ...]:
        """Those of the function."""
        return tuple((param.name, tuple(param.shape), str(param.dtype)) for param in self.scheduled.params)

    @property
    def assembly(self) -> str:
        """What LLVM generated."""
        return str(self.module.inspect_source("asm"))


def single(func: tvm.tirx.PrimFunc, spec: KernelSpec) -> Single:
    """The kernel `func` of `spec`; raises ScheduleMismatch if the decisions do not fit it."""
    return Single(spec, schedule(func, spec))


def single_linear(spec: KernelSpec, epilogue: Epilogue) -> Single:
    """The linear kernel of `spec`, as `single`."""
    return single(linear(spec, epilogue), spec)
