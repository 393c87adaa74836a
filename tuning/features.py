"""What the cost model sees of a workload and its decisions: numbers by name, made from the data as it is.

A decision that is added later becomes a feature by itself; records that lack one leave it out, which trees can handle.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

from tilewright.codegen.workload import Workload
from tilewright.schedules.isa import ISAS
from tilewright.tuning.records import Values

Features = dict[str, float]


def features(task: Workload, decisions: Values, default: Values) -> Features:
    """The features of `decisions` for `task`, relative to whose `default` costs are."""
    isa, block = ISAS[task.isa], task.block or (0, 0)
    found: Features = {
        "op": _word(task.op),
        "log_n": math.log2(task.n),
        "log_k": math.log2(task.k),
        "density": task.density,
        "block_outputs": block[0],
        "block_inputs": block[1],
        "epilogue": _word(task.epilogue.partition(">")[0].partition("@")[0]),
        "log_tokens": math.log2(max(task.tokens, 1)),
        "threads": task.threads,
        "lanes": isa.lanes,
        "registers": isa.registers,
        "level": list(ISAS).index(task.isa),
    }
    for prefix, values in (("", decisions), ("default.", default)):
        for name, value in values.items():
            _flatten(f"{prefix}{name}", value, found)
    if "chunks" in decisions:
        stored = task.n * task.k * task.density / 100
        found["log_chunk_weights"] = math.log2(max(stored / decisions["chunks"], 1))
        found["tasks"] = decisions["chunks"] * max(task.tokens // 16, 1)
        found["accumulators"] = decisions.get("row_block", 1) * decisions.get("rows", 1) / isa.lanes
    found["changes"] = changes(decisions, default)
    return found


def changes(decisions: Values, default: Values) -> int:
    """How many decisions differ."""
    return sum(default.get(name) != value for name, value in decisions.items())


def _flatten(name: str, value: Any, found: Features) -> None:
    if isinstance(value, bool | int | float):
        found[name] = float(value)
    elif isinstance(value, str):
        found[name] = _word(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            _flatten(f"{name}.{key}", inner, found)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _flatten(f"{name}.{index}", inner, found)


def _word(text: str) -> float:
    """A number for a word, the same in every process."""
    return float(zlib.crc32(text.encode()) % 9973)
