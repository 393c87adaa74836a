"""What schedules make of a few kernels, as text beside this file: a change of it is a decision, not an accident.

python -m tests.goldens        # renews the texts; look at `git diff` before committing
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tvm

from tilewright.codegen.decisions import Storage
from tilewright.codegen.epilogues import Activate, AddNorm, Epilogue, Norm, Raw
from tilewright.codegen.kernels.linear import linear
from tilewright.schedules.apply import schedule
from tilewright.schedules.decide import decide_linear
from tilewright.schedules.isa import ISAS
from tilewright.schedules.single import linear_spec

N, K = 96, 192


def _linear(isa: str, storage: Storage, epilogue: Callable[[Storage, str], Epilogue]) -> tvm.tirx.PrimFunc:
    made = epilogue(storage, isa)
    spec = linear_spec(ISAS[isa], storage, N, K, made, density=20 if storage.block else 100)
    return schedule(linear(spec, made), spec)


def _raw(storage: Storage, isa: str) -> Epilogue:
    return Raw()


def _relu(storage: Storage, isa: str) -> Epilogue:
    return Activate("relu", decide_linear(storage, N, N, 100, ISAS[isa]).input)


def _add_norm(storage: Storage, isa: str) -> Epilogue:
    return AddNorm(Norm(1e-12, storage.lanes, storage.lanes, decide_linear(storage, N, N, 100, ISAS[isa]).input))


GATHER, COLUMN, DENSE = Storage("gather", (4, 1)), Storage("column", (4, 4)), Storage("row", None)

KERNELS: dict[str, Callable[[], tvm.tirx.PrimFunc]] = {
    "gather_4x1_raw.avx512vnni": lambda: _linear("avx512vnni", GATHER, _raw),
    "gather_4x1_relu.avx2": lambda: _linear("avx2", GATHER, _relu),
    "column_4x4_add_norm.avx2": lambda: _linear("avx2", COLUMN, _add_norm),
    "row_dense_relu.avx512vnni": lambda: _linear("avx512vnni", DENSE, _relu),
    "row_dense_raw.amx": lambda: _linear("amx", DENSE, _raw),
}


def path(name: str) -> Path:
    """Where the text of a kernel lies."""
    return Path(__file__).with_name(f"{name}.txt")


def text(name: str) -> str:
    """What the schedule makes of a kernel now."""
    return str(KERNELS[name]().script(show_meta=False)) + "\n"
