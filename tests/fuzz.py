"""Long runs of hostile inputs: each case must end in a right answer or in a one-line TilewrightError.

    python -m tests.fuzz [KIND ...] [--cases 1000] [--first 0] [--json]

A case is a kind and a number, from which everything about it follows: `--first N --cases 1` runs one again. Cases run in a
process of their own, which may crash or hang without ending the run; `docs/reliability.md` has the counts of long runs.
"""

from __future__ import annotations

import argparse
import json
import select
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests import fuzz_files, fuzz_onnx, tiny, toy
from tilewright.commands.output import progress_bar

Case = Callable[[Random], str]
"""Runs a case: "answered" or "refused"; an AssertionError is a wrong answer, any other exception a traceback."""

SECONDS = 120  # after which a case counts as hanging


def onnx_graphs(directory: Path) -> Case:
    """Mutated ONNX graphs of three encoders, float, QDQ and dynamic."""
    bases = fuzz_onnx.bases(directory)

    def run(random: Random) -> str:
        path = directory / "mutated.onnx"
        path.write_bytes(fuzz_onnx.mutated(random.choice(bases), random))
        return fuzz_onnx.judge(path)

    return run


def checkpoints(directory: Path) -> Case:
    """config.json and tokenizer.json of a Hugging Face directory, mutated."""
    source = tiny.save(tiny.build("BertForTokenClassification"), directory / "source")
    return lambda random: fuzz_files.judge_checkpoint(source, random.choice(fuzz_files.MUTATED), directory / "mutated", random)


def manifests(directory: Path) -> Case:
    """manifest.json of an artifact, mutated and mostly signed again."""
    source = toy.write(directory / "toy.tw", toy.build_library(directory / "toy.so"))
    return lambda random: fuzz_files.judge_manifest(source, directory / "mutated.tw", random)


FUZZERS: Mapping[str, Callable[[Path], Case]] = {"onnx": onnx_graphs, "checkpoints": checkpoints, "manifests": manifests}
"""By kind: from an empty directory, in which it may keep what its cases share, to what runs them."""


@dataclass
class Result:
    """How often cases of a kind ended how, and what each failure was."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)


def fuzz(kind: str, first: int, count: int, progress: Callable[[int, int], None] = lambda done, total: None) -> Result:
    """Run `count` cases of `kind` from number `first` on, in as many processes as crashes and hangs make necessary."""
    result, number = Result(), first
    while number < first + count:
        command = [sys.executable, "-m", "tests.fuzz", kind, "--worker", "--first", str(number)]
        command += ["--cases", str(first + count - number)]
        # unbuffered: a line that waits in a buffer would make its case look like one that hangs
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as worker:
            assert worker.stdout is not None
            worker.stdout.readline()  # what cases share is made, however long a busy machine takes for it
            while number < first + count:
                ready, _, _ = select.select([worker.stdout], [], [], SECONDS)
                line = worker.stdout.readline() if ready else b""
                if not line:
                    worker.kill()
                    end, detail = ("crashed", f"exit status {worker.wait()}") if ready else ("hung", f"no end in {SECONDS} s")
                else:
                    end, detail = json.loads(line)
                result.counts[end] += 1
                if detail:
                    result.failures[number] = f"{end}: {detail}"
                number += 1
                progress(number - first, count)
                if not line:
                    break
    return result


def work(kind: str, first: int, count: int) -> None:
    """Run cases in this process, a line of JSON for the end of each."""
    lines = sys.stdout
    sys.stdout = sys.stderr
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        run = FUZZERS[kind](Path(directory))
        print(json.dumps("ready"), file=lines, flush=True)
        for number in range(first, first + count):
            try:
                end = (run(Random(number)), "")
            except AssertionError as error:
                end = ("wrong", " ".join(str(error).split()))
            except Exception:
                end = ("traceback", " | ".join(traceback.format_exc().strip().splitlines()[-3:]))
            print(json.dumps(end), file=lines, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run hostile inputs; each must be answered right or refused in one line.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(FUZZERS)}; all if none is given")
    parser.add_argument("--cases", type=int, default=1000, help="cases of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [kind for kind in options.kinds if kind not in FUZZERS]
    if unknown:
        parser.error(f"unknown kind {unknown[0]}; choose of {', '.join(FUZZERS)}")
    if options.worker:
        work(options.kinds[0], options.first, options.cases)
        return
    results = {}
    for kind in options.kinds or FUZZERS:
        with progress_bar(kind) as progress:
            results[kind] = fuzz(kind, options.first, options.cases, progress)
    if options.json:
        print(json.dumps({k: {"counts": r.counts, "failures": r.failures} for k, r in results.items()}, indent=2))
    else:
        for kind, result in results.items():
            print(f"{kind}: {', '.join(f'{count} {end}' for end, count in sorted(result.counts.items()))}")
            for number, failure in result.failures.items():
                print(f"  {number}: {failure}")
    sys.exit(any(result.failures for result in results.values()))


if __name__ == "__main__":
    main()
