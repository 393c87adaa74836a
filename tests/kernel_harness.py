"""Runs one kernel on NumPy arrays: compiled on its own from its unscheduled form, called by the names of its arguments.

Also the layouts kernels read and write, as plain NumPy, and how to look at the assembly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from itertools import chain
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

from tilewright.codegen.block_sparse import BLOCKS
from tilewright.codegen.decisions import Family, Storage
from tilewright.codegen.epilogues import Epilogue
from tilewright.codegen.formats import Format, Layout
from tilewright.codegen.packing import pack_linear
from tilewright.codegen.workload import KernelSpec
from tilewright.cpu import cpu_features
from tilewright.schedules.blocks import DENSE, DENSE_TILES, legal
from tilewright.schedules.decide import decide_linear
from tilewright.schedules.isa import ISAS
from tilewright.schedules.single import Single, linear_spec, single, single_linear

Array = NDArray[Any]
GROUP = 16
HOST = cpu_features()
Case = tuple[Family, tuple[int, int] | None]
FAMILIES: list[Case] = [("gather", (4, 1)), ("row", (16, 4)), ("row", None), ("column", (4, 4))]
"""One kernel of each family, and the dense one."""
EXAMPLES = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
"""For property tests of compiled kernels; the first example compiles."""
FEW_EXAMPLES = settings(EXAMPLES, max_examples=10)
"""Where most of the time goes into the reference, or levels differ in nothing but LLVM's target."""


def runs_here(isa: str) -> bool:
    """Whether this machine's CPU has what ISA level `isa` needs."""
    return HOST.issuperset(ISAS[isa].features)


def level(isa: str, *values: object) -> Any:
    """Parameters (isa, *values) of a test that executes code of level `isa`: skipped where the CPU lacks it."""
    name = "-".join([isa, *("x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values)])
    marks = pytest.mark.skipif(not runs_here(isa), reason=f"this CPU has no {isa}")
    return pytest.param(isa, *values, id=name, marks=marks)


LEVELS = [level(isa) for isa in ISAS]


def linear_cases(isa: str) -> list[Case]:
    """Every family and block that may run at level `isa`."""
    ways = [DENSE, DENSE_TILES, *chain(*BLOCKS.values())]
    return list(dict.fromkeys((way.family, way.block) for way in ways if legal(way, ISAS[isa])))


def read_as(isa: str, layout: Layout) -> Format:
    """The format in which the level's kernels that read `layout` want their activations."""
    readers = {"rows": DENSE, "columns": Storage("gather", (4, 1)), "packed": Storage("column", (4, 4))}
    return decide_linear(readers[layout], 64, 64, 100, ISAS[isa]).input


LINEAR_LEVELS = [level(isa, *case) for isa in ISAS for case in linear_cases(isa)]


def spread(cases: Sequence[tuple[Any, ...]], families: bool = False) -> list[Any]:
    """`level` parameters of half of `cases` for each level, alternating, so that any two neighbouring levels cover all.

    families: each case gets one of FAMILIES in front, in turn; the next level gives the case the next family.
    """
    parameters = []
    for number, isa in enumerate(ISAS):
        for index, case in enumerate(cases):
            if index % 2 == number % 2:
                family = FAMILIES[(index // 2 + number // 2) % len(FAMILIES)] if families else ()
                parameters.append(level(isa, *family, *case))
    return parameters


class Kernel:
    """A kernel compiled for its level, called with NumPy arrays."""

    def __init__(self, made: Single) -> None:
        self.spec = made.spec
        self.arguments = {name: (shape, dtype) for name, shape, dtype in made.parameters}
        self.scheduled = made.scheduled
        self._made = made
        self._run = made.module["main"]

    @classmethod
    def of(cls, func: tvm.tirx.PrimFunc, spec: KernelSpec) -> Kernel:
        """The kernel `func` of `spec`."""
        return cls(single(func, spec))

    def __call__(self, inputs: Mapping[str, Array], outputs: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Outputs of the given shapes, which hold 0x55 in every byte where the kernel writes nothing."""
        assert set(self.arguments) == {*inputs, *outputs}
        tensors = {}
        for name, (shape, dtype) in self.arguments.items():
            if name in outputs:
                array = np.full(tuple(outputs[name]), 0x55, np.uint8).repeat(np.dtype(dtype).itemsize, -1).view(dtype)
            else:
                array = inputs[name]
            assert array.dtype == dtype, name
            assert len(array.shape) == len(shape), name
            tensors[name] = tvm.runtime.tensor(array)
        self._run(*tensors.values())
        return {name: tensors[name].numpy() for name in outputs}

    @cached_property
    def assembly(self) -> str:
        """What LLVM generated."""
        return self._made.assembly


class LinearKernel(Kernel):
    """A linear kernel."""

    def __init__(self, spec: KernelSpec, epilogue: Epilogue) -> None:
        super().__init__(single_linear(spec, epilogue))

    def arrays(self, x: Array, weight: Array, **others: Array) -> dict[str, Array]:
        """All inputs for activations x u8[T, K] and weight s8[N, K]; T is a multiple of 16, `others` are taken as they are."""
        return {
            "x": to_stored(x, self.spec.linear.input),
            **pack_linear(self.spec.linear, weight).arguments(),
            **others,
        }


@cache
def linear_kernel(
    isa: str, family: Family, block: tuple[int, int] | None, n: int, k: int, epilogue: Epilogue, **decided: Any
) -> LinearKernel:
    """The compiled kernel, made once in a test run; `decided` replaces default decisions."""
    return LinearKernel(linear_spec(ISAS[isa], Storage(family, block), n, k, epilogue, **decided), epilogue)


def to_stored(x: Array, stored: Format) -> Array:
    """x[T, C] in format `stored`."""
    return to_groups(x.astype(stored.dtype), stored.layout, stored.pack, stored.together)


def from_stored(x: Array, stored: Format) -> Array:
    """Inverse of `to_stored`, in the stored dtype."""
    return from_groups(x, stored.layout, stored.together)


def to_groups(x: Array, layout: str, pack: int = 1, columns: int = 1) -> Array:
    """x[T, C] as [G, 16, C] (rows), [G, C, 16] (columns) or [G, C / pack, 16, pack] (packed).

    columns: groups of the widest tile of integer columns; a tile of n groups stands as [C, n, 16].
    """
    grouped = x.reshape(-1, GROUP, x.shape[1])
    if layout == "packed":
        grouped = grouped.reshape(len(grouped), GROUP, -1, pack).transpose(0, 2, 1, 3)
    if layout != "columns":
        return np.ascontiguousarray(grouped)
    tiles = [tile.transpose(2, 0, 1).ravel() for tile in _tiles(grouped, columns)]
    return np.concatenate(tiles).reshape(len(grouped), -1, GROUP)


def from_groups(x: Array, layout: str, columns: int = 1) -> Array:
    """Inverse of `to_groups`."""
    if layout == "packed":
        x = x.transpose(0, 2, 1, 3).reshape(len(x), GROUP, -1)
    if layout != "columns":
        return np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    tiles = [tile.reshape(x.shape[1], -1).T for tile in _tiles(x, columns)]
    return np.ascontiguousarray(np.concatenate(tiles))


def _tiles(groups: Array, size: int) -> list[Array]:
    """Whole tiles of `size` groups from the first on, then those of half as many of what is left over, and so on."""
    whole = len(groups) // size * size
    tiles = [groups[i : i + size] for i in range(0, whole, size)]
    return tiles + (_tiles(groups[whole:], size // 2) if whole < len(groups) else [])


def group_shape(tokens: int, channels: int, layout: str, pack: int = 1) -> tuple[int, ...]:
    """Shape of `to_groups`."""
    groups = tokens // GROUP
    if layout == "packed":
        return groups, channels // pack, GROUP, pack
    return (groups, GROUP, channels) if layout == "rows" else (groups, channels, GROUP)


def round_up(tokens: int) -> int:
    """`tokens` rounded up to whole groups."""
    return -(-tokens // GROUP) * GROUP


def product(x: Array, weight: Array) -> NDArray[np.int64]:
    """x @ weight.T of integers; float64 holds the sums exactly (below 2**53) and multiplies much faster."""
    return (x.astype(np.float64) @ weight.T.astype(np.float64)).astype(np.int64)


def assert_u8(found: Array, real: Array, zero_point: float, low: int = 0, high: int = 255, offset: int = 0) -> None:
    """`found` is `real` (in units of the scale, float64) rounded, clipped and moved: within 1 everywhere, 99.9 % equal."""
    expected = np.clip(np.rint(real) + zero_point, low, high) + offset
    difference = np.abs(found.astype(np.int64) - expected)
    assert difference.max() <= 1
    wrong = int((difference > 0).sum())
    assert wrong <= max(1, difference.size // 1000)


def innermost_loops(assembly: str, instruction: str) -> list[list[str]]:
    """Lines of each loop that holds a match of the pattern `instruction` and no smaller loop that does."""
    blocks, following = _control_flow(assembly)
    before: dict[int, set[int]] = {block: set() for block in following}
    for block, nexts in following.items():
        for other in nexts:
            before[other].add(block)
    loops = []
    for last, header in _back_edges(following):
        body, waiting = {header, last}, [] if last == header else [last]
        while waiting:  # whatever reaches the jump back without passing the header
            new = before[waiting.pop()] - body
            body |= new
            waiting += new
        if any(re.search(instruction, line) for block in body for line in blocks[block]):
            loops.append(body)
    smallest = [body for body in loops if not any(other < body for other in loops)]
    return [[line for block in sorted(body) for line in blocks[block]] for body in smallest]


def _control_flow(assembly: str) -> tuple[list[list[str]], dict[int, list[int]]]:
    """Basic blocks as lines, and the blocks that may follow each."""
    blocks: list[list[str]] = [[]]
    label: dict[str, int] = {}
    for line in (line.split("#")[0].strip() for line in assembly.splitlines()):
        if re.fullmatch(r"[\w.]+:", line):
            blocks.append([])
            label[line[:-1]] = len(blocks) - 1
        elif line and not line.startswith("."):
            blocks[-1].append(line)
            if re.match(r"j\w+\s|ret", line):
                blocks.append([])
    following = {}
    for number, lines in enumerate(blocks):
        last = lines[-1] if lines else ""
        jump = re.match(r"j\w+\s+([\w.]+)$", last)
        falls = not re.match(r"jmp|ret", last) and number + 1 < len(blocks)
        following[number] = ([label[jump[1]]] if jump and jump[1] in label else []) + ([number + 1] if falls else [])
    return blocks, following


def _back_edges(following: Mapping[int, Sequence[int]]) -> list[tuple[int, int]]:
    """(last block, header) of each loop: edges to a block on the path of a depth-first walk."""
    found, done = [], set()
    for start in following:
        if start in done:
            continue
        done.add(start)
        path, waiting = [start], [iter(following[start])]
        while path:
            block = next(waiting[-1], None)
            if block is None:
                path.pop()
                waiting.pop()
            elif block in path:
                found.append((path[-1], block))
            elif block not in done:
                done.add(block)
                path.append(block)
                waiting.append(iter(following[block]))
    return found


def vector_stack_accesses(lines: Sequence[str]) -> list[str]:
    """Those that load or store a vector register at a fixed place on the stack: %rbp with an index, or moving, is no frame."""
    advanced = any(line.endswith("%rbp") for line in lines)
    place = r"\(%rsp[,)]" if advanced else r"\(%rsp[,)]|\(%rbp\)"
    return [line for line in lines if re.search(place, line) and re.search(r"%[xyz]mm\d", line)]
