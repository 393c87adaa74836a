"""One engine in a process of its own: `python -m benchmarks.peers.worker ADAPTER MODEL THREADS CPUS`.

Commands come as JSON lines on stdin, answers go as JSON lines to what stdout was; whatever engines print goes to stderr.

    at the start                -> {"versions": {"onnxruntime": "1.32.0"}}
    {"work": "inputs.npz"}      -> {"output": [...]}    the file's ids0, mask0, ids1, ...; start logits of the first pair
    {"run": [0, 0, 1]}          -> {"seconds": [...]}   one for each of these items of the work, run in this order

A failure is answered {"error": "..."}. The process dies with its parent, even while it is stopped.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.adapters import ADAPTERS, Run, Shaped

_PR_SET_PDEATHSIG = 1

Item = tuple[Any, Any]


def answers(shaped: Shaped, commands: Iterable[str]) -> Iterator[dict[str, Any]]:
    """What to answer to each line of `commands`."""
    items: list[Item] = []
    calls: dict[tuple[int, int], Run] = {}
    for line in commands:
        command = json.loads(line)
        if "work" in command:
            calls.clear()
            items = _load(Path(command["work"]))
            calls.update({shape: shaped(*shape) for shape in sorted({ids.shape for ids, _ in items})})
            # the first call of a shape may compile
            outputs = [calls[ids.shape](ids, mask) for ids, mask in _first_of_each_shape(items)]
            yield {"output": np.asarray(outputs[0][0]).ravel().tolist()}
        else:
            yield {"seconds": [_timed(calls[items[i][0].shape], *items[i]) for i in command["run"]]}


def _load(path: Path) -> list[Item]:
    with np.load(path) as file:
        return [(file[f"ids{i}"], file[f"mask{i}"]) for i in range(len(file.files) // 2)]


def _first_of_each_shape(items: list[Item]) -> list[Item]:
    """The first item first."""
    return list({ids.shape: (ids, mask) for ids, mask in reversed(items)}.values())[::-1]


def _timed(run: Callable[[Any, Any], Any], ids: Any, mask: Any) -> float:
    start = time.perf_counter()
    run(ids, mask)
    return time.perf_counter() - start


def main() -> None:
    name, model, threads, cpus = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        adapter = ADAPTERS[name]
        shaped = adapter.load(Path(model), int(threads))
        print(json.dumps({"versions": {package: version(package) for package in adapter.packages}}), file=replies)
        for answer in answers(shaped, sys.stdin):
            print(json.dumps(answer), file=replies)
    except Exception as error:  # whatever an engine raises is an answer
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies)
        raise


if __name__ == "__main__":
    main()
