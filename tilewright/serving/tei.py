"""The endpoints of Hugging Face's text-embeddings-inference (TEI), which name no model; an optional `model` chooses one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, StrictBool, StrictStr
from starlette.responses import Response

from tilewright.results import label, probabilities
from tilewright.serving.errors import json_response
from tilewright.serving.model import SCORES, Answer, ServedModel
from tilewright.serving.requests import Pairs, Texts, TextsOrIds, documents, takes
from tilewright.serving.tasks import choose, descending, embeddings, rank, tags

router = APIRouter(tags=["TEI"])


class EmbedRequest(BaseModel):
    """Without `normalize`, embeddings are what the model gives."""

    inputs: TextsOrIds
    model: StrictStr | None = None
    normalize: StrictBool = True
    truncate: StrictBool | None = False
    truncation_direction: Literal["Right", "right"] = "Right"


class RerankRequest(BaseModel):
    """`score` is the sigmoid of a cross-encoder's logit (`raw_scores`: the logit), or the cosine of two embeddings."""

    query: StrictStr
    texts: Texts
    model: StrictStr | None = None
    raw_scores: StrictBool = False
    return_text: StrictBool = False
    truncate: StrictBool | None = False
    truncation_direction: Literal["Right", "right"] = "Right"


class PredictRequest(BaseModel):
    """`raw_scores`: logits instead of probabilities."""

    inputs: Pairs
    model: StrictStr | None = None
    raw_scores: StrictBool = False
    truncate: StrictBool | None = False
    truncation_direction: Literal["Right", "right"] = "Right"


@router.post("/embed", openapi_extra=documents(EmbedRequest))
async def embed(request: Request, body: Annotated[EmbedRequest, Depends(takes(EmbedRequest))]) -> Response:
    """One embedding for each input."""
    model = choose(request, body.model, "embedding")
    answers = await model.run(body.inputs, bool(body.truncate))
    return json_response(embeddings(answers, body.normalize).tolist())


@router.post("/rerank", openapi_extra=documents(RerankRequest))
async def rerank(request: Request, body: Annotated[RerankRequest, Depends(takes(RerankRequest))]) -> Response:
    """The texts by relevance to the query, the most relevant first."""
    model = choose(request, body.model, SCORES, "embedding")
    ranked, _ = await rank(model, body.query, body.texts, bool(body.truncate), body.raw_scores)
    ranks: list[dict[str, Any]] = [{"index": index, "score": score} for index, score in ranked]
    return json_response([{**one, "text": body.texts[one["index"]]} for one in ranks] if body.return_text else ranks)


@router.post("/predict", openapi_extra=documents(PredictRequest))
async def predict(request: Request, body: Annotated[PredictRequest, Depends(takes(PredictRequest))]) -> Response:
    """Labels of each input, the likeliest first; of a token classifier the label of each token."""
    model = choose(request, body.model, "sequence_classification", "token_classification")
    answers = await model.run(body.inputs.items, bool(body.truncate))
    if "token_classification" in model.uses:
        found = [tags(model, answer) for answer in answers]
    else:
        found = [_labels(model, answer, body.raw_scores) for answer in answers]
    return json_response(found[0] if body.inputs.single else found)


def _labels(model: ServedModel, answer: Answer, raw: bool) -> list[dict[str, Any]]:
    logits = answer.outputs["logits"]
    values = logits if raw else probabilities(model.manifest.head, logits)
    return [{"label": label(model.manifest.labels, i), "score": float(values[i])} for i in descending(values.tolist())]
