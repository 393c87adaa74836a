"""A kernel again from its record alone, as `logs prune` and `logs verify` need it: with a random matrix of the same density."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from tilewright.codegen.decisions import AttentionDecisions
from tilewright.codegen.epilogues import Activate, AddNorm, Epilogue, Norm, Qkv
from tilewright.codegen.formats import Format, Layout
from tilewright.codegen.layer_kernels import Context, LayerKernel
from tilewright.codegen.model import Linear
from tilewright.codegen.workload import KernelSpec, Workload
from tilewright.schedules.isa import ISAS
from tilewright.tuning.candidates import space
from tilewright.tuning.records import Record, encode
from tilewright.tuning.replay import EPS, POSITIONS, Stale


def rebuilt(record: Record) -> LayerKernel | Stale:
    """The kernel that `record` is about, planned by the record's default."""
    task = Workload.parse(record.key)
    try:
        detail = _detail(task)
    except (ValueError, KeyError):
        return Stale("unknown epilogue")
    default = next((made for made in space(task) if encode(made) == encode(made) | record.default), None)
    if default is None:
        return Stale("illegal decision")
    residual = detail.residual if not isinstance(detail, Context) else None
    spec = KernelSpec(task.op, task.n, task.k, task.isa, task.epilogue, default, residual)
    parts = () if isinstance(default, AttentionDecisions) else (_linear(task),)
    return LayerKernel(0, task.op, parts, spec, detail, task)


def _detail(task: Workload) -> Epilogue | Context:
    """What the label of an epilogue means; raises ValueError."""
    if task.op == "attention":
        return Context(Format.parse(task.epilogue), POSITIONS)
    kind, _, rest = task.epilogue.partition("@")
    if kind == "add_norm":
        layouts, _, channels = rest.partition("/")
        residual, stream, *reader = layouts.split(">")
        consumer = Format.parse(reader[0]) if reader else None
        norm = Norm(EPS, cast(Layout, residual), cast(Layout, stream), consumer, int(channels) if channels else None)
        made: Epilogue = AddNorm(norm)
    elif task.epilogue.startswith("qkv>"):
        made = Qkv(ISAS[task.isa].attention)
    else:
        activation, _, reader_label = task.epilogue.partition(">")
        made = Activate(activation, Format.parse(reader_label))
    if made.label != task.epilogue:
        raise ValueError(f"{task.epilogue!r} is no epilogue")
    return made


def _linear(task: Workload) -> Linear:
    return Linear("random", random_weight(task), np.zeros(task.n, np.float32), block=task.block)


def random_weight(task: Workload) -> NDArray[np.int8]:
    """s8[N, K] with the workload's share of non-zero blocks in random places.

    Values are normally distributed, as those of trained linears are roughly: how well bytes are packed depends on them.
    """
    random = np.random.default_rng(0)
    drawn = np.clip(np.rint(random.standard_normal((task.n, task.k)) * 39), -127, 127)
    whole = np.where(drawn == 0, 1, drawn).astype(np.int8)
    if task.block is None:
        return whole
    blocks = task.n // task.block[0], task.k // task.block[1]
    kept = random.random(blocks) < task.density / 100
    return whole * np.kron(kept, np.ones(task.block, np.int8))
