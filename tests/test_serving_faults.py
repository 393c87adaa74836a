"""The server under stress: instances that die or hang, too many requests, slow ones, a key, and the end.

An instance that is stopped (SIGSTOP) stands for one in the middle of a batch, so that nothing here depends on timing.
"""

import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from starlette.testclient import TestClient

from tests import served, toy
from tests.poison import POISON, Mortal
from tests.test_throughput import alive, instances_of
from tilewright.serving.settings import Settings

EXPECTED = [toy.expected([1, 2])["total"].tolist()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, toy_library: Path) -> Path:
    return toy.write(tmp_path_factory.mktemp("served") / "embed.tw", toy_library, served.MODELS["embed"])


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def embed(client: TestClient | httpx2.Client, key: str = "") -> httpx2.Response:
    headers = {"authorization": f"Bearer {key}".encode()} if key else {}
    response: httpx2.Response = client.post("/embed", json={"inputs": "a b", "normalize": False}, headers=headers)
    return response


@contextmanager
def stopped(*processes: int) -> Iterator[None]:
    """Processes that answer nothing meanwhile."""
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            if alive(pid):
                os.kill(pid, signal.SIGCONT)


def begun(client: TestClient, batches: int) -> bool:
    """Whether instances have taken so many batches of one sequence."""
    return served.metric(client, "tilewright_queue_seconds_count") >= batches


def ask(client: TestClient, threads: ThreadPoolExecutor, batch: int) -> "Future[httpx2.Response]":
    """A request that an instance has begun, as the `batch`th."""
    reply = threads.submit(embed, client)
    served.until(lambda: begun(client, batch))
    return reply


def test_what_a_dead_instance_was_doing_is_done_by_another(model: Path, threads: ThreadPoolExecutor) -> None:
    with served.client({"embed": model}, instances=2) as client:
        pids = served.pids(client, "embed")
        with stopped(*pids):
            replies = [ask(client, threads, batch) for batch in (1, 2)]
            os.kill(pids[0], signal.SIGKILL)
            served.until(lambda: len(served.pids(client, "embed")) == 2 and pids[0] not in served.pids(client, "embed"))
        assert [(reply.result().status_code, reply.result().json()) for reply in replies] == [(200, EXPECTED)] * 2
        assert served.metric(client, "tilewright_instance_restarts_total") == 1
        assert client.get("/health").status_code == 200


def test_only_the_request_that_instances_die_of_fails(
    model: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # where instances find the loader
    with served.client({"embed": model}, load=Mortal) as client:
        with stopped(*served.pids(client, "embed")):
            ask(client, threads, 1)
            poisoned = threads.submit(client.post, "/embed", json={"inputs": [POISON]})
            waiting = threads.submit(embed, client)
            served.until(lambda: served.metric(client, "tilewright_queue_length") == 2)
        assert poisoned.result().status_code == 500
        assert poisoned.result().json() == {"error": "2 instances died while they ran this request", "error_type": "Backend"}
        assert waiting.result().json() == EXPECTED
        assert served.metric(client, "tilewright_instance_restarts_total") == 2


def test_an_instance_that_dies_idle_is_replaced(model: Path) -> None:
    with served.client({"embed": model}) as client:
        (pid,) = served.pids(client, "embed")
        os.kill(pid, signal.SIGKILL)
        served.until(lambda: client.get("/health").status_code == 503 or served.pids(client, "embed") not in ([pid], []))
        served.until(lambda: client.get("/health").status_code == 200)
        assert served.pids(client, "embed") != [pid]
        assert embed(client).json() == EXPECTED


def test_an_artifact_that_was_replaced_is_not_mixed_with_the_old_one(model: Path, toy_library: Path, tmp_path: Path) -> None:
    artifact = toy.write(tmp_path / "a.tw", toy_library, served.MODELS["embed"])
    with served.client({"embed": artifact}) as client:
        (pid,) = served.pids(client, "embed")
        toy.write(artifact, toy_library, served.MODELS["classes"])
        os.kill(pid, signal.SIGKILL)
        served.until(lambda: client.get("/health").status_code == 503)
        toy.write(artifact, toy_library, served.MODELS["embed"])
        served.until(lambda: client.get("/health").status_code == 200)


def test_requests_beyond_the_limit_are_told_to_come_again(model: Path, threads: ThreadPoolExecutor) -> None:
    with served.client({"embed": model}, settings=Settings(max_requests=2)) as client:
        with stopped(*served.pids(client, "embed")):
            replies = [threads.submit(embed, client) for _ in range(2)]
            served.until(lambda: served.metric(client, "tilewright_open_requests") == 2)
            refused = embed(client)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error_type"] == "Overloaded"
            assert client.post("/v1/embeddings", json={"input": "a"}).json()["error"]["code"] == "overloaded"
            assert client.get("/health").status_code == 200
        assert [reply.result().json() for reply in replies] == [EXPECTED] * 2
        assert embed(client).status_code == 200


def test_what_takes_too_long_is_given_up_and_not_begun(model: Path, threads: ThreadPoolExecutor) -> None:
    with served.client({"embed": model}, settings=Settings(timeout=0.3)) as client:
        (pid,) = served.pids(client, "embed")
        with stopped(pid):
            # at the same time: once the first has waited so long, another instance takes the place of this one
            late = [reply.result() for reply in [threads.submit(embed, client) for _ in range(2)]]
            assert [reply.status_code for reply in late] == [504] * 2
            assert "not answered within 0.3 s" in late[0].json()["error"]
        served.until(lambda: served.metric(client, "tilewright_queue_length") == 0)
        # the instance hung for as long as requests may take, so another has taken its place
        served.until(lambda: served.pids(client, "embed") not in ([pid], []))
        served.until(lambda: embed(client).status_code == 200)


def test_api_key(model: Path) -> None:
    with served.client({"embed": model}, settings=Settings(api_key="sécret")) as client:
        assert embed(client).status_code == 401
        assert client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert client.get("/health").status_code == 200
        for wrong in (b"Bearer", b"Bearer s", b"Basic s\xc3\xa9cret", b"\xff"):
            assert client.get("/metrics", headers={"authorization": wrong}).status_code == 401
        assert embed(client, "sécret").json() == EXPECTED


def test_a_body_that_does_not_end(model: Path) -> None:
    with served.process(model, "--timeout", "0.3", "--max-bytes", "100", "--instances", "1") as running:
        host, port = running.url.removeprefix("http://").split(":")
        head = b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{"
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(head)
            assert b" 408 " in slow.recv(1000).partition(b"\r\n")[0]
        with httpx2.Client(base_url=running.url) as client:
            long = client.post("/embed", json={"inputs": "a" * 200})
            assert (long.status_code, long.json()["error"]) == (413, "the body is longer than 100 bytes")
            with socket.create_connection((host, int(port))) as leaving:
                leaving.sendall(head)
            served.until(lambda: 'endpoint="/embed",status="499"' in client.get("/metrics").text)
            assert 'status="500"' not in client.get("/metrics").text


def test_sigterm_finishes_what_was_accepted(model: Path, threads: ThreadPoolExecutor) -> None:
    with served.process(model, "--instances", "1") as running, httpx2.Client(base_url=running.url, timeout=60) as client:
        (instance,) = instances_of(running.process.pid)
        os.kill(instance, signal.SIGTERM)  # as systemd does, to every process of a service
        assert embed(client).json() == EXPECTED
        with stopped(instance):
            reply = threads.submit(embed, client)
            with httpx2.Client(base_url=running.url) as other:
                served.until(lambda: "tilewright_open_requests 1.0" in other.get("/metrics").text)
            running.process.send_signal(signal.SIGTERM)
            served.until(lambda: refuses(running.url))
        assert (reply.result().status_code, reply.result().json()) == (200, EXPECTED)
        assert running.process.wait(timeout=60) == 0
    served.until(lambda: not alive(instance))


def refuses(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port))).close()
    except ConnectionRefusedError:
        return True
    return False


def test_latency_bound_starts_what_the_search_finds(model: Path) -> None:
    with served.process(model, "--latency-bound", "10s", "--seq-len", "5", "--duration", "0.02") as running:
        (one,) = httpx2.get(f"{running.url}/info").json()["models"]
        assert one["batch_tokens"] % 5 == 0
        assert one["instances"] * one["threads"] <= len(os.sched_getaffinity(0))
        assert len(instances_of(running.process.pid)) == one["instances"]
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(timeout=60) == 130
