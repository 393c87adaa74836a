"""Instances of one artifact: processes, each on cores of its own, that run at the same time and share the mapped weights.

An instance is a fresh interpreter rather than a copy of this process, so that its memory is what serving takes. Requests
and replies are pickled over a socket. The end of either process closes the socket, which the other notices: an instance
that dies is an error here, and instances do not outlive this process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.errors import TilewrightError
from tilewright.manifest import WEIGHTS

if TYPE_CHECKING:
    from tilewright.engine import Engine

_WARMUP = 3  # calls
_LEAD = 0.02  # seconds from the request to the first call, so that it has reached every instance


@dataclass(frozen=True)
class Memory:
    """Resident bytes of one instance, from /proc/self/smaps."""

    private: int
    """Mapped by no other process."""
    proportional: int
    """Private, and of every shared page its share; sums up over processes."""
    weights: int
    """Pages of the weights file that the instance has touched."""
    weights_copied: int
    """Of these, what it has written to and therefore holds alone."""


class Instances:
    """Running instances of the artifact at `artifact`; a context manager that ends them."""

    def __init__(self, artifact: Path, isa: str | None = None) -> None:
        """`isa`: as `tilewright.load` takes it."""
        self._artifact, self._isa = artifact, isa
        self._running: list[tuple[subprocess.Popen[bytes], Connection]] = []

    def __enter__(self) -> Instances:
        return self

    def __exit__(self, *_: object) -> None:
        for process, _connection in self._running:
            process.kill()
        for process, connection in self._running:
            process.wait()
            connection.close()

    @property
    def pids(self) -> list[int]:
        """Process ids, in the order in which the instances were started."""
        return [process.pid for process, _ in self._running]

    def start(self, cores: Sequence[Sequence[int]]) -> None:
        """Start one more instance for each element of `cores`, with a thread on each of them; raises what `load` does."""
        before = len(self._running)
        for _ in cores:
            ours, theirs = Pipe()
            code = f"from tilewright.instances import serve; serve({theirs.fileno()})"
            # a process group of its own: Ctrl-C is for this process, which then ends the instances
            command = [sys.executable, "-P", "-c", code]
            self._running.append((subprocess.Popen(command, pass_fds=[theirs.fileno()], process_group=0), ours))
            theirs.close()
        for number, own in enumerate(cores, before):
            self._send(number, (self._artifact, self._isa, tuple(own)))
        self._replies(range(before, len(self._running)))

    def measure(self, count: int, batch: int, seq_len: int, duration: float) -> list[list[float]]:
        """Seconds of each call with random ids [batch, seq_len], by instance; the first `count` instances, all at once.

        All begin at the same moment and make calls until `duration` seconds later, at least one.
        """
        self._request(count, "warm", batch, seq_len)
        begin = time.monotonic() + _LEAD
        samples: list[list[float]] = self._request(count, "time", begin, begin + duration)
        return samples

    def memory(self) -> list[Memory]:
        """What each instance occupies now."""
        memory: list[Memory] = self._request(len(self._running), "memory")
        return memory

    def _request(self, count: int, method: str, *arguments: float) -> list[Any]:
        for number in range(count):
            self._send(number, (method, arguments))
        return self._replies(range(count))

    def _send(self, number: int, message: object) -> None:
        try:
            self._running[number][1].send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death(number) from None

    def _replies(self, numbers: range) -> list[Any]:
        replies = []
        for number in numbers:
            try:
                reply = self._running[number][1].recv()
            except (EOFError, ConnectionResetError):
                raise self._death(number) from None
            if isinstance(reply, TilewrightError):
                raise reply
            replies.append(reply)
        return replies

    def _death(self, number: int) -> TilewrightError:
        status = self._running[number][0].wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return TilewrightError(
            f"instance {number + 1} of {len(self._running)} {how} while it was needed; "
            "if memory ran out, allow fewer cores or a smaller batch"
        )


def serve(descriptor: int) -> None:
    """The life of an instance, which talks over the socket `descriptor`."""
    connection = Connection(descriptor)
    try:
        artifact, isa, cores = connection.recv()
        os.sched_setaffinity(0, cores)  # before any library starts threads
        sys.modules["torch"] = None  # type: ignore[assignment]  # tvm_ffi imports it where it is installed; no engine needs it
        from tilewright.engine import load

        instance = _Instance(load(artifact, len(cores), isa))
        connection.send(None)
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(instance, method)(*arguments))
    except TilewrightError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the other process ended
        pass


class _Instance:
    """What an instance does on request."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ids: Any = None

    def warm(self, batch: int, seq_len: int) -> None:
        """Set the inputs of the calls, and make some untimed."""
        from tilewright.measure import random_ids

        self._ids = random_ids(self._engine.manifest.limits.vocab_size, batch, seq_len)
        for _ in range(_WARMUP):
            self._engine(self._ids)

    def time(self, begin: float, end: float) -> list[float]:
        """Seconds of each call from `begin` to `end`, on the monotonic clock, which all processes share."""
        time.sleep(max(0.0, begin - time.monotonic()))
        samples: list[float] = []
        start = time.monotonic()
        while start < end or not samples:
            self._engine(self._ids)
            now = time.monotonic()
            samples.append(now - start)
            start = now
        return samples

    def memory(self) -> Memory:
        """Of this process."""
        total = _kilobytes(Path("/proc/self/smaps_rollup").read_text())
        maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
        weights = [_kilobytes(text) for text in maps if text.partition("\n")[0].endswith(f"/{WEIGHTS}")]
        return Memory(
            private=(total["Private_Clean"] + total["Private_Dirty"]) * 1024,
            proportional=total["Pss"] * 1024,
            weights=sum(area["Rss"] for area in weights) * 1024,
            weights_copied=sum(area["Anonymous"] for area in weights) * 1024,
        )


def _kilobytes(text: str) -> dict[str, int]:
    return {name: int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}
