"""The program of a level: the straight list of kernel calls that runs a model, and where their results lie in memory.

Written by the compiler after it has planned memory (`codegen/flatten.py`), stored in the manifest beside the parameters that it
names, and walked by the runtime (`runtime/engine.c`), which also checks it (`runtime/manifest.c`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Extent = int | Literal["groups", "sequences"]
"""A number, or what a call decides: groups of 16 tokens, or sequences."""


@dataclass(frozen=True)
class Value:
    """A result of a kernel. Values that are not needed at the same time share a `storage`, which holds the largest of them."""

    storage: int
    dtype: str
    shape: tuple[Extent, ...]


@dataclass(frozen=True)
class KernelCall:
    """A call of the function `kernel` of the level's library.

    arguments: in order; the number of a value, or the name of a parameter or of one of the kernels' inputs (input_ids,
    position_ids, token_type_ids: i32[groups, 16]; offsets: i32[sequences + 1]).
    """

    kernel: str
    arguments: tuple[int | str, ...]


@dataclass(frozen=True)
class Program:
    """Calls in order, the values they read and write, and which of these are the model's outputs."""

    values: tuple[Value, ...] = ()
    calls: tuple[KernelCall, ...] = ()
    outputs: tuple[int, ...] = ()
