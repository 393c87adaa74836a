"""Load on the server: latency and throughput of an embedding model, beside ONNX Runtime behind the same server code.

python -m benchmarks.serving ARTIFACT --onnx MODEL.onnx [--instances N] [--threads N] [--clients 1,8,32] [--duration 10]

Clients on this machine send sentences of SQuAD to /v1/embeddings, each its next when the last is answered. The servers take
turns, so that a change of the machine's speed meets both; the one whose turn it is not does nothing. Clients and servers share
the cores, so a server on a machine of its own answers more.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.assets import squad_sentences
from benchmarks.http_load import Connection, Load, closed_loop
from benchmarks.machine import machine
from tilewright.commands.output import stderr, stdout, table

_TURNS = 3
_TEXTS = 2000


@contextmanager
def server(*command: str) -> Iterator[tuple[str, int]]:
    """URL and process id of a server that is ready, of the module and arguments `command`."""
    process = subprocess.Popen([sys.executable, "-m", *command, "--port", "0"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if match := re.search(r"listening on (\S+)", line):
                yield match[1], process.pid
                return
        raise SystemExit("".join(seen))
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def bodies(texts: list[str], inputs: int) -> list[bytes]:
    """Requests of `inputs` texts each."""
    groups = [texts[first : first + inputs] for first in range(0, len(texts) - inputs + 1, inputs)]
    return [json.dumps({"input": group, "encoding_format": "base64", "truncate": True}).encode() for group in groups]


async def measure(servers: dict[str, str], requests: list[bytes], clients: int, duration: float) -> dict[str, Load]:
    """Load on each server, in turns."""
    loads = {name: Load() for name in servers}
    for _ in range(_TURNS):
        for name, url in servers.items():
            await closed_loop(url, "/v1/embeddings", itertools.cycle(requests), clients, duration / 10 / _TURNS)
            turn = await closed_loop(url, "/v1/embeddings", itertools.cycle(requests), clients, duration / _TURNS)
            load = loads[name]
            load.seconds += turn.seconds
            load.others += turn.others
            load.elapsed += turn.elapsed
    return loads


async def tokens_of(url: str, requests: list[bytes]) -> float:
    """Tokens of a request, on average."""
    connection = Connection(url)
    replies = [json.loads((await connection.post("/v1/embeddings", request))[1]) for request in requests[:100]]
    connection.close()
    return float(np.mean([reply["usage"]["total_tokens"] for reply in replies]))


def summarize(name: str, clients: int, inputs: int, load: Load) -> dict[str, Any]:
    p50, p99 = (float(value) for value in np.percentile(load.seconds, (50, 99)) * 1e3)
    rate = len(load.seconds) / load.elapsed
    return {
        "engine": name,
        "clients": clients,
        "inputs": inputs,
        "requests": len(load.seconds),
        "refused": load.others,
        "p50_ms": p50,
        "p99_ms": p99,
        "requests_per_second": rate,
        "sequences_per_second": rate * inputs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--onnx", type=Path, help="the same model as ONNX file")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--inputs", type=int, default=1, help="texts of a request")
    parser.add_argument("--duration", type=float, default=10.0, help="seconds for each server and number of clients")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    size = ["--instances", str(given.instances), "--threads", str(given.threads)]
    requests = bodies(squad_sentences(_TEXTS), given.inputs)
    rows = []
    with ExitStack() as stack, stderr().status("starting ...") as status:
        servers = {"tilewright": stack.enter_context(server("tilewright", "serve", str(given.artifact), *size))[0]}
        if given.onnx is not None:
            command = ("benchmarks.onnx_server", str(given.artifact), str(given.onnx), *size)
            servers["onnxruntime"] = stack.enter_context(server(*command))[0]
        tokens = asyncio.run(tokens_of(servers["tilewright"], requests))
        for clients in map(int, given.clients.split(",")):
            status.update(f"{clients} client(s) ...")
            loads = asyncio.run(measure(servers, requests, clients, given.duration))
            rows += [summarize(name, clients, given.inputs, load) for name, load in loads.items()]
    report = {"machine": machine(), "artifact": str(given.artifact), "tokens_per_request": tokens, "rows": rows}
    if given.json:
        print(json.dumps(report, indent=2))
        return
    shape = f"{given.instances} instance(s) of {given.threads} thread(s), {given.inputs} text(s) a request"
    stdout().print(f"{given.artifact}: {shape}, {tokens:.0f} tokens on average", markup=False)
    grid = table("clients", "engine", "p50 ms", "p99 ms", "requests/s", "texts/s", "refused", left=0)
    for row in rows:
        times = (f"{row[key]:.1f}" for key in ("p50_ms", "p99_ms", "requests_per_second", "sequences_per_second"))
        grid.add_row(str(row["clients"]), row["engine"], *times, str(row["refused"]))
    stdout().print(grid)


if __name__ == "__main__":
    main()
