"""Ways to run a model: what is shipped, from the start of the process to the first result, and the memory that takes.

python -m benchmarks.deployment

Compiles the model as an artifact, a shared library, an archive, and an archive for musl; builds `examples/c/embed.c` on each;
and starts each program `--runs` times, one after the other, on one thread. The first result is the embedding of one short text.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.machine import machine
from tilewright.codegen.library import Library, runtime_sources
from tilewright.compiler import compile
from tilewright.runtime import LIBRARY

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/c/embed.c"
TEXTS = ["A man is eating food from the market near his house."] * 64  # more output than a pipe holds: the program waits
MUSL = (sys.executable, "-m", "ziglang", "cc", "--target=x86_64-linux-musl")
PYTHON = """\
import sys, tilewright
engine = tilewright.load(sys.argv[1], num_threads=1)
for text in sys.argv[2:]:
    print(*engine(**engine.tokenize([text]))["sentence_embedding"][0].tolist(), flush=True)
"""


@dataclass(frozen=True)
class Way:
    """A program that embeds texts, and the bytes that are shipped: of its own, and beside it for the model."""

    name: str
    command: tuple[str, ...]
    code: int
    model: int


def ways(model: Path, target: str, directory: Path) -> Iterator[Way]:
    """Each way to run `model`, compiled for `target`."""
    artifact = compile(model, target, directory / "model.tw").path
    yield Way("Python", (sys.executable, "-c", PYTHON, str(artifact)), installed("tilewright"), size(artifact))

    source = directory / "artifact.c"  # the same program: only the prefix is another
    text = EXAMPLE.read_text("utf-8").replace("minilm.h", "tilewright.h")
    source.write_text(text.replace("minilm_", "tilewright_").replace("MINILM_", "TILEWRIGHT_"))
    program = directory / "artifact"
    run("gcc", "-O2", f"-I{runtime_sources()}", source, "-o", program, LIBRARY, f"-Wl,-rpath,{LIBRARY.parent}")
    yield Way("C, artifact", (str(program), str(artifact)), size(LIBRARY), size(artifact))

    libraries: tuple[tuple[str, Library, tuple[str, ...]], ...] = (
        ("C, c-library", Library("c-library", "minilm"), ("gcc",)),
        ("C, c-library, weights embedded", Library("c-library", "minilm", embed_weights=True), ("gcc",)),
        ("C, static", Library("static", "minilm"), ("gcc",)),
        ("C, static, musl, one file", Library("static", "minilm", embed_weights=True), (*MUSL, "-static")),
    )
    for number, (name, library, compiler) in enumerate(libraries):
        os.environ["CC"] = shlex.join(part for part in compiler if part != "-static")
        place = compile(model, target, directory / str(number), library=library).path
        program = directory / f"program-{number}"
        run(
            *compiler,
            "-O2",
            f"-I{place}",
            EXAMPLE,
            "-o",
            program,
            f"-L{place}",
            f"-Wl,-rpath,{place}",
            "-lminilm",
            "-lm",
            "-pthread",
        )
        run("strip", program)
        weights = place / "minilm.safetensors"
        shared = place / "libminilm.so"
        code = size(program) + (size(shared) if shared.exists() else 0)
        beside = size(weights) if weights.exists() else 0
        yield Way(name, (str(program), str(weights) if beside else ""), code, beside)


def size(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def installed(package: str) -> int:
    """Bytes of an installed package with all that it requires, byte code aside."""
    found: set[str] = set()
    todo = [package]
    total = 0
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        found.add(name)
        each = distribution(name)
        files = (Path(str(file.locate())) for file in each.files or [])
        total += sum(file.stat().st_size for file in files if file.suffix != ".pyc" and file.is_file())
        required = map(Requirement, each.requires or [])
        todo += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return total


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True)


def start(way: Way) -> tuple[float, float]:
    """Milliseconds to the first result, and the most megabytes resident until a while after it."""
    begin = time.perf_counter()
    process = subprocess.Popen([*way.command, *TEXTS], stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    milliseconds = (time.perf_counter() - begin) * 1e3
    time.sleep(0.1)  # it fills the pipe and waits
    status = Path(f"/proc/{process.pid}/status").read_text()
    process.kill()
    process.communicate()
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return milliseconds, int(peak) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models/minilm-l6-80-4x1", help="INT8 embedding model")
    parser.add_argument("--target", default="native")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        found = list(ways(args.model, args.target, Path(scratch)))
        samples: dict[str, list[tuple[float, float]]] = {way.name: [] for way in found}
        for _ in range(args.runs):
            for way in found:
                samples[way.name].append(start(way))
        for way in found:
            milliseconds, resident = (statistics.median(values) for values in zip(*samples[way.name], strict=True))
            sizes = {"code_mb": way.code / 1e6, "model_mb": way.model / 1e6}
            rows.append({"way": way.name, **sizes, "first_result_ms": milliseconds, "resident_mb": resident})
    if args.json:
        print(json.dumps({"machine": machine(), "model": args.model.name, "ways": rows}))
        return
    print("| way | code MB | model MB | first result ms | resident MB |\n|---|--:|--:|--:|--:|")
    for row in rows:
        numbers = (row["code_mb"], row["model_mb"], row["first_result_ms"], row["resident_mb"])
        print(f"| {row['way']} |", " | ".join(f"{number:.3g}" for number in numbers), "|")


if __name__ == "__main__":
    main()
