"""The parent's side of a worker: start it, ask it, and keep it stopped while others have their turn."""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.table import ROOT, WORK, Peer

_PATIENCE = 900.0  # seconds for one answer; loading may compile
_SLICE = 0.25  # seconds of timed calls that a turn aims at
_MOST_CALLS = 10  # timed calls of a turn at most
_LEAST_ROUNDS = 3

_ENVIRONMENT = {
    "NM_DISABLE_ANALYTICS": "1",  # DeepSparse would report its use
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor"),
    "PYTHONWARNINGS": "ignore",
}


class WorkerError(Exception):
    """A worker failed; the message is one line."""


class Worker:
    """A peer in a process of its own, pinned to `cpus`, on as many threads; to be closed.

    It runs only while it has something to do: in between it is stopped by a signal, so that threads that wait busily take
    nothing from the engine whose turn it is.
    """

    def __init__(self, peer: Peer, model: Path, cpus: tuple[int, ...]) -> None:
        """Start it and wait until the model is loaded. Raises WorkerError, and FileNotFoundError without an environment."""
        self.peer = peer
        arguments = [peer.adapter, str(model), str(len(cpus)), ",".join(map(str, cpus))]
        threads = {"OMP_NUM_THREADS": str(len(cpus)), "TVM_NUM_THREADS": str(len(cpus))}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            [peer.python(), "-m", "benchmarks.peers.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=ROOT,
            env=os.environ | _ENVIRONMENT | threads,
        )
        try:
            self.versions: dict[str, str] = self._answer()["versions"]
        except BaseException:
            self.close()
            raise

    def work(self, inputs: Path) -> list[float]:
        """Take on the inputs of an .npz file (see `worker`); returns the first one's start logits."""
        return list(self._ask({"work": str(inputs)})["output"])

    def run(self, items: list[int]) -> list[float]:
        """Seconds that each of `items` of the work took."""
        return list(self._ask({"run": items})["seconds"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._reason()) from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        received, pipe, end = b"", self._process.stdout.fileno(), time.monotonic() + _PATIENCE
        while not received.endswith(b"\n"):
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise WorkerError(f"no answer within {_PATIENCE:.0f} s")
            part = os.read(pipe, 1 << 16)
            if not part:
                raise WorkerError(self._reason())
            received += part
        self._process.send_signal(signal.SIGSTOP)
        # the signal alone only asks for it
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        found: dict[str, Any] = json.loads(received)
        if "error" in found:
            raise WorkerError(" ".join(str(found["error"]).split())[:300])
        return found

    def _reason(self) -> str:
        """Why the process ended, in a line."""
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines() or [""]
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return f"{how}; {lines[-1].strip()[:200]}"


def take_turns(workers: Mapping[str, Worker], seconds: float, failed: Callable[[str, str], None]) -> dict[str, list[float]]:
    """Seconds of a call of item 0 of each worker's work: for each name a median for every round it took part in.

    A round gives every worker one turn: an untimed call, which brings its weights back into the caches, and timed ones.
    Rounds go on until there were three of them and `seconds` for each worker have passed. A worker that fails is told to
    `failed(name, reason)` and left out.
    """
    rounds: dict[str, list[float]] = {name: [] for name in workers}
    end = time.monotonic() + seconds * len(workers)
    done = 0
    while done < _LEAST_ROUNDS or time.monotonic() < end:
        for name in list(rounds):
            limit = workers[name].peer.rounds
            if limit is not None and done >= limit:
                continue
            calls = 1 if not rounds[name] else max(1, min(_MOST_CALLS, round(_SLICE / rounds[name][-1])))
            try:
                times = workers[name].run([0] * (calls + (limit is None)))
            except WorkerError as error:
                failed(name, str(error))
                del rounds[name]
                continue
            rounds[name].append(statistics.median(times[-calls:]))
        done += 1
    return rounds
