"""Endpoints of the server: the shapes of OpenAI, Cohere and TEI, and the numbers of the engine."""

import base64
import math
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests import served, toy
from tests.test_cli import invoke, refused

TEXTS = ["a b", "c", "b c a a"]
IDS = {"a": 1, "b": 2, "c": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, toy_library: Path) -> dict[str, Path]:
    return served.write_models(tmp_path_factory.mktemp("served"), toy_library)


@pytest.fixture(scope="module")
def client(models: dict[str, Path]) -> Iterator[TestClient]:
    with served.client(models) as made:
        yield made


def post(client: TestClient, path: str, status: int = 200, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def ids(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def expected(text: str, *second: str) -> dict[str, np.ndarray]:
    """What the toy gives for a text or a pair."""
    words = [(word, kind) for kind, part in enumerate((text, *second)) for word in ids(part)]
    return toy.expected([word for word, _ in words], [kind for _, kind in words])


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def softmax(values: np.ndarray) -> np.ndarray:
    weights = np.exp(values - values.max())
    return weights / weights.sum()


def test_openai_embeddings(client: TestClient) -> None:
    reply = post(client, "/v1/embeddings", input=TEXTS, model="embed", user="me", encoding_format="float")
    assert (reply["object"], reply["model"]) == ("list", "embed")
    assert reply["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [(one["object"], one["index"]) for one in reply["data"]] == [("embedding", i) for i in range(3)]
    for one, text in zip(reply["data"], TEXTS, strict=True):
        np.testing.assert_allclose(one["embedding"], unit(expected(text)["total"]), rtol=1e-6)
    coded = post(client, "/v1/embeddings", input=TEXTS, model="embed", encoding_format="base64")
    for plain, one in zip(reply["data"], coded["data"], strict=True):
        values = np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
        assert values.tolist() == plain["embedding"]  # the same to the bit
    single = post(client, "/v1/embeddings", input=TEXTS[0])
    assert single["data"] == reply["data"][:1]
    by_ids = post(client, "/v1/embeddings", input=[ids(text) for text in TEXTS], dimensions=toy.WIDTH)
    assert by_ids["data"] == reply["data"]
    assert post(client, "/v1/embeddings", input=ids(TEXTS[0]))["data"] == reply["data"][:1]


def test_models(client: TestClient) -> None:
    reply = client.get("/v1/models").json()
    assert (reply["object"], [one["id"] for one in reply["data"]]) == ("list", list(served.MODELS))
    info = client.get("/info").json()
    assert (info["model_id"], info["model_type"]) == ("embed", {"embedding": {"pooling": "mean"}})
    assert {one["name"]: one["reranks_by"] for one in info["models"]} == {
        "embed": "cosine",
        "tag": None,
        "classes": None,
        "answer": None,
        "cross": "cross-encoder",
    }


def test_tei_embed_is_what_the_engine_gives(client: TestClient) -> None:
    plain = post(client, "/embed", inputs=TEXTS, normalize=False)
    assert plain == [expected(text)["total"].tolist() for text in TEXTS]
    assert post(client, "/embed", inputs=TEXTS[0], normalize=False) == plain[:1]
    (one,) = post(client, "/embed", inputs=TEXTS[0])
    np.testing.assert_allclose(one, unit(np.array(plain[0])), rtol=1e-6)


def logit(query: str, document: str) -> float:
    return float(expected(query, document)["hidden"][:, 0].sum())


def test_rerank_by_a_cross_encoder(client: TestClient) -> None:
    logits = [logit("a", text) for text in TEXTS]
    order = sorted(range(3), key=lambda i: -logits[i])
    raw = post(client, "/rerank", query="a", texts=TEXTS, raw_scores=True, return_text=True)
    assert raw == [{"index": i, "score": logits[i], "text": TEXTS[i]} for i in order]
    ranks = post(client, "/rerank", query="a", texts=TEXTS)
    assert [rank["score"] for rank in ranks] == pytest.approx([1 / (1 + math.exp(-logits[i])) for i in order])
    reply = post(client, "/v1/rerank", query="a", documents=TEXTS, top_n=2, return_documents=True, model="cross")
    assert [result["index"] for result in reply["results"]] == order[:2]
    assert [result["document"]["text"] for result in reply["results"]] == [TEXTS[i] for i in order[:2]]


def test_rerank_by_cosine(client: TestClient) -> None:
    documents = [{"text": text} for text in TEXTS]
    reply = post(client, "/v1/rerank", query="a", documents=documents, model="embed")
    vectors = {text: unit(expected(text)["total"]) for text in ("a", *TEXTS)}
    cosines = [float(vectors[text] @ vectors["a"]) for text in TEXTS]
    assert [one["index"] for one in reply["results"]] == sorted(range(3), key=lambda i: -cosines[i])
    for one in reply["results"]:
        assert one["relevance_score"] == pytest.approx(cosines[one["index"]], abs=1e-6)
    assert reply["usage"]["total_tokens"] == 8


def test_predict(client: TestClient) -> None:
    found = post(client, "/predict", inputs="a b")
    probabilities = softmax(expected("a b")["total"])
    order = sorted(range(toy.WIDTH), key=lambda i: -probabilities[i])
    assert [one["label"] for one in found] == [served.CLASSES[i] for i in order]
    assert [one["score"] for one in found] == pytest.approx([probabilities[i] for i in order])
    pair, single = post(client, "/predict", inputs=[["a", "b"], ["c"]], raw_scores=True)
    assert {one["label"]: one["score"] for one in pair} == dict(
        zip(served.CLASSES, expected("a", "b")["total"].tolist(), strict=True)
    )
    assert single == post(client, "/predict", inputs="c", raw_scores=True)
    assert pair == post(client, "/predict", inputs=["a", "b"], raw_scores=True)
    assert post(client, "/predict", inputs="c", model="cross") == [
        {"label": "LABEL_0", "score": float(expected("c")["hidden"][0, 0])}
    ]


def test_tags(client: TestClient) -> None:
    reply = post(client, "/v1/tag", input=["a b", "c"])
    assert [[tag["token"] for tag in one["tags"]] for one in reply["data"]] == [["a", "b"], ["c"]]
    for tag, row in zip(reply["data"][0]["tags"], expected("a b")["hidden"], strict=True):
        assert tag["label"] == served.TAGS[int(row.argmax())]
        assert tag["score"] == pytest.approx(softmax(row).max())
    assert [(tag["start"], tag["end"]) for tag in reply["data"][0]["tags"]] == [(0, 1), (2, 3)]
    assert post(client, "/predict", inputs=[["a b"], ["c"]], model="tag") == [one["tags"] for one in reply["data"]]


def test_answers(client: TestClient) -> None:
    question = {"question": "a", "context": "b c"}
    reply = post(client, "/v1/answer", input=question)
    (one,) = reply["data"]
    # the toy's logits grow with ids and positions, so the answer is the context's last word
    assert (one["answer"], one["start"], one["end"]) == ("c", 2, 3)
    many = post(client, "/v1/answer", input=[question, {"question": "a b", "context": "c"}])
    assert many["data"][0] == one
    assert many["data"][1]["answer"] == "c"


def test_truncation_is_asked_for(client: TestClient) -> None:
    text = "a " * 40
    error = post(client, "/embed", 413, inputs=["b", text])
    assert "input 1 has 40 tokens; the model takes at most 32" in error["error"]
    (cut,) = post(client, "/embed", inputs=text, truncate=True, normalize=False)
    assert cut == toy.expected([1] * 32)["total"].tolist()


BAD: list[tuple[str, dict[str, Any], int, str]] = [
    ("/v1/embeddings", {"input": "a", "model": "nope"}, 404, "model 'nope' is not served; served: embed, tag"),
    ("/v1/embeddings", {"input": "a", "model": "tag"}, 400, "takes a model for embedding; served: tag (token_classification)"),
    ("/v1/embeddings", {"input": []}, 400, "input: expected a text, a list of token ids"),
    ("/v1/embeddings", {"input": [[]]}, 400, "input: expected a text"),
    ("/v1/embeddings", {"input": [1.5]}, 400, "input: expected a text"),
    ("/v1/embeddings", {"input": [True]}, 400, "input: expected a text"),
    ("/v1/embeddings", {"input": ["a", 1]}, 400, "input: expected a text"),
    ("/v1/embeddings", {"input": [100]}, 400, "input 0 holds the token 100; the model takes 0 to 99"),
    ("/v1/embeddings", {"input": [-1]}, 400, "input 0 holds the token -1"),
    ("/v1/embeddings", {"input": [2**70]}, 400, "holds the token"),
    ("/v1/embeddings", {"input": [1] * 33}, 413, "input 0 has 33 tokens; the model takes at most 32"),
    ("/v1/embeddings", {"input": ""}, 400, "input 0 has no tokens"),
    ("/v1/embeddings", {"input": "a", "dimensions": 3}, 400, "dimensions is 3; embeddings of embed have 8"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 400, "encoding_format: "),
    ("/v1/embeddings", {}, 400, "input: field required"),
    ("/v1/rerank", {"query": "a", "documents": []}, 400, "documents: expected a list of texts"),
    ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, 400, "top_n: "),
    ("/v1/answer", {"input": [{"question": "a"}]}, 400, "input: expected an object with the texts question and context"),
    ("/v1/tag", {"input": "a"}, 400, "input: expected a list of texts"),
    ("/embed", {"inputs": "a", "model": "nope"}, 404, "is not served"),
    ("/embed", {"inputs": "a", "model": "tag"}, 424, "takes a model for embedding"),
    ("/embed", {"inputs": "a", "truncate": "yes"}, 422, "truncate: "),
    ("/embed", {"inputs": ["a"] * 3000}, 413, "3000 inputs were sent; at most 2048"),
    ("/predict", {"inputs": ["a"]}, 422, "inputs: expected a text, a pair of texts"),
    ("/rerank", {"query": 3, "texts": ["a"]}, 422, "query: "),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD)
def test_bad_input_is_told_in_the_shape_of_the_api(
    client: TestClient, path: str, body: dict[str, Any], status: int, message: str
) -> None:
    reply = post(client, path, status, **body)
    if path.startswith("/v1/"):
        assert set(reply) == {"error"} and set(reply["error"]) == {"message", "type", "param", "code"}
        assert reply["error"]["type"] == "invalid_request_error"
        text = reply["error"]["message"]
    else:
        assert set(reply) == {"error", "error_type"}
        text = reply["error"]
    assert message in text
    assert "\n" not in text


def test_no_endpoint(client: TestClient) -> None:
    assert client.head("/health").status_code == 200
    assert client.get("/nowhere").json() == {"error": "there is no endpoint /nowhere", "error_type": "Validation"}
    assert client.get("/v1/embeddings").json()["error"]["message"] == "/v1/embeddings does not take GET"
    assert client.post("/embed", content="a=b", headers={"content-type": "text/plain"}).status_code == 415


def test_metrics_count(client: TestClient) -> None:
    before = served.metric(client, "tilewright_inference_seconds_count")
    tokens = served.metric(client, "tilewright_batch_tokens_sum")
    post(client, "/embed", inputs=["a b", "c"])
    client.get("/nowhere/at/all")
    assert served.metric(client, "tilewright_inference_seconds_count") == before + 1
    assert served.metric(client, "tilewright_batch_tokens_sum") == tokens + 3
    text = client.get("/metrics").text
    assert 'tilewright_requests_total{endpoint="other",status="404"}' in text
    assert "nowhere/at" not in text
    assert served.metric(client, "tilewright_open_requests") == 0
    for name in ("queue_length", "instances_ready", "instance_restarts_total", "queue_seconds_count", "tokenize_seconds_count"):
        assert f"tilewright_{name}{{" in text


def test_a_large_request_runs_in_batches_within_the_budget(client: TestClient) -> None:
    """Of 64 tokens a call, whatever the request."""
    calls = served.metric(client, "tilewright_inference_seconds_count")
    found = post(client, "/embed", inputs=["a b c"] * 100, normalize=False)
    assert found == [expected("a b c")["total"].tolist()] * 100
    assert served.metric(client, "tilewright_inference_seconds_count") == calls + math.ceil(100 / (64 // 3))


def test_description(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/embeddings", "/v1/rerank", "/v1/answer", "/v1/tag", "/embed", "/rerank", "/predict"} <= set(paths)
    schema = paths["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["input"]


def test_command_line_refuses(models: dict[str, Path], tmp_path: Path) -> None:
    artifact = models["embed"]
    assert "not an artifact" in invoke("serve", tmp_path / "none.tw", "--port", "0").stderr.splitlines()[-1]
    assert "both be called 'embed'" in refused(2, "serve", artifact, artifact)
    assert "API key is empty" in refused(2, "serve", artifact, "--api-key", "")
    assert "--latency-bound chooses" in refused(2, "serve", artifact, "--latency-bound", "10ms", "--threads", "1")
    assert "latency bound abc" in refused(2, "serve", artifact, "--latency-bound", "abc", "--port", "0")
    assert "cannot listen on no.such.host." in refused(2, "serve", artifact, "--host", "no.such.host.")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} (Address already in use)" in refused(2, "serve", artifact, "--port", str(port))
