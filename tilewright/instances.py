"""Instances of one artifact: processes, each on cores of its own, that run at the same time and share the mapped weights.

An instance is a fresh interpreter rather than a copy of this process, so that its memory is what serving takes. Requests
and replies are pickled over a socket. The end of either process closes the socket, which the other notices: an instance
that dies is an error here, and instances do not outlive this process.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.errors import TilewrightError
from tilewright.manifest import WEIGHTS, Manifest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tilewright.engine import Engine

    Arrays = Mapping[str, NDArray[np.generic]]

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


@dataclass(frozen=True)
class Launch:
    """What an instance loads: an artifact, its level (as `tilewright.load` takes it), threads, the cores to stay on if any.

    load: called in the instance as `load_engine` is; another may load what is called as an `Engine` is.
    """

    artifact: Path
    isa: str | None = None
    threads: int = 1
    cores: tuple[int, ...] = ()
    load: Callable[[Launch], Any] | None = None


class InstanceDied(TilewrightError):
    """An instance ended while it was needed; the message says how."""


class Instance:
    """A process that runs one engine. Requests are answered one after the other; not safe for concurrent calls."""

    def __init__(self, launch: Launch) -> None:
        """Start to load; the first reply is None when it has, or raises what loading raises."""
        self._connection, theirs = Pipe()
        self.lifeline, held = os.pipe()
        """A descriptor that becomes readable when the process has ended; event loops may make what they watch non-blocking."""
        code = f"from tilewright.instances import serve; serve({theirs.fileno()})"
        # a process group of its own: Ctrl-C is for this process, which then ends the instances
        command = [sys.executable, "-P", "-c", code]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno(), held], process_group=0)
        theirs.close()
        os.close(held)
        try:
            self.send(launch.cores)
            self.send(launch)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> Any:
        """The reply to a request; raises InstanceDied."""
        self.send((method, arguments))
        return self.reply()

    def send(self, message: object) -> None:
        """Send a request without waiting for its reply; raises InstanceDied."""
        try:
            self._connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death() from None

    def reply(self) -> Any:
        """The next reply; raises InstanceDied, and the TilewrightError that is the reply."""
        try:
            reply = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if isinstance(reply, TilewrightError):
            raise reply
        return reply

    def kill(self) -> None:
        """End the process at once, from any thread; a call under way raises InstanceDied."""
        self._process.kill()

    def close(self) -> None:
        """End the process and wait for its end."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        os.close(self.lifeline)

    def _death(self) -> InstanceDied:
        status = self._process.wait()
        return InstanceDied(f"was killed by signal {-status}" if status < 0 else f"ended with status {status}")


class Instances:
    """Running instances of the artifact at `artifact`; a context manager that ends them."""

    def __init__(self, artifact: Path, isa: str | None = None) -> None:
        """`isa`: as `tilewright.load` takes it."""
        self._artifact, self._isa = artifact, isa
        self._running: list[Instance] = []

    def __enter__(self) -> Instances:
        return self

    def __exit__(self, *_: object) -> None:
        for instance in self._running:
            instance.kill()  # all, before waiting for one
        for instance in self._running:
            instance.close()

    @property
    def pids(self) -> list[int]:
        """Process ids, in the order in which the instances were started."""
        return [instance.pid for instance in self._running]

    def start(self, cores: Sequence[Sequence[int]]) -> None:
        """Start one more instance for each element of `cores`, with a thread on each of them; raises what `load` does."""
        before = len(self._running)
        for own in cores:
            self._running.append(Instance(Launch(self._artifact, self._isa, len(own), tuple(own))))
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
            self._on(number, lambda instance: instance.send((method, arguments)))
        return self._replies(range(count))

    def _replies(self, numbers: range) -> list[Any]:
        return [self._on(number, Instance.reply) for number in numbers]

    def _on(self, number: int, do: Callable[[Instance], Any]) -> Any:
        try:
            return do(self._running[number])
        except InstanceDied as death:
            raise TilewrightError(
                f"instance {number + 1} of {len(self._running)} {death} while it was needed; "
                "if memory ran out, allow fewer cores or a smaller batch"
            ) from None


def load_engine(launch: Launch) -> Engine:
    """What an instance loads unless told otherwise."""
    from tilewright.engine import load

    return load(launch.artifact, launch.threads, launch.isa)


def serve(descriptor: int) -> None:
    """The life of an instance, which talks over the socket `descriptor`."""
    # systemd and others signal every process of a service, but what this one has begun is to be finished: its parent ends it
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    connection = Connection(descriptor)
    try:
        if cores := connection.recv():
            os.sched_setaffinity(0, cores)  # before any library starts threads
        launch: Launch = connection.recv()
        instance = _Instance((launch.load or load_engine)(launch))
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

    def manifest(self) -> Manifest:
        """Of what was loaded."""
        manifest: Manifest = self._engine.manifest
        return manifest

    def run(self, sequences: Sequence[Arrays], names: Sequence[str]) -> tuple[list[Arrays], float]:
        """The outputs `names` of each sequence, and the seconds of the call.

        A sequence's inputs are i32[tokens] by name, without a mask; its outputs f32[tokens, ...] or f32[...].
        """
        import numpy as np

        lengths = [len(sequence["input_ids"]) for sequence in sequences]
        shape = len(sequences), max(lengths)
        arrays = {name: np.zeros(shape, np.int32) for name in ("attention_mask", *sequences[0])}
        for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            arrays["attention_mask"][row, :length] = 1
            for name, values in sequence.items():
                arrays[name][row, :length] = values
        start = time.perf_counter()
        outputs = self._engine(**arrays)
        seconds = time.perf_counter() - start
        per = {output.name: output.per for output in self._engine.manifest.outputs}
        return [
            {name: outputs[name][row, :length] if per[name] == "token" else outputs[name][row] for name in names}
            for row, length in enumerate(lengths)
        ], seconds

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
