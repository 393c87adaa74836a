"""Bodies that nobody should send: each gets one clear error of the client's, and the server goes on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tests import served, toy
from tilewright.serving.settings import Settings

ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": ["a b", "c"], "model": "embed", "encoding_format": "base64", "dimensions": 8},
    "/v1/rerank": {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1, "return_documents": True, "truncate": True},
    "/v1/answer": {"input": [{"question": "a", "context": "b c"}], "model": None, "truncate": False},
    "/v1/tag": {"input": ["a b"], "model": "tag"},
    "/embed": {"inputs": "a", "normalize": True, "truncate": None},
    "/rerank": {"query": "a", "texts": ["b", "c"], "raw_scores": True, "return_text": True},
    "/predict": {"inputs": [["a"], ["b", "c"]], "raw_scores": False},
}
MOST = 20_000  # bytes


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, toy_library: Path) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("hostile")
    models = {name: toy.write(root / f"{name}.tw", toy_library, served.MODELS[name]) for name in ("embed", "tag")}
    with served.client(models, settings=Settings(max_bytes=MOST)) as made:
        yield made


def check(client: TestClient, path: str, body: bytes, content_type: str = "application/json") -> int:
    """Send `body`; the status. Whatever it is, the response is JSON, and an error says one thing."""
    response = client.post(path, content=body, headers={"content-type": content_type})
    assert response.status_code < 500, (body[:200], response.text)
    if response.status_code != 200:
        reply = response.json()
        message = reply["error"]["message"] if path.startswith("/v1/") else reply["error"]
        assert message and "\n" not in message and len(message) < 400, message
    return response.status_code


numbers = st.one_of(st.integers(), st.integers(-3, 120), st.floats(), st.just(10**400), st.just(-0.0))
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(), st.sampled_from(["a", "b c", "", "\0", "a" * 500, "embed"]))
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=12
)


@settings(max_examples=200, deadline=None)
@given(path=st.sampled_from(list(ENDPOINTS)), data=st.data())
def test_fields_of_any_kind(client: TestClient, path: str, data: st.DataObject) -> None:
    """A body that would do, with one or two fields replaced."""
    body = dict(ENDPOINTS[path])
    for _ in range(data.draw(st.integers(1, 2))):
        body[data.draw(st.sampled_from([*body, "model", "extra"]))] = data.draw(values)
    check(client, path, json.dumps(body).encode())


@settings(max_examples=100, deadline=None)
@given(path=st.sampled_from(list(ENDPOINTS)), data=st.data())
def test_bytes_of_any_kind(client: TestClient, path: str, data: st.DataObject) -> None:
    """A body that would do, with some bytes replaced, inserted or removed."""
    body = bytearray(json.dumps(ENDPOINTS[path]).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(body)))
        body[start : start + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b'"', b"[", b"\\"])
        )
    check(client, path, bytes(body))


HOSTILE = {
    "nothing": b"",
    "deep lists": b'{"input": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    "deep objects": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "unclosed": b"[" * 15_000,
    "not a number": b'{"input": [NaN]}',
    "infinite": b'{"input": [1e999, -Infinity]}',
    "long number": b'{"input": [' + b"9" * 10_000 + b"]}",
    "half a character": b'{"input": "\\ud800", "inputs": "\\udfff"}',
    "not UTF-8": b'{"input": "\xff\xfe", "inputs": "\xc3"}',
    "UTF-16": '{"input": "a", "inputs": "a"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"input": "a", "inputs": "a"}',
    "NUL": b'{"input": "\0"}',
    "many fields": json.dumps({str(i): i for i in range(1500)}).encode(),
    "many texts": json.dumps({"input": [""] * 4000, "inputs": [""] * 4000}).encode(),
    "many ids": json.dumps({"input": [1] * 6000, "inputs": [1] * 6000}).encode(),
    "many lists of ids": json.dumps({"input": [[1]] * 3000, "inputs": [[1]] * 3000}).encode(),
    "too long": b" " * (MOST + 1),
    "a text": b'"a"',
    "null": b"null",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(client: TestClient, name: str) -> None:
    for path in ENDPOINTS:
        status = check(client, path, HOSTILE[name])
        assert 400 <= status < 500
        assert (status == 413) or name != "too long"


def test_texts_that_json_can_carry_are_taken(client: TestClient) -> None:
    for text in ("a \\u0000 b", "\\ud83d\\ude00 a", "a \\uffff", "a \\u202e b"):
        assert check(client, "/embed", f'{{"inputs": "{text}"}}'.encode()) == 200


def test_the_server_goes_on(client: TestClient) -> None:
    for path, body in ENDPOINTS.items():
        if path != "/v1/answer":  # which no model here can do
            assert check(client, path, json.dumps(body).encode()) == 200
    assert check(client, "/v1/answer", json.dumps(ENDPOINTS["/v1/answer"]).encode()) == 400
    assert served.metric(client, "tilewright_instance_restarts_total") == 0
    assert served.metric(client, "tilewright_open_requests") == 0
