"""How many cycles the kernels take, by ISA level and storage: the table rates.json, measured on real CPUs or modelled.

A linear kernel's cycles for one token are `stored / macs + outputs * cost`: `stored` counts the weights in stored blocks,
`cost` is what an output takes whatever its row-block holds (the loop's start, filling of the last entry, the epilogue).
Attention's are, for one token and a sequence of S, `2 * S * hidden / macs + S * heads * softmax + hidden * cost`.
`python -m benchmarks.rates` writes the table, `python -m benchmarks.predictions` checks it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tilewright.codegen.decisions import Family, Storage

TABLE = Path(__file__).with_name("rates.json")

Source = Literal["measured", "modelled"]

Kind = Literal["qkv", "add_norm", "activate"]
"""What follows a product, as far as rates tell it apart."""


@dataclass(frozen=True)
class LinearRate:
    """Rates of matrices stored one way. macs: products with stored weights per cycle.

    qkv, add_norm, activate: cycles per output and token in a kernel with that epilogue.
    """

    family: Family
    block: tuple[int, int] | None
    macs: float
    qkv: float
    add_norm: float
    activate: float

    def cost(self, kind: Kind) -> float:
        """Cycles per output and token that do not depend on how many weights are stored."""
        return {"qkv": self.qkv, "add_norm": self.add_norm, "activate": self.activate}[kind]

    def cycles(self, n: int, k: int, density: float, kind: Kind) -> float:
        """Cycles of one token in a kernel of `n` outputs and `k` inputs, a share `density` of whose weights is stored."""
        return n * k * density / self.macs + n * self.cost(kind)

    def break_even(self, n: int, k: int, kind: Kind, cycles: float) -> float:
        """The density at which the kernel takes `cycles` a token; below 0 if it never takes so few."""
        return (cycles - n * self.cost(kind)) * self.macs / (n * k)


@dataclass(frozen=True)
class AttentionRate:
    """macs: products per cycle; softmax: cycles per score; cost: cycles per channel and token."""

    macs: float
    softmax: float
    cost: float


@dataclass(frozen=True)
class LevelRates:
    """Rates of an ISA level on an LLVM CPU. about: where they come from, for people.

    ghz: clock at which they were measured, None if modelled. embedding: cycles per channel and token.
    """

    isa: str
    cpu: str
    source: Source
    about: str
    ghz: float | None
    linears: tuple[LinearRate, ...]
    attention: AttentionRate
    embedding: float

    def of(self, storage: Storage) -> LinearRate | None:
        """The rates of `storage`: a block that nobody measured is taken as the slowest of its family; None without any."""
        sparse = storage.block is not None
        family = [rate for rate in self.linears if rate.family == storage.family and (rate.block is not None) == sparse]
        exact = [rate for rate in family if rate.block == storage.block]
        return min(exact or family, key=lambda rate: rate.macs, default=None)


@cache
def table() -> tuple[LevelRates, ...]:
    """All rates that the package holds."""
    return from_json(TABLE.read_text("utf-8"))


def find(isa: str, cpu: str | None, rates: Sequence[LevelRates] | None = None) -> LevelRates | None:
    """The rates nearest to level `isa` on LLVM CPU `cpu`: of that CPU, else of its maker's, measured before modelled.

    None if there are none for the level.
    """
    known = [entry for entry in (table() if rates is None else rates) if entry.isa == isa]
    return min(
        known,
        key=lambda entry: (entry.cpu != cpu, cpu is not None and _amd(entry.cpu) != _amd(cpu), entry.source != "measured"),
        default=None,
    )


def _amd(cpu: str) -> bool:
    return cpu.startswith("znver")


def from_json(text: str) -> tuple[LevelRates, ...]:
    """The table from JSON: a list of LevelRates."""
    return tuple(_level(entry) for entry in json.loads(text))


def _level(entry: dict[str, Any]) -> LevelRates:
    linears = tuple(LinearRate(**{**rate, "block": rate["block"] and tuple(rate["block"])}) for rate in entry["linears"])
    return LevelRates(**{**entry, "linears": linears, "attention": AttentionRate(**entry["attention"])})
