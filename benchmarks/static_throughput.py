"""Quality of the linear kernels' inner loops, from their assembly alone: no CPU that has the ISA level is needed.

    python -m benchmarks.static_throughput                          # every block shape and level for the main shapes
    python -m benchmarks.static_throughput --levels avx512vnni --blocks 4x1 16x4 --shapes 3072x768 --json out.json

Each kernel is compiled with integer sums as its output. The innermost loop around its dot instructions must keep every
accumulator in a register; llvm-mca predicts its steady state with all data in the L1 cache, on LLVM's model of Ice Lake
servers for every level (it gives `vpdpbusd zmm` the two ports that the hardware has; later models do not).
Peak is two dot instructions per cycle: 128 MACs for avx512vnni.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from tilewright.codegen.block_sparse import BLOCKS
from tilewright.codegen.decisions import Storage
from tilewright.codegen.epilogues import Raw
from tilewright.commands.output import block_name
from tilewright.schedules.blocks import DENSE, legal
from tilewright.schedules.isa import ISAS, Isa
from tilewright.schedules.single import linear_spec, single_linear

LEVELS = ("avx2", "avxvnni", "avx512", "avx512vnni")
SHAPES = ((768, 768), (3072, 768), (768, 3072))
DENSITY = 20
CPU = "icelake-server"
TOOLS = ("llvm-mca", *(f"llvm-mca-{version}" for version in range(22, 13, -1)))
DOT = re.compile(r"^(?:\{vex\}\s+)?(vpmaddwd|vpdpbusd)\b.*%([xyz])mm\d+$")
VECTOR_BITS = {"x": 128, "y": 256, "z": 512}
STACK = "(%rsp)"
PER_CYCLE = 2


@dataclass(frozen=True)
class Row:
    """One kernel's inner loop. stack: its vector and other accesses to the stack (spills and reloads). peak: in percent."""

    level: str
    family: str
    block: str
    shape: str
    dots: int
    instructions: int
    vector_stack: int
    other_stack: int
    cycles: float
    macs_per_cycle: float
    peak: float
    vnni_peak: float
    bound: str


def assembly(isa: Isa, storage: Storage, n: int, k: int) -> str:
    """What LLVM generates for the kernel of a matrix stored so."""
    spec = linear_spec(isa, storage, n, k, Raw(), 100 if storage.block is None else DENSITY)
    return single_linear(spec, Raw()).assembly


def inner_loop(text: str) -> list[str]:
    """Instructions of the loop with the most dot instructions among those that contain no other such loop.

    Memory operands on the stack read STACK, whichever register points there.
    """
    lines = [line.split("#")[0].strip().replace("\t", " ") for line in text.splitlines()]
    places = {line[:-1]: place for place, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    spans = []
    for place, line in enumerate(lines):
        jump = re.fullmatch(r"j\w+ (\.L\w+)", line)
        start = places.get(jump[1], place) if jump else place
        if start < place and any(DOT.match(line) for line in lines[start:place]):
            spans.append((start, place + 1))
    inner = [span for span in spans if not any(span != other and _inside(other, span) for other in spans)]
    start, end = max(inner, key=lambda span: sum(bool(DOT.match(line)) for line in lines[slice(*span)]))
    function = max(place for place in range(start) if re.match(r"[A-Za-z_]\w*:", lines[place]))
    stack = "%r[sb]p" if "movq %rsp, %rbp" in lines[function:start] else "%rsp"
    return [re.sub(rf"\({stack}\)", STACK, line) for line in lines[start:end] if line and not line.startswith(".")]


def _inside(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return other[0] <= span[0] and span[1] <= other[1]


def stack_accesses(loop: Sequence[str]) -> tuple[int, int]:
    """Memory operands on the stack: of vector instructions, and of others."""
    accesses = [line for line in loop if STACK in line]
    vectors = sum(bool(re.search(r"%[xyz]mm\d", line)) for line in accesses)
    return vectors, len(accesses) - vectors


def predict(tool: str, loop: Sequence[str]) -> tuple[float, str]:
    """Cycles per iteration of `loop` in a steady state, and what bounds them: ports, dispatch, or latency for neither."""
    iterations = 200
    command = [tool, f"-mcpu={CPU}", "-mattr=+avxvnni", "-json", f"-iterations={iterations}"]
    # the jump goes to a label that is not part of the text
    text = "\n".join(re.sub(r"^(j\w+) .*", r"\1 .", line) for line in loop)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool} failed: {done.stderr.strip().splitlines()[-1]}")
    summary = json.loads(done.stdout)["CodeRegions"][0]["SummaryView"]
    cycles = summary["TotalCycles"] / iterations
    limits = {
        "ports": summary["BlockRThroughput"],
        "dispatch": summary["TotaluOps"] / iterations / summary["DispatchWidth"],
    }
    name, limit = max(limits.items(), key=lambda item: item[1])
    return cycles, name if limit > 0.85 * cycles else "latency"


def analyse(tool: str, isa: Isa, storage: Storage, n: int, k: int) -> Row:
    """Compile one kernel and look at its inner loop."""
    loop = inner_loop(assembly(isa, storage, n, k))
    dots = [match for match in map(DOT.match, loop) if match]
    macs = sum(VECTOR_BITS[match[2]] // 32 * isa.operands.pack for match in dots)
    cycles, bound = predict(tool, loop)
    own, vnni = (PER_CYCLE * ISAS[name].lanes * ISAS[name].operands.pack for name in (isa.name, "avx512vnni"))
    block = block_name(storage.block)
    rate = macs / cycles
    return Row(
        isa.name, storage.family, block, f"{n}x{k}", len(dots), len(loop), *stack_accesses(loop),
        round(cycles, 2), round(rate, 1), round(100 * rate / own, 1), round(100 * rate / vnni, 1), bound,
    )  # fmt: skip


def ways(isa: Isa, blocks: Sequence[str]) -> Iterator[Storage]:
    """The kernels that a level may use, once each; only those of `blocks` if given."""
    seen = set()
    for storage in [DENSE, *chain(*BLOCKS.values())]:
        if storage not in seen and legal(storage, isa) and (not blocks or block_name(storage.block) in blocks):
            seen.add(storage)
            yield storage


def markdown(rows: Sequence[Row], version: str) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"Inner loops of the linear kernels, {DENSITY} % of blocks non-zero: {version}, -mcpu={CPU}.",
        "",
        "| level | family | block | shape | dots | instructions | on stack | cycles | MACs/cycle | % of peak | % of VNNI peak "
        "| bound |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        cells = (
            row.level, row.family, row.block, row.shape, row.dots, row.instructions,
            f"{row.vector_stack}+{row.other_stack}", row.cycles, row.macs_per_cycle, row.peak, row.vnni_peak, row.bound,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS)
    parser.add_argument("--blocks", nargs="+", default=[], metavar="BLOCK", help="such as 4x1, 16x4 or dense (default: all)")
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], metavar="NxK")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tool = next((found for name in TOOLS if (found := shutil.which(name))), None)
    if tool is None:
        sys.exit("llvm-mca was not found; install it with: apt-get install llvm")
    rows = []
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        for isa in (ISAS[name] for name in args.levels):
            rows += [analyse(tool, isa, storage, n, k) for storage in ways(isa, args.blocks)]
    about = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"LLVM version \S+", about)
    print(markdown(rows, f"llvm-mca of {version[0] if version else 'an unknown version'}"))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main()
