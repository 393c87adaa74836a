"""Toy models with each kind of head, and servers of them, for tests of `tilewright serve`."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from tests import toy
from tilewright.instances import Launch
from tilewright.manifest import Head, Manifest, Output
from tilewright.serving.app import create_app
from tilewright.serving.settings import Service, Settings

TAGS = tuple(f"T{i}" for i in range(toy.WIDTH))
CLASSES = tuple(f"C{i}" for i in range(toy.WIDTH))

_SCORE, _WIDE = Output("score", "token", 1, squeeze=True), Output("hidden", "token", toy.WIDTH)
_NARROW = Output("hidden", "token", 1, squeeze=True)
MODELS: dict[str, Manifest] = {
    "embed": toy.served(Head("embedding", pooling="mean"), _WIDE, _SCORE, Output("sentence_embedding", "sequence", toy.WIDTH)),
    "tag": toy.served(
        Head("token_classification"),
        Output("logits", "token", toy.WIDTH),
        _SCORE,
        Output("total", "sequence", toy.WIDTH),
        labels=TAGS,
    ),
    "classes": toy.served(
        Head("sequence_classification", problem_type="single_label_classification"),
        _WIDE,
        _SCORE,
        Output("logits", "sequence", toy.WIDTH),
        labels=CLASSES,
    ),
    "answer": toy.served(
        Head("question_answering"),
        Output("start_logits", "token", 1, squeeze=True),
        Output("end_logits", "token", 1, squeeze=True),
        Output("total", "sequence", 1),
    ),
    "cross": toy.served(
        Head("sequence_classification", problem_type="regression"), _NARROW, _SCORE, Output("logits", "sequence", 1)
    ),
}


def write_models(root: Path, wide: Path) -> dict[str, Path]:
    """An artifact of each of MODELS; `wide` is the library of the toy as it is."""
    narrow = toy.build_library(root / "narrow.so", width=1)
    return {
        name: toy.write(root / f"{name}.tw", wide if manifest.outputs[0].width > 1 else narrow, manifest)
        for name, manifest in MODELS.items()
    }


@contextmanager
def client(
    models: dict[str, Path],
    instances: int = 1,
    settings: Settings | None = None,
    load: Callable[[Launch], Any] | None = None,
) -> Iterator[TestClient]:
    """A client of an application in this process; its instances are processes."""
    services = [Service(name, Launch(path, load=load), instances, batch_tokens=64) for name, path in models.items()]
    with TestClient(create_app(services, settings or Settings()), raise_server_exceptions=False) as made:
        yield made


def pids(served: TestClient, model: str) -> list[int]:
    """Of the model's instances."""
    found: list[int] = served.app.state.models[model].pool.pids
    return found


def metric(served: TestClient, name: str) -> float:
    """The sum over all series called `name`."""
    lines = served.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if re.split(r"[{ ]", line)[0] == name)


@dataclass(frozen=True)
class Running:
    """A server process and where it listens."""

    process: subprocess.Popen[bytes]
    url: str


@contextmanager
def process(*arguments: str | Path) -> Iterator[Running]:
    """`tilewright serve` on a free port, ready."""
    command = [sys.executable, "-m", "tilewright", "serve", "--port", "0", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as log:  # not a pipe, which would stop the server when it is full
        running = subprocess.Popen(command, stderr=log)

        def said() -> str:
            log.seek(0)
            return log.read()

        try:
            until(lambda: re.search(r"listening on \S+\n", said()) or running.poll() is not None)
            match = re.search(r"listening on (\S+)\n", said())
            assert match, said()
            yield Running(running, match[1])
        finally:
            running.kill()
            running.wait()
            print(said(), file=sys.stderr)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come about."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
