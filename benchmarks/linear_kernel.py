"""Builds linear kernels one by one, with packed weights and an epilogue, and times them in turns with the peak loop."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray

from benchmarks.peak import peak
from tilewright.codegen.decisions import Block, Storage
from tilewright.codegen.epilogues import Activate, AddNorm, Epilogue, Norm, Raw
from tilewright.codegen.formats import GROUP
from tilewright.codegen.packing import pack_linear
from tilewright.codegen.workload import density_bucket
from tilewright.commands.output import block_name
from tilewright.schedules.blocks import dense, sums_in_16_bits
from tilewright.schedules.choice import sparse_storage
from tilewright.schedules.decide import decide_linear
from tilewright.schedules.depth import choose_depth
from tilewright.schedules.isa import ISAS, Isa
from tilewright.schedules.single import Single, linear_spec, single_linear

EPILOGUES = ("relu", "gelu", "add_norm", "raw")
TURN = 0.002  # seconds of one kernel's turn


@dataclass(frozen=True)
class Case:
    """A kernel on one matrix: spread says how non-zero blocks are distributed over row-blocks, None if dense."""

    level: str
    shape: tuple[int, int]
    block: Block | None
    tokens: int
    sparsity: float
    spread: str


@dataclass(frozen=True)
class Result:
    """Medians over the rounds. macs: multiplications by non-zeros; peak: their rate in percent of the turn's peak.

    gmacs: rate on non-zeros; gops: 2 N K T / time, as if the matrix were dense; speedup: over the dense kernel.
    """

    case: Case
    stored: str
    microseconds: float
    gmacs: float
    peak: float
    gops: float
    speedup: float | None
    uneven: float | None


@dataclass
class Runner:
    """A compiled kernel with its arguments, and what was measured so far: seconds, and GMAC/s of the peak loop."""

    case: Case
    storage: Storage
    macs: int
    run: Any
    arguments: list[Any]
    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)

    def turn(self) -> None:
        """One untimed call and then about TURN seconds of calls, all from C++; the best of three, as the peak is."""
        self.peaks.append(peak(self.case.level, TURN))
        number = max(1, round(TURN / 3 / self.seconds[-1])) if self.seconds else 1
        self.seconds.append(self.run(number)(*self.arguments).min)


def weights(case: Case, random: np.random.Generator) -> NDArray[np.int8]:
    """s8[N, K] in which exactly the share `sparsity` of blocks is zero and no other value is.

    Values are normally distributed, the largest of a row of 768 at about 127, as those of trained linears are roughly: how well
    kernels of bytes without VNNI are packed depends on them.
    """
    drawn = np.clip(np.rint(random.standard_normal(case.shape) * 39), -127, 127)
    dense = np.where(drawn == 0, 1, drawn).astype(np.int8)
    if case.block is None:
        return dense
    rows, columns = (size // unit for size, unit in zip(case.shape, case.block, strict=True))
    kept = round(rows * columns * (1 - case.sparsity))
    keep = np.zeros((rows, columns), np.int8)
    for row, count in enumerate(_counts(case.spread, rows, columns, kept, random)):
        keep[row, random.permutation(columns)[:count]] = 1
    return dense * np.kron(keep, np.ones(case.block, np.int8))


def _counts(spread: str, rows: int, columns: int, kept: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Non-zero blocks of each row-block, `kept` in all: those of random places, equal, or of a log-normal distribution."""
    if spread == "random":
        drawn: NDArray[np.int64] = random.multivariate_hypergeometric([columns] * rows, kept, method="marginals")
        return drawn
    wanted = np.ones(rows) if spread == "even" else random.lognormal(sigma=1.0, size=rows)
    counts: NDArray[np.int64] = np.minimum(wanted / wanted.sum() * kept, columns).astype(np.int64)
    while (missing := kept - counts.sum()) > 0:  # what rounding and full rows left over
        free = np.flatnonzero(counts < columns)
        counts[random.permutation(free)[:missing]] += 1
    return counts


def _epilogue(name: str, storage: Storage, n: int, isa: Isa) -> Epilogue:
    """The epilogue, writing the format that a like kernel of `n` inputs reads."""
    following = decide_linear(storage, n, n, 100, isa).input
    if name == "raw":
        return Raw()
    if name == "add_norm":
        return AddNorm(Norm(1e-12, storage.lanes, storage.lanes, following))
    return Activate(name, following)


class Builder:
    """Compiles kernels, each once: cases that differ in tokens or values share one."""

    def __init__(self, epilogue: str) -> None:
        self._epilogue = epilogue
        self._built: dict[Any, Single] = {}

    def runner(self, case: Case, storage: Storage | None = None, **decided: Any) -> Runner:
        """The case's kernel on random operands; a sparse one also where dense would be chosen instead.

        storage, decided: instead of what the level prefers, and of some of the default decisions.
        """
        isa, (n, k) = ISAS[case.level], case.shape
        storage = storage or (case.block and sparse_storage(case.block, isa)) or dense(isa)
        random = np.random.default_rng(0)
        weight = weights(case, random)
        if storage.block and sums_in_16_bits(storage, isa):
            decided = {"depth": choose_depth(weight, storage.block[0]).depth} | decided
        epilogue = _epilogue(self._epilogue, storage, n, isa)
        density = 100 if storage.block is None else density_bucket(1 - case.sparsity)
        spec = linear_spec(isa, storage, n, k, epilogue, density, **decided)
        if spec not in self._built:
            self._built[spec] = single_linear(spec, epilogue)
        made = self._built[spec]
        packed = pack_linear(spec.linear, weight).arguments()
        arguments = [
            tvm.runtime.tensor(packed[name] if name in packed else _values(shape, dtype, case.tokens // GROUP, random))
            for name, shape, dtype in made.parameters
        ]

        def run(number: int) -> Any:
            return made.module.time_evaluator("main", tvm.cpu(), number=number, repeat=3)

        return Runner(case, storage, case.tokens * int(np.count_nonzero(weight)), run, arguments)


def _values(shape: Sequence[Any], dtype: str, groups: int, random: np.random.Generator) -> NDArray[Any]:
    """Plausible values for an argument of `shape`, in which what is no number is the number of token groups."""
    sizes = [int(size) if isinstance(size, int | tvm.tirx.IntImm) else groups for size in shape]
    if dtype == "float32":
        return random.uniform(0.5, 1.0, sizes).astype(np.float32)
    return random.integers(0, 100, sizes).astype(dtype)


def measure(cases: Sequence[Case], epilogue: str, rounds: int) -> list[Result]:
    """Run the cases in turns; those of one shape, level and number of tokens are compared with each other."""
    builder = Builder(epilogue)
    runners = [builder.runner(case) for case in cases]
    for _ in range(rounds + 1):  # the first tells how many calls fit a turn
        for runner in runners:
            runner.turn()
    for runner in runners:
        del runner.seconds[0], runner.peaks[0]
    return [_result(runner, runners) for runner in runners]


def _result(runner: Runner, others: Sequence[Runner]) -> Result:
    case, (n, k) = runner.case, runner.case.shape
    alike = [other for other in others if (other.case.level, other.case.tokens) == (case.level, case.tokens)]
    dense = [other for other in alike if other.case.block is None]
    even = [
        other for other in alike
        if (other.case.block, other.case.sparsity, other.case.spread) == (case.block, case.sparsity, "even")
    ]  # fmt: skip
    rates = [runner.macs / seconds / 1e9 for seconds in runner.seconds]
    seconds = statistics.median(runner.seconds)
    return Result(
        case=case,
        stored=f"{runner.storage.family} {block_name(runner.storage.block)}",
        microseconds=seconds * 1e6,
        gmacs=statistics.median(rates),
        peak=100 * statistics.median(rate / most for rate, most in zip(rates, runner.peaks, strict=True)),
        gops=2 * n * k * case.tokens / seconds / 1e9,
        speedup=_ratio(dense[0], runner) if dense and case.block is not None else None,
        uneven=_ratio(runner, even[0]) if even and case.spread == "uneven" else None,
    )


def _ratio(runner: Runner, base: Runner) -> float:
    return statistics.median(a / b for a, b in zip(runner.seconds, base.seconds, strict=True))
