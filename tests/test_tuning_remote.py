"""Tuning through TVM's RPC tracker, on loopback; and on this machine from the command line to a tuned artifact."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tvm import rpc
from tvm.rpc.tracker import Tracker

from benchmarks.random_encoder import random_encoder
from tilewright.cpu import cpu_features
from tilewright.errors import ArtifactTargetMismatch, InvalidInput
from tilewright.predict import Sizes
from tilewright.schedules.isa import ISAS
from tilewright.tuning.builds import builder
from tilewright.tuning.host import remote
from tilewright.tuning.measure import Live
from tilewright.tuning.records import read_log
from tilewright.tuning.search import Budget, Settings
from tilewright.tuning.tune import Session

KEY = "tested"
ISA = next(isa for isa in reversed(ISAS.values()) if cpu_features().issuperset(isa.features) and not isa.tiles)
Serve = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def tracker() -> Iterator[Tracker]:
    made = Tracker("127.0.0.1", 9190, 9990, silent=True)
    yield made
    made.terminate()


@pytest.fixture
def serve(tracker: Tracker) -> Iterator[Serve]:
    """Starts a server, and waits until the tracker knows it."""
    servers: list[subprocess.Popen[bytes]] = []

    def known() -> int:
        found = rpc.connect_tracker("127.0.0.1", tracker.port).summary()["server_info"]
        return sum(info["key"] == f"server:{KEY}" for info in found)

    def start() -> subprocess.Popen[bytes]:
        before = known()
        where = ["--host", "127.0.0.1", "--tracker", f"127.0.0.1:{tracker.port}", "--key", KEY]
        command = [sys.executable, "-m", "tvm.exec.rpc_server", *where]
        silent = subprocess.DEVNULL
        servers.append(subprocess.Popen(command, stdout=silent, stderr=silent, start_new_session=True))
        end = time.monotonic() + 120
        while known() == before:
            assert time.monotonic() < end
            time.sleep(0.1)
        return servers[-1]

    yield start
    for server in servers:
        stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_the_search_goes_on_where_a_server_stops(tracker: Tracker, serve: Serve, tmp_path: Path) -> None:
    model = random_encoder(Sizes("remote", 1, 32, 2, 64), (4, 1), 0.8)
    settings = Settings(
        tokens=(16,), batch=2, limit=2, rungs=(1,), final_rounds=6, finalists=1, least=1.0, accept_disturbed=True
    )
    notes: list[str] = []
    lost: list[int] = []
    first = serve()
    address = f"127.0.0.1:{tracker.port}"
    with remote(address, KEY, 1, [ISA]) as connect, builder(1) as builds:
        bench = Live(connect, builds, notes.append)
        host = bench.reached()
        assert set(host.features) == set(cpu_features())
        path = tmp_path / f"{host.cpu}.jsonl"
        session = Session(model, ISA, None, host.machine, bench, settings, path, note=notes.append)

        def changed() -> None:
            if not lost:
                lost.append(len(session.records))
                serve()
                stop(first)

        session.changed = changed
        session.run(Budget(trials=4))
    assert lost == [1]
    assert len(session.records) == 2  # two tasks had two trials each
    assert read_log(path) == session.log
    assert any("measuring again" in note for note in notes)


def test_what_no_server_can_do_is_refused_by_name(tracker: Tracker, serve: Serve) -> None:
    address = f"127.0.0.1:{tracker.port}"
    with remote(address, KEY, 1, [ISA]) as connect, pytest.raises(InvalidInput, match="has no server under the key tested"):
        connect()
    server = serve()
    imagined = replace(ISA, name="imagined", features=(*ISA.features, "nonesuch"))
    with (
        remote(address, KEY, 1, [ISA, imagined]) as connect,
        pytest.raises(ArtifactTargetMismatch, match="imagined needs nonesuch"),
    ):
        connect()
    stop(server)
    with remote("127.0.0.1:1", KEY, 1, [ISA]) as connect, pytest.raises(InvalidInput, match=re.escape("127.0.0.1:1")):
        connect()
    with pytest.raises(InvalidInput, match="HOST:PORT"), remote("nowhere", KEY, 1, [ISA]) as connect:
        connect()
