"""Compiling by a tuning log: which records fit a model's kernels exactly, and why others are left alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import tvm_ffi

from tilewright.codegen.decisions import AttentionDecisions, LinearDecisions, TokenBucket
from tilewright.codegen.epilogues import AddNorm, Epilogue
from tilewright.codegen.layer_kernels import Context, Decisions, LayerKernel, function, layer_kernels
from tilewright.codegen.model import EncoderModel
from tilewright.codegen.plan import LinearPlan, Plan
from tilewright.codegen.workload import ATTRIBUTE, GROUP, KernelSpec
from tilewright.errors import ScheduleMismatch
from tilewright.schedules.apply import schedule
from tilewright.schedules.choice import admits
from tilewright.schedules.isa import ISAS
from tilewright.tuning.candidates import candidates, packing
from tilewright.tuning.records import Log, Record, encode

USUAL_TOKENS = 128
"""Where a kernel can be compiled by the record of one bucket only, that nearest to so many tokens."""

Chosen = tuple[tuple[int, Decisions], ...]
"""Decisions of a kernel for calls of so many tokens at most, fewest first; the last are for all others."""

EPS, POSITIONS = 1e-12, 512
"""Constants of a kernel's code that no decision depends on: BERT's, in every hash."""


@dataclass(frozen=True)
class Stale:
    """Why a record is not used."""

    reason: str


@cache
def kernel_hash(spec: KernelSpec, detail: Epilogue | Context) -> str:
    """Hash of the scheduled kernel: the same in every process, and after any change that leaves the kernel as it was.

    Names, and constants that no decision depends on (a LayerNorm's epsilon, the longest sequence), are not in it.
    """
    if isinstance(detail, AddNorm):
        detail = AddNorm(replace(detail.norm, eps=EPS))
    elif isinstance(detail, Context):
        detail = replace(detail, max_positions=POSITIONS)
    scheduled = schedule(function(spec, detail), spec)
    return f"{tvm_ffi.structural_hash(scheduled.without_attr(ATTRIBUTE)) & (1 << 64) - 1:016x}"


def check(record: Record, kernel: LayerKernel) -> Decisions | Stale:
    """The decisions of `record` for `kernel`, which is planned by default; or why they do not hold any more."""
    assert kernel.spec.decisions is not None
    if encode(kernel.spec.decisions) != encode(kernel.spec.decisions) | record.default:
        return Stale("default decided otherwise")
    wanted = encode(kernel.spec.decisions) | record.decisions
    decisions = next((made for made in candidates(kernel) if encode(made) == wanted), None)
    if decisions is None:
        return Stale("illegal decision")
    try:
        if kernel_hash(kernel.spec, kernel.detail) != record.default_hash:
            return Stale("default kernel changed")
        if kernel_hash(kernel.decided(decisions), kernel.detail) != record.hash:
            return Stale("kernel changed")
    except ScheduleMismatch:
        return Stale("illegal decision")
    return decisions


@dataclass(frozen=True)
class Replay:
    """A plan by records. applied: of each kernel, by name; one without is as it was planned. stale: reasons, counted."""

    plan: Plan
    applied: Mapping[str, tuple[Record, ...]]
    kernels: int
    stale: Mapping[str, int]

    @property
    def summary(self) -> str:
        """Counts for people."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.stale.items()))
        told = f"{sum(self.stale.values())} records stale" + (f" ({reasons})" if reasons else "")
        return f"{len(self.applied)} kernels tuned, {self.kernels - len(self.applied)} default, {told}"


def replay(model: EncoderModel, plan: Plan, log: Log, threads: int = 1) -> Replay:
    """`plan` with the decisions of every record of `log` that is about exactly a kernel of `model` and still holds.

    A record that stores a matrix otherwise changes the format that the kernel before it writes, and so that kernel's workload;
    formats follow one from another, so that looking up again ends after a few rounds.
    """
    records, defaults = log.by_task(threads), layer_kernels(model, plan)
    known: dict[tuple[object, ...], Decisions | Stale] = {}
    now = plan
    for _ in range(len(defaults) + 2):
        chosen: dict[str, Chosen] = {}
        applied: dict[str, tuple[Record, ...]] = {}
        stale: dict[str, str] = {}
        for current, default in zip(layer_kernels(model, now), defaults, strict=True):
            assert default.spec.decisions is not None
            own = replace(current, spec=current.decided(default.spec.decisions))
            held: dict[int, tuple[Record, Decisions]] = {}
            for tokens, record in sorted(records.get(own.workload.at(0, threads).key(), {}).items()):
                place = (record.key, own.spec, own.detail)
                if place not in known:
                    known[place] = check(record, own)
                if isinstance(found := _admitted(known[place], own), Stale):
                    stale[record.key] = found.reason
                else:
                    held[tokens] = record, found
            if held:
                chosen[own.name], applied[own.name] = _choose(held)
        following = _decided(plan, chosen)
        if following == now:
            return Replay(now, applied, len(defaults), Counter(stale.values()))
        now = following
    raise AssertionError("formats of kernels follow one from another in a circle")


def _choose(held: Mapping[int, tuple[Record, Decisions]]) -> tuple[Chosen, tuple[Record, ...]]:
    """What a kernel does with the records of its buckets, and which of them it follows.

    A linear's buckets must read the same packed weights: those that gain most in all decide the packing, records of another are
    left out, and the next larger bucket serves their calls. Attention has one way for all calls.
    """
    if any(isinstance(made, AttentionDecisions) for _, made in held.values()):
        record, made = held[min(held, key=lambda tokens: abs(math.log(tokens / USUAL_TOKENS)))]
        return ((0, made),), (record,)
    packings: dict[object, float] = {}
    for record, made in held.values():
        packings[packing(made)] = packings.get(packing(made), 0.0) + math.log(record.gain.median)
    best = max(packings, key=lambda one: packings[one])
    kept = {tokens: (record, made) for tokens, (record, made) in held.items() if packing(made) == best}
    return tuple((tokens, made) for tokens, (_, made) in kept.items()), tuple(record for record, _ in kept.values())


def _admitted(found: Decisions | Stale, kernel: LayerKernel) -> Decisions | Stale:
    """`found` unless this kernel's own weights rule it out."""
    if not isinstance(found, LinearDecisions) or found.storage == kernel.spec.linear.storage:
        return found
    return found if admits(found.storage, ISAS[kernel.spec.isa], kernel.weight) else Stale("weights out of range")


def _decided(plan: Plan, chosen: Mapping[str, Chosen]) -> Plan:
    """`plan` with other decisions for kernels, by their names."""

    def linear(name: str, old: LinearPlan) -> LinearPlan:
        if name not in chosen:
            return old
        buckets: list[TokenBucket] = []
        *few, (_, made) = chosen[name]
        assert isinstance(made, LinearDecisions)
        following = made
        for tokens, own in reversed(few):  # a bucket that decides as the next larger one does is part of it
            assert isinstance(own, LinearDecisions)
            if own != following:
                buckets.insert(0, TokenBucket(tokens // GROUP, own))
            following = own
        other = made.storage != old.decisions.storage
        reason = f"stored as {made.family} {made.block or 'dense'}, which was measured to be faster" if other else old.reason
        return replace(old, decisions=made, buckets=tuple(buckets), reason=reason)

    layers = []
    for index, layer in enumerate(plan.layers):
        (_, attention), *_ = chosen.get(f"layer{index}.attention", ((0, layer.attention),))
        assert isinstance(attention, AttentionDecisions)
        linears = {slot: linear(f"layer{index}.{slot}", getattr(layer, slot)) for slot in ("qkv", "output", "up", "down")}
        layers.append(replace(layer, attention=attention, **linears))
    return replace(plan, layers=tuple(layers))
