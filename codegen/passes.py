"""The passes from unscheduled kernels to what LLVM gets, in order: KERNELS once scheduled, then PROGRAM, then LOWERING.

Scheduling itself (`schedules/apply.py`) is the pass before the first. `tvm.transform` runs the lists; `dump` writes the module
after each pass to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, s_tir, tirx
from tvm.ir.instrument import pass_instrument
from tvm.tirx import register_tir_pipeline

from tilewright.codegen.lowering import small_buffers_on_stack
from tilewright.codegen.prefetch import fetch_ahead
from tilewright.codegen.stealing import steal_tasks
from tilewright.codegen.tiles import configure_tiles
from tilewright.codegen.trim import trim

PIPELINE = "tilewright"
"""The name that `tvm.compile` takes for LOWERING."""


def _each_kernel(rewrite: Callable[[tirx.PrimFunc], tirx.PrimFunc]) -> Any:
    """A pass that rewrites every PrimFunc."""
    return tirx.transform.prim_func_pass(
        lambda func, _module, _context: rewrite(func), opt_level=0, name=f"tilewright.{rewrite.__name__}"
    )


KERNELS: tuple[Any, ...] = (
    _each_kernel(trim),  # loops get their run-time extents
    _each_kernel(fetch_ahead),  # weights are prefetched
    _each_kernel(configure_tiles),  # tasks that multiply AMX tiles configure them
    _each_kernel(steal_tasks),  # threads share the tasks of parallel loops by what they get done
)
"""What ends scheduling."""

PROGRAM: tuple[Any, ...] = (
    relax.transform.ToNonDataflow(),
    relax.transform.RemovePurityChecking(),
    relax.transform.CallTIRRewrite(),
    relax.transform.CanonicalizeBindings(),
    relax.transform.StaticPlanBlockMemory(),
)
"""The main function to allocations and calls of kernels, from which `codegen/flatten.py` makes the program that is run."""

LOWERING: tuple[Any, ...] = (
    s_tir.transform.CanonicalizeLoop(),
    s_tir.transform.LowerInitBlock(),
    s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
    s_tir.transform.ConvertBlocksToOpaque(),
    s_tir.transform.CompactBufferAllocation(),
    s_tir.transform.LowerMatchBuffer(),
    s_tir.transform.StmtSimplify(),
    s_tir.transform.LowerOpaqueBlock(),
    tirx.transform.FlattenBuffer(),
    tirx.transform.NarrowDataType(32),
    s_tir.transform.LoopPartition(),
    tirx.transform.VectorizeLoop(True),
    tirx.transform.StorageRewrite(),
    s_tir.transform.HoistIfThenElse(),
    tirx.transform.UnrollLoop(),
    s_tir.transform.RenormalizeSplitPattern(),
    tirx.transform.StmtSimplify(),
    tirx.transform.RemoveNoOp(),
    s_tir.transform.RewriteUnsafeSelect(),
    tirx.transform.CommonSubexprElim(),
    tirx.transform.VerifyMemory(),
    tirx.transform.AnnotateEntryFunc(),
    tirx.transform.SplitHostDevice(),
    tirx.transform.MakePackedAPI(),
    _each_kernel(small_buffers_on_stack),
)
"""Scheduled kernels to packed functions: TVM's default less what is for GPUs and for floats of fewer bits."""

FINAL: tuple[Any, ...] = (tirx.transform.LowerTVMBuiltin(), tirx.transform.LowerIntrin())
"""What is left before LLVM."""

register_tir_pipeline(
    PIPELINE,
    lambda: (
        tvm.transform.Sequential(list(LOWERING)),
        lambda: tvm.transform.Sequential(list(FINAL)),
        lambda: tvm.transform.Sequential([]),  # of other devices, which there are none of
    ),
)


@pass_instrument
class _Dump:
    """Writes the module before the first pass and after each as NNN_PASS.py, numbered in the order in which they ran."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.count = directory, 0

    def run_before_pass(self, module: tvm.IRModule, info: Any) -> None:
        if self.count == 0:
            self._write(module, "scheduled")

    def run_after_pass(self, module: tvm.IRModule, info: Any) -> None:
        self._write(module, str(info.name).replace("/", "_"))

    def _write(self, module: tvm.IRModule, name: str) -> None:
        (self.directory / f"{self.count:03d}_{name}.py").write_text(module.script(show_meta=False), "utf-8")
        self.count += 1


@contextmanager
def dump(directory: Path | None) -> Iterator[None]:
    """Inside, the module is written to `directory` (made if need be) after each pass; not at all if it is None."""
    if directory is None:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with tvm.transform.PassContext(instruments=[_Dump(directory)]):
        yield
