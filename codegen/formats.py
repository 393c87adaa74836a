"""How activations and operands are stored: the formats that kernels hand to one another, each decided by who reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, cast

GROUP = 16
"""Tokens of one group: the unit to which the packed token axis is rounded up."""

Layout = Literal["rows", "columns", "packed"]
"""Order of an activation's axes: rows is [G, 16, C], columns is [G, C, 16], packed is [G, C / pack, 16, pack]."""


@dataclass(frozen=True)
class Operands:
    """What a linear kernel's products multiply: dtypes of activations (u8 values) and of weights (s8 values).

    pack: neighbouring products that an int32 lane sums with one instruction. `row` kernels always store weights as int8.
    """

    activation: str
    weight: str
    pack: int


PAIRS = Operands("int16", "int16", 2)
QUADS = Operands("uint8", "int8", 4)


@dataclass(frozen=True)
class AttentionOperands:
    """What attention multiplies: dtypes of queries and values, of keys, and of softmax weights.

    Keys are stored as s8 value + key_offset: an unsigned key adds key_offset * sum(query) to all scores of a query, which
    softmax cancels exactly. pack: as in `Operands`.
    """

    query: str
    key: str
    weight: str
    key_offset: int
    pack: int


ATTENTION_PAIRS = AttentionOperands("int16", "int16", "int16", 0, 2)
ATTENTION_QUADS = AttentionOperands("int8", "uint8", "uint8", 128, 4)


_SHORT = {"float32": "f32", "int32": "s32", "int16": "s16", "uint8": "u8", "int8": "s8"}


@dataclass(frozen=True)
class Format:
    """How the activation on one edge between kernels is stored; the consumer's plan decides it, the producer writes it.

    pack: neighbouring channels of `packed` that stand together, 1 in other layouts.
    together: token groups whose channels stand together in `columns`, a power of two W: every W groups, from the first on,
    stand as [C, W, 16], so that W groups of a channel are one vector register. Of the G % W groups left over, W / 2 stand as
    [C, W / 2, 16] if there are so many, and so on down to single groups (`tiles`). The declared shape stays [G, C, 16].
    """

    layout: Layout
    dtype: str
    pack: int = 1
    together: int = 1

    @property
    def tiles(self) -> tuple[int, ...]:
        """Groups of each tile size, widest first: `together` and its halves down to 1."""
        return tuple(1 << size for size in reversed(range(self.together.bit_length())))

    @property
    def label(self) -> str:
        """One word that says it all, for keys of kernels."""
        packed = str(self.pack) if self.pack > 1 else ""
        return f"{_SHORT[self.dtype]}.{self.layout}{packed}" + (f"x{self.together}" if self.together > 1 else "")

    @staticmethod
    def parse(label: str) -> Format:
        """The format of a label; raises ValueError."""
        found = re.fullmatch(rf"({'|'.join(_SHORT.values())})\.(rows|columns|packed)(\d+)?(?:x(\d+))?", label)
        if found is None:
            raise ValueError(f"{label!r} is no format")
        dtype = next(name for name, short in _SHORT.items() if short == found[1])
        return Format(cast(Layout, found[2]), dtype, int(found[3] or 1), int(found[4] or 1))

    def shape(self, groups: Any, channels: int) -> tuple[Any, ...]:
        """The declared shape of `channels` channels of `groups` token groups."""
        if self.layout == "packed":
            return groups, channels // self.pack, GROUP, self.pack
        return (groups, GROUP, channels) if self.layout == "rows" else (groups, channels, GROUP)
