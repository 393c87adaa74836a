"""A server under minutes of mixed requests, valid and hostile, while its instances are killed.

python -m tests.soak ARTIFACT [--minutes 30] [--instances 2] [--kill-every 20]

ARTIFACT holds an embedding model with a tokenizer. Fails unless every valid request was answered with what the engine gives, to
the bit, no hostile one with a 5xx, every instance that was killed was replaced, and memory stayed flat.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import tilewright
from benchmarks.http_load import Connection
from tests import served
from tests.test_serving_hostile import ENDPOINTS, HOSTILE
from tests.test_throughput import instances_of

_CLIENTS, _HOSTILE_CLIENTS = 6, 2
_SAMPLE = 2.0  # seconds between looks at memory
_GROWTH = 1.05  # of the last quarter over the second, which has everything loaded
_RAW = (
    b"\0\1\2\3\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    b"POST /embed HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
    b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
)
"""Requests that are none, or that end in the middle."""


@dataclass
class Seen:
    """What happened: statuses by kind of request, complaints, resident bytes over time, and instances killed."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    killed: int = 0


class Soak:
    """One run."""

    def __init__(self, running: served.Running, artifact: Path, end: float) -> None:
        self.seen = Seen()
        self._running, self._end, self._random = running, end, random.Random(0)
        engine = tilewright.load(artifact, num_threads=1)
        words = ["river", "7", "Paris", "the", "of", "quantised", "a", "résumé", "木", "?", "\u200d", "where", "unbelievable"]
        self._texts = [" ".join(self._random.choices(words, k=self._random.randint(1, 120))) for _ in range(300)]
        # one by one: neighbours in a batch change nothing, which is also what is tested
        self._expected = [engine(**engine.tokenize([text], truncate=True))["sentence_embedding"][0] for text in self._texts]

    async def run(self, kill_every: float) -> None:
        """Until the end."""
        await asyncio.gather(
            self._kill(kill_every),
            self._watch(),
            *(self._valid() for _ in range(_CLIENTS)),
            *(self._hostile() for _ in range(_HOSTILE_CLIENTS)),
        )

    def _goes_on(self) -> bool:
        return time.monotonic() < self._end

    async def _valid(self) -> None:
        connection = Connection(self._running.url)
        while self._goes_on():
            chosen = self._random.choices(range(len(self._texts)), k=self._random.choice((1, 1, 1, 4, 32)))
            texts = [self._texts[index] for index in chosen]
            if self._random.random() < 0.5:
                body = {"inputs": texts, "truncate": True, "normalize": False}
                status, reply = await connection.post("/embed", json.dumps(body).encode())
                found = json.loads(reply)
            else:
                body = {"input": texts, "truncate": True, "encoding_format": "base64"}
                status, reply = await connection.post("/v1/embeddings", json.dumps(body).encode())
                found = json.loads(reply)
                if status == 200:
                    found = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in found["data"]]
            self.seen.statuses["valid", status] += 1
            if status != 200:
                self.seen.wrong.append(f"a valid request got {status}: {reply[:200]!r}")
                continue
            for index, vector in zip(chosen, found, strict=True):
                expected = self._expected[index]
                if "input" in body:
                    expected = expected / np.maximum(np.linalg.norm(expected[None], axis=1, keepdims=True), 1e-12)[0]
                if not np.array_equal(np.asarray(vector, np.float32), expected):
                    self.seen.wrong.append(f"another embedding of {self._texts[index][:60]!r}")
        connection.close()

    async def _hostile(self) -> None:
        connection = Connection(self._running.url)
        while self._goes_on():
            await asyncio.sleep(0.02)
            if self._random.random() < 0.2:
                await self._garbage()
                continue
            path = self._random.choice(list(ENDPOINTS))
            try:
                status, reply = await connection.post(path, self._bad_body(path))
            except (OSError, asyncio.IncompleteReadError):  # refused before the whole body was read
                status, reply = 0, b""
            self.seen.statuses["hostile", status] += 1
            if status >= 500:
                self.seen.wrong.append(f"a hostile request to {path} got {status}: {reply[:200]!r}")
        connection.close()

    def _bad_body(self, path: str) -> bytes:
        kind = self._random.randrange(4)
        if kind == 0:
            return self._random.choice(list(HOSTILE.values()))
        if kind == 1:
            return b" " * 3_000_000
        body = bytearray(json.dumps(ENDPOINTS[path]).encode())
        for _ in range(self._random.randint(1, 4)):
            start = self._random.randrange(len(body))
            body[start : start + self._random.randint(0, 3)] = self._random.randbytes(self._random.randint(0, 3))
        return bytes(body)

    async def _garbage(self) -> None:
        """Bytes that are no request, and a connection that ends without waiting."""
        connection = Connection(self._running.url)
        try:
            await asyncio.wait_for(connection.exchange(self._random.choice(_RAW)), 0.2)
        except (OSError, ValueError, asyncio.IncompleteReadError, TimeoutError):
            pass
        finally:
            connection.close()

    async def _kill(self, every: float) -> None:
        while self._goes_on():
            await asyncio.sleep(every)
            if instances := instances_of(self._running.process.pid):
                os.kill(self._random.choice(instances), signal.SIGKILL)
                self.seen.killed += 1

    async def _watch(self) -> None:
        while self._goes_on():
            await asyncio.sleep(_SAMPLE)
            pids = [self._running.process.pid, *instances_of(self._running.process.pid)]
            try:
                self.seen.memory.append(sum(resident(pid) for pid in pids))
            except (OSError, ValueError):  # one has just been killed
                continue


def resident(pid: int) -> int:
    """Bytes in memory, shared pages divided among those that share them."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("Pss:")).split()[1]) * 1024


def verdict(seen: Seen, restarts: float) -> list[str]:
    """What is wrong."""
    problems = seen.wrong[:5]
    if restarts < seen.killed:
        problems.append(f"{seen.killed} instances were killed, {restarts:g} replaced")
    quarter = len(seen.memory) // 4
    early, late = np.median(seen.memory[quarter : 2 * quarter]), np.median(seen.memory[-quarter:])
    if late > early * _GROWTH:
        problems.append(f"memory grew from {early / 1e6:.1f} to {late / 1e6:.1f} MB")
    return problems


async def restarts_of(url: str, wanted: int) -> float:
    """Instances that were started again, when there are as many as `wanted` or 30 seconds have passed."""
    found, connection = 0.0, Connection(url)
    for _ in range(60):
        _, text = await connection.get("/metrics")
        lines = [line for line in text.decode().splitlines() if line.startswith("tilewright_instance_restarts_total")]
        found = sum(float(line.rpartition(" ")[2]) for line in lines)
        if found >= wanted:
            break
        await asyncio.sleep(0.5)
    connection.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--kill-every", type=float, default=20.0, help="seconds")
    given = parser.parse_args()
    with served.process(given.artifact, "--instances", str(given.instances), "--timeout", "20") as running:
        soak = Soak(running, given.artifact, time.monotonic() + 60 * given.minutes)
        asyncio.run(soak.run(given.kill_every))
        seen = soak.seen
        restarts = asyncio.run(restarts_of(running.url, seen.killed))
        running.process.send_signal(signal.SIGTERM)
        ended = running.process.wait(timeout=60)
    problems = verdict(seen, restarts) + ([f"the server ended with {ended}"] if ended else [])
    for (kind, status), count in sorted(seen.statuses.items()):
        print(f"{kind} requests answered with {status or 'a closed connection'}: {count}")
    print(f"instances killed: {seen.killed}, started again: {restarts:g}")
    sizes = [f"{size / 1e6:.0f}" for size in seen.memory[:: max(1, len(seen.memory) // 12)]]
    print(f"memory of all processes, MB: {' '.join(sizes)}")
    print("\n".join(f"WRONG: {problem}" for problem in problems) or "all well")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
