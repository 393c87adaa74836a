"""The loop nests of a linear kernel, one for each size of token tile: their axes, and the tokens and outputs they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tilewright.codegen.kernels.common import Expr, alias, stage

Value = Callable[[dict[str, Expr]], Expr]
"""The value of an accumulator, for axes by name."""


@dataclass(frozen=True)
class Nest:
    """One loop nest of a linear kernel: `count` tiles of `tile` token groups each, from group `first` on.

    axes: extents of the accumulators' axes, in their order. q is the tile and j (absent where tiles are single groups by
    nature) the group within; t is the token, and ni the output within row-block nb. Where the nest is `mixed`, j and t are
    vector and lane as `interleave` fills them, and the epilogue has to put its bytes in order.
    """

    tile: int
    first: Expr
    count: Expr
    axes: dict[str, Expr]
    mixed: bool = False

    def block(self, name: str) -> str:
        """`name` as the nest's blocks are called."""
        return block_name(name, self.tile)

    def group(self, axis: dict[str, Expr]) -> Expr:
        """The token group of an accumulator."""
        return self.first + axis["q"] * self.tile + axis.get("j", 0)

    def output(self, axis: dict[str, Expr]) -> Expr:
        """The output of an accumulator."""
        return axis["nb"] * self.axes["ni"] + axis["ni"]

    def written(self, buffer: Any) -> Any:
        """`buffer` as this nest may write it: the nests of a kernel write parts of the same memory."""
        return buffer if self.tile == 1 else alias(buffer)

    @contextmanager
    def epilogue(self) -> Iterator[tuple[list[Expr], dict[str, Expr]]]:
        """The stage `epilogue` over all accumulators; yields its axes as a list and by name."""
        with stage(self.block("epilogue"), self.axes) as variables:
            yield variables, dict(zip(self.axes, variables, strict=True))


def block_name(name: str, tile: int) -> str:
    """`name` of a block in the nest of tiles of `tile` groups."""
    return name if tile == 1 else f"{name}_{tile}"
