"""Endpoints under /v1/: OpenAI's embeddings and models, Cohere's rerank, and answers and tags in the same style."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr
from starlette.responses import Response

from tilewright.serving.errors import INVALID, RequestError, json_response
from tilewright.serving.model import SCORES, Answer
from tilewright.serving.requests import Questions, Texts, TextsOrIds, documents, takes
from tilewright.serving.tasks import choose, count_tokens, embeddings, rank, tags

router = APIRouter(prefix="/v1", tags=["OpenAI"])
_STARTED = int(time.time())


class EmbeddingsRequest(BaseModel):
    """Token ids are run as they are. Embeddings have length 1, as OpenAI's have."""

    input: TextsOrIds
    model: StrictStr | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = None
    truncate: StrictBool = False


class RerankRequest(BaseModel):
    """relevance_score is the sigmoid of a cross-encoder's logit, or the cosine of two embeddings."""

    query: StrictStr
    documents: Texts
    model: StrictStr | None = None
    top_n: StrictInt | None = Field(None, ge=1)
    return_documents: StrictBool = False
    truncate: StrictBool = True


class AnswerRequest(BaseModel):
    """Questions; `truncate` cuts the longer of question and context."""

    input: Questions
    model: StrictStr | None = None
    truncate: StrictBool = False


class TagRequest(BaseModel):
    """Texts whose tokens are to be labelled."""

    input: Texts
    model: StrictStr | None = None
    truncate: StrictBool = False


@router.get("/models")
async def models(request: Request) -> Response:
    """The models that are served."""
    data = [{"id": name, "object": "model", "created": _STARTED, "owned_by": "tilewright"} for name in request.app.state.models]
    return json_response({"object": "list", "data": data})


@router.post("/embeddings", openapi_extra=documents(EmbeddingsRequest))
async def embed(request: Request, body: Annotated[EmbeddingsRequest, Depends(takes(EmbeddingsRequest))]) -> Response:
    """One embedding for each input."""
    model = choose(request, body.model, "embedding")
    answers = await model.run(body.input, body.truncate)
    vectors = embeddings(answers, normalize=True)
    if body.dimensions not in (None, vectors.shape[1]):
        raise RequestError(INVALID, f"dimensions is {body.dimensions}; embeddings of {model.name} have {vectors.shape[1]}")
    if body.encoding_format == "float":
        values: list[Any] = vectors.tolist()
    else:
        values = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
    return json_response({"object": "list", "data": data, "model": model.name, "usage": _usage(count_tokens(answers))})


@router.post("/rerank", openapi_extra=documents(RerankRequest))
async def rerank(request: Request, body: Annotated[RerankRequest, Depends(takes(RerankRequest))]) -> Response:
    """The documents by relevance to the query, the most relevant first."""
    model = choose(request, body.model, SCORES, "embedding")
    ranked, tokens = await rank(model, body.query, body.documents, body.truncate)
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": score} for index, score in ranked[: body.top_n]]
    if body.return_documents:
        results = [{**result, "document": {"text": body.documents[result["index"]]}} for result in results]
    return json_response({"model": model.name, "results": results, "usage": _usage(tokens)})


@router.post("/answer", openapi_extra=documents(AnswerRequest))
async def answer(request: Request, body: Annotated[AnswerRequest, Depends(takes(AnswerRequest))]) -> Response:
    """The span of each context that answers its question, with its place in characters."""
    model = choose(request, body.model, "question_answering")
    answers = await model.run(body.input, body.truncate)
    found = [model.interpret(one) for one in answers]
    data = [{"answer": one["answer"], "start": one["start"], "end": one["end"], "score": one["probability"]} for one in found]
    return _list(model.name, data, answers)


@router.post("/tag", openapi_extra=documents(TagRequest))
async def tag(request: Request, body: Annotated[TagRequest, Depends(takes(TagRequest))]) -> Response:
    """A label for each token of each text."""
    model = choose(request, body.model, "token_classification")
    answers = await model.run(body.input, body.truncate)
    return _list(model.name, [{"tags": tags(model, one)} for one in answers], answers)


def _list(name: str, data: Sequence[dict[str, Any]], answers: Sequence[Answer]) -> Response:
    numbered = [{"index": index, **one} for index, one in enumerate(data)]
    return json_response({"object": "list", "data": numbered, "model": name, "usage": _usage(count_tokens(answers))})


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}
