"""Requests to a server on this machine, from as many clients as wanted, and what they took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit


class Connection:
    """One HTTP connection that is kept open; it does as little as can be, since it shares the cores with the server."""

    def __init__(self, url: str) -> None:
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, bytes]:
        """Status and body of the reply; raises OSError and asyncio.IncompleteReadError where the connection ends."""
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
        return await self.exchange(head.encode() + body)

    async def get(self, path: str) -> tuple[int, bytes]:
        """As `post`."""
        return await self.exchange(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())

    async def exchange(self, request: bytes) -> tuple[int, bytes]:
        """Send the bytes of a request and read the reply."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        try:
            writer.write(request)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
            body = await reader.readexactly(int(fields.get(b"content-length", 0)))
        except BaseException:
            self.close()
            raise
        if fields.get(b"connection") == b"close":
            self.close()
        return int(head.split(b" ", 2)[1]), body

    def close(self) -> None:
        """The next request opens another connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


@dataclass
class Load:
    """Seconds of each request that was answered with 200, how many were answered otherwise, and how long all took."""

    seconds: list[float] = field(default_factory=list)
    others: int = 0
    elapsed: float = 0.0


async def closed_loop(url: str, path: str, bodies: Iterator[bytes], clients: int, duration: float) -> Load:
    """`clients` that each send the next of `bodies` when the last is answered, for `duration` seconds."""
    load, began = Load(), time.perf_counter()

    async def client() -> None:
        connection = Connection(url)
        while (start := time.perf_counter()) < began + duration:
            status, _ = await connection.post(path, next(bodies))
            if status == 200:
                load.seconds.append(time.perf_counter() - start)
            else:
                load.others += 1
        connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    load.elapsed = time.perf_counter() - began
    return load
