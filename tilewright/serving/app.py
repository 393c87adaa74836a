"""The application: models, endpoints, and how errors become responses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tilewright.serving import openai, tei
from tilewright.serving.errors import RequestError, error_response, json_response
from tilewright.serving.gate import Gate
from tilewright.serving.metrics import Metrics
from tilewright.serving.model import SCORES, ServedModel
from tilewright.serving.settings import Service, Settings

router = APIRouter(tags=["server"])


def create_app(services: Sequence[Service], settings: Settings = Settings()) -> FastAPI:  # noqa: B008  # frozen
    """An ASGI application that serves `services`, whose instances run while its lifespan lasts.

    Entering the lifespan raises what loading the artifacts raises.
    """
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            models = [ServedModel(service, settings, metrics) for service in services]
            entered = await asyncio.gather(*(model.__aenter__() for model in models), return_exceptions=True)
            failures = [outcome for outcome in entered if isinstance(outcome, BaseException)]
            for model, outcome in zip(models, entered, strict=True):
                if outcome not in failures:
                    stack.push_async_exit(model)
            if failures:
                raise failures[0]
            app.state.models = {model.name: model for model in models}
            yield

    app = FastAPI(title="Tilewright", version=version("tilewright"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.models, app.state.settings, app.state.metrics = {}, settings, metrics
    routers = openai.router, tei.router, router
    for part in routers:
        app.include_router(part)
    paths = [route.path for part in routers for route in part.routes if isinstance(route, APIRoute)]
    app.add_middleware(Gate, settings=settings, metrics=metrics, paths=paths)
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _failed)
    return app


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(request: Request) -> Response:
    """200 when every model has an instance that runs, 503 otherwise."""
    models = request.app.state.models.values()
    waiting = [model.name for model in models if not model.pool.pids]
    if waiting or not models:
        raise RequestError(503, f"no instance runs of {', '.join(waiting) or 'any model'}; they are being started")
    return Response()


@router.get("/info")
async def info(request: Request) -> Response:
    """What is served, in TEI's terms for the first model, and in full under `models`."""
    settings: Settings = request.app.state.settings
    models: list[ServedModel] = list(request.app.state.models.values())
    first = models[0]
    return json_response(
        {
            "model_id": first.name,
            "model_dtype": "int8",
            "model_type": _model_type(first),
            "max_concurrent_requests": settings.max_requests,
            "max_input_length": first.manifest.limits.max_positions,
            "max_batch_tokens": first.service.batch_tokens,
            "max_client_batch_size": settings.max_inputs,
            "auto_truncate": False,
            "version": version("tilewright"),
            "models": [_describe(model) for model in models],
        }
    )


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """In Prometheus' text format."""
    return Response(request.app.state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _model_type(model: ServedModel) -> dict[str, Any]:
    head, labels = model.manifest.head, model.manifest.labels
    if head.kind == "embedding":
        return {"embedding": {"pooling": head.pooling}}
    named = {
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    return {"reranker" if SCORES in model.uses else "classifier": named}


def _describe(model: ServedModel) -> dict[str, Any]:
    head, service = model.manifest.head, model.service
    reranks = "cross-encoder" if SCORES in model.uses else "cosine" if head.kind == "embedding" else None
    return {
        "name": model.name,
        "architecture": model.manifest.architecture,
        "head": head.kind,
        "problem_type": head.problem_type,
        "pooling": head.pooling,
        "reranks_by": reranks,
        "max_input_length": model.manifest.limits.max_positions,
        "instances": service.instances,
        "threads": service.launch.threads,
        "batch_tokens": service.batch_tokens,
    }


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(request.url.path, error)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, status = request.url.path, error.status_code
    known = {404: f"there is no endpoint {path}", 405: f"{path} does not take {request.method}"}
    return error_response(path, RequestError(status, known.get(status, error.detail), error.headers))


async def _failed(request: Request, _: Exception) -> Response:
    """A bug, of which the log has the traceback."""
    return error_response(request.url.path, RequestError(500, "the server failed on this request; its log says how"))
