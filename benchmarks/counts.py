"""What the instructions of one call are spent on: counted, not timed, so that another machine or another run tells the same.

python -m benchmarks.counts build/quickstart/minilm.tw --shapes 1x128 1x384

A call on one thread runs under Valgrind's callgrind, after loading and a first call that are not counted. Every instruction of
the module is looked up in its disassembly: its symbol tells the kernel, its text the class. Valgrind knows no AVX-512, so the
level is avx2. `product loops` are a kernel's innermost loops of dot products without floating-point arithmetic; their loads,
indices and interleaving count with them. `rest` is what surrounds them: epilogue, LayerNorm, softmax, addresses. `per product`
is instructions for each dot product of the kernel's product loops. `around the kernels` is Python, TVM's runtime and
the C library, also where kernels call them. Instructions are not time: some take longer than others, and may wait for memory.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import tilewright
from benchmarks.machine import machine
from tilewright.artifact import open_artifact
from tilewright.cpu import choose_level, cpu_features
from tilewright.errors import TilewrightError
from tilewright.measure import random_ids

LEVEL = "avx2"
DOT, SCALAR = "dot products", "scalar"
CLASSES = {
    DOT: r"vpmadd(wd|ubsw) ",
    "vector loads and stores": r"vp?(mov|broadcast|ext|gather|mask)\w* .*\(",
    "shuffles and moves": r"vp?(mov|broadcast|ext|ins|unpck|shuf|perm|ack|blend|alignr)",
    "other vector": r"v(?!zero)",
    "branches": r"(j\w+|call|ret)\b",
    SCALAR: r"",
}
"""The first pattern with which an instruction begins, in AT&T syntax, tells its class. A memory operand of arithmetic or of a
shuffle does not make a load of it; indices and addresses are scalar."""
LOOPS, REST, AROUND = "product loops", "rest", "around the kernels"

_SYMBOL = re.compile(r"[0-9a-f]+ <(.+)>:")
_KERNEL = re.compile(r"(?:__tvm_ffi_)?(?!__|shape_func)(\w+?)(?:_\d+)?(?:_compute_)?")
_CODE = re.compile(r"\s+([0-9a-f]+):\s+(.+)")
_BACK = re.compile(r"j\w+ ([0-9a-f]+) ")
_FLOAT = re.compile(r"v(add|sub|mul|fn?m\w+|cvt)\w*[ps]s ")
_MARKS = """#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void stop(void) { CALLGRIND_DUMP_STATS; CALLGRIND_STOP_INSTRUMENTATION; }
"""

Code = dict[int, tuple[str, str]]
"""Kernel and text of the instruction at each address of a module."""
Table = Counter[tuple[str, str, str]]
"""Instructions executed by kernel, part and class."""


def disassembly(text: str) -> Code:
    """The kernels' instructions in what objdump prints.

    The body of a parallel loop has no symbol. It stands behind the kernel that launches it, before the next symbol.
    `down_2` and the like are further shapes or epilogues of a kernel, and count with it.
    """
    code, kernel = {}, None
    for line in text.splitlines():
        if symbol := _SYMBOL.match(line):
            kernel = _KERNEL.fullmatch(symbol[1])
        elif kernel and (found := _CODE.match(line)):
            code[int(found[1], 16)] = kernel[1], " ".join(found[2].split())
    return code


def classify(instruction: str) -> str:
    return next(name for name, pattern in CLASSES.items() if re.match(pattern, instruction))


def product_loops(code: Code) -> set[int]:
    """Addresses of the instructions in product loops."""
    loops = []
    for end, (kernel, text) in code.items():
        if (jump := _BACK.match(text)) and code.get(start := int(jump[1], 16), ("",))[0] == kernel and start < end:
            body = {address for address in range(start, end + 1) if address in code}
            texts = [code[address][1] for address in body]
            if any(classify(text) == DOT for text in texts) and not any(map(_FLOAT.match, texts)):
                loops.append(body)
    return set().union(*(loop for loop in loops if not any(other < loop for other in loops)))


def executions(profile: str) -> Counter[tuple[str, int]]:
    """Executions by object file and address in callgrind's profile of instructions, nothing in it compressed."""
    counts: Counter[tuple[str, int]] = Counter()
    lines, place = iter(profile.splitlines()), ""
    for line in lines:
        if line.startswith("ob="):
            place = line[3:]
        elif line.startswith("calls="):
            next(lines)  # what was executed in the function called, which is listed there, too
        elif line.startswith("0x"):
            address, _, count = line.split()
            counts[place, int(address, 16)] += int(count)
    return counts


def tabulate(counts: Counter[tuple[str, int]], library: str, code: Code) -> Table:
    """`counts` by what `code`, which is that of `library`, says of them."""
    table, loops = Table(), product_loops(code)
    for (place, address), count in counts.items():
        if place == library and address in code:
            kernel, text = code[address]
            table[kernel, LOOPS if address in loops else REST, classify(text)] += count
        else:
            table[AROUND, "", ""] += count
    return table


def markdown(table: Table) -> str:
    """The table of one shape, kernels of most instructions first; classes in percent of their row."""
    parts: Counter[tuple[str, str]] = Counter()
    kernels: Counter[str] = Counter()
    for (kernel, part, _), count in table.items():
        parts[kernel, part] += count
        kernels[kernel] += count
    lines = [" | ".join(("| kernel | part | instructions | share | per product", *CLASSES)) + " |"]
    lines.append("|---|---|" + "--:|" * (3 + len(CLASSES)))
    for kernel, part in sorted(parts, key=lambda row: (row[0] == AROUND, -kernels[row[0]], row)):
        count, products = parts[kernel, part], table[kernel, LOOPS, DOT]
        cells = [kernel, part, f"{count:,}", f"{count / table.total():.1%}", f"{count / products:.2f}" if products else ""]
        cells += [f"{table[kernel, part, name] / count:.1%}" if part else "" for name in CLASSES]
        lines.append("| " + " | ".join(cells) + " |")
    sums = (sum(count for key, count in table.items() if key[2] == name) for name in CLASSES)
    shares = (f"{count / table.total():.1%}" for count in sums)
    return "\n".join([*lines, " | ".join(("| all", "", f"{table.total():,}", "", "", *shares)) + " |"])


def calls(artifact: str, marks: str, *shapes: str) -> None:
    """Run in Valgrind: for each shape a call that is not counted and one that is."""
    engine, mark = tilewright.load(artifact, num_threads=1, isa=LEVEL), ctypes.CDLL(marks)
    for shape in shapes:
        ids = random_ids(engine.manifest.limits.vocab_size, *(int(n) for n in shape.split("x")))
        engine(ids)
        mark.start()
        engine(ids)
        mark.stop()


def measure(artifact: Path, shapes: Sequence[str]) -> dict[str, Table]:
    """The table of each shape. Raises TilewrightError where a tool or the level is missing."""
    for tool, package in (("valgrind", "valgrind"), ("objdump", "binutils"), ("gcc", "gcc")):
        if shutil.which(tool) is None:
            raise TilewrightError(f"{tool} was not found; install it with: apt-get install {package}")
    level = choose_level(open_artifact(artifact)[0].levels, cpu_features(), LEVEL)
    library = str((artifact / level.library).resolve())
    with tempfile.TemporaryDirectory() as scratch:
        marks, out = Path(scratch, "marks.so"), Path(scratch, "out")
        _run("gcc", "-shared", "-fPIC", "-xc", "-", "-o", marks, text=_MARKS)
        options = ["--tool=callgrind", "--instr-atstart=no", "--dump-instr=yes", "--compress-strings=no", "--compress-pos=no"]
        program = "import sys; from benchmarks.counts import calls; calls(*sys.argv[1:])"
        _run("valgrind", *options, f"--callgrind-out-file={out}", sys.executable, "-c", program, artifact, marks, *shapes)
        profiles = [out.with_name(f"out.{part}").read_text() for part in range(1, 1 + len(shapes))]
    code = disassembly(_run("objdump", "-d", "--no-show-raw-insn", library))
    return {shape: tabulate(executions(profile), library, code) for shape, profile in zip(shapes, profiles, strict=True)}


def _run(*command: str | Path, text: str = "") -> str:
    """What `command` prints."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [f"exit status {done.returncode}", *done.stderr.splitlines()]
        raise TilewrightError(f"{command[0]} failed: {next((line for line in reversed(said) if 'rror' in line), said[-1])}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["1x128"], metavar="BATCHxLENGTH")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        tables = measure(args.artifact, args.shapes)
        about = machine() | {"valgrind": _run("valgrind", "--version").strip()}
    except TilewrightError as error:
        sys.exit(str(error))
    print("\n".join(f"- {key}: {value}" for key, value in about.items()))
    for shape, table in tables.items():
        print(f"\n{args.artifact.name}, {shape}:\n\n{markdown(table)}")
    if args.json:
        rows = {shape: [(*key, count) for key, count in table.items()] for shape, table in tables.items()}
        args.json.write_text(json.dumps({"machine": about, "shapes": rows}, indent=2))


if __name__ == "__main__":
    main()
