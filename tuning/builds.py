"""Compiling candidates to libraries, in parallel processes that may be killed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm.support.popen_pool import PopenPoolExecutor

from tilewright.codegen.epilogues import Epilogue
from tilewright.codegen.layer_kernels import Context, Decisions, LayerKernel, function
from tilewright.codegen.passes import PIPELINE
from tilewright.codegen.workload import KernelSpec
from tilewright.schedules.isa import ISAS
from tilewright.schedules.single import single

SLOWEST = 120
"""Seconds after which a build is given up."""

Parameter = tuple[str, tuple[int | None, ...], str]
"""Name, shape (None: token groups) and dtype of a kernel's argument."""


@dataclass(frozen=True)
class Built:
    """A kernel as a library with one function, `main`."""

    library: Path
    parameters: tuple[Parameter, ...]


def build_kernel(spec: KernelSpec, detail: Epilogue | Context, library: str) -> tuple[Parameter, ...]:
    """Compile the kernel of `spec` to `library`; returns its arguments."""
    made = single(function(spec, detail), spec)
    alone = tvm.IRModule({"main": made.scheduled.with_attr("global_symbol", "main")})
    tvm.compile(alone, target=ISAS[spec.isa].target(), tir_pipeline=PIPELINE).export_library(library)
    return tuple(
        (name, tuple(int(size) if isinstance(size, int | tvm.tirx.IntImm) else None for size in shape), dtype)
        for name, shape, dtype in made.parameters
    )


class Builder:
    """Builds kernels, each once."""

    def __init__(self, pool: PopenPoolExecutor, directory: Path) -> None:
        self._pool, self._directory = pool, directory
        self._built: dict[tuple[KernelSpec, Epilogue | Context], Built | None] = {}

    def build(self, wanted: Sequence[tuple[LayerKernel, Decisions]]) -> list[Built | None]:
        """The libraries of candidates, each of a kernel; None of those that do not compile or take too long."""
        places = [(kernel.decided(made), kernel.detail) for kernel, made in wanted]
        waiting = {}
        for place in places:
            if place not in self._built:
                library = self._directory / f"kernel{len(self._built)}.so"
                waiting[place] = library, self._pool.submit(build_kernel, *place, str(library))
                self._built[place] = None
        for place, (library, future) in waiting.items():
            try:
                self._built[place] = Built(library, future.result())
            except Exception:  # a candidate less; it stays None, so that nobody tries again
                continue
        return [self._built[place] for place in places]


@contextmanager
def builder(processes: int | None = None) -> Iterator[Builder]:
    """A builder whose libraries are gone afterwards."""
    count = processes or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="tilewright-tune-") as scratch:
        pool = PopenPoolExecutor(max_workers=count, timeout=SLOWEST)
        try:
            yield Builder(pool, Path(scratch))
        finally:
            pool.shutdown(wait=False)
