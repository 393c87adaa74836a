"""Bodies of requests: reading them within bounds, and what each must hold."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, NamedTuple, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ValidationError, WithJsonSchema
from starlette.requests import ClientDisconnect

from tilewright.serving.errors import INVALID, TOO_LARGE, RequestError, explain
from tilewright.serving.settings import Settings

_CLIENT_LEFT = 499  # as nginx counts what nobody waits for

Body = TypeVar("Body", bound=BaseModel)


def takes(kind: type[Body]) -> Callable[[Request], Coroutine[Any, Any, Body]]:
    """A FastAPI dependency that reads and checks a body of `kind`; raises RequestError.

    FastAPI's own reading takes NaN, nesting as deep as the stack and halves of characters; pydantic's parser takes none.
    """

    async def read(request: Request) -> Body:
        settings: Settings = request.app.state.settings
        content = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if content != "application/json":
            raise RequestError(415, f"the body is {content[:80] or 'of no type'}; expected application/json")
        try:
            async with asyncio.timeout(settings.timeout):
                return kind.model_validate_json(await _read(request, settings.max_bytes))
        except TimeoutError:
            raise RequestError(408, f"the body did not arrive within {settings.timeout:g} s") from None
        except ValidationError as error:
            raise RequestError(INVALID, explain(error)) from None

    return read


def documents(kind: type[BaseModel]) -> dict[str, Any]:
    """What the OpenAPI description says of an endpoint that `takes` a body of `kind`."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


async def _read(request: Request, most: int) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise RequestError(TOO_LARGE, f"the body is longer than {most} bytes")
    except ClientDisconnect:
        raise RequestError(_CLIENT_LEFT, "the client left before the end of its body") from None
    return bytes(body)


class Batch(NamedTuple):
    """Texts and pairs of texts; `single` if they came as one input, whose result is to come alone."""

    items: list[str | tuple[str, str]]
    single: bool


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _texts_or_ids(value: Any) -> list[str | list[int]]:
    if _is_text(value) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value and all(_is_text(item) or _is_ids(item) for item in value):
        return value
    raise ValueError("expected a text, a list of token ids, or a list of these, and no empty list")


def _texts(value: Any) -> list[str]:
    """Cohere's documents may be objects with a text."""
    if isinstance(value, list) and value:
        texts: list[Any] = [item.get("text") if isinstance(item, dict) else item for item in value]
        if all(map(_is_text, texts)):
            return texts
    raise ValueError("expected a list of texts, and not an empty one")


def _questions(value: Any) -> list[tuple[str, str]]:
    questions = value if isinstance(value, list) else [value]
    pairs = [(one.get("question"), one.get("context")) for one in questions if isinstance(one, dict)]
    if 0 < len(pairs) == len(questions) and all(_is_text(text) for pair in pairs for text in pair):
        return pairs  # type: ignore[return-value]
    raise ValueError("expected an object with the texts question and context, or a list of such, and not an empty one")


def _pairs(value: Any) -> Batch:
    match value:
        case str():
            return Batch([value], single=True)
        case [str() as first, str() as second]:
            return Batch([(first, second)], single=True)
        case [_, *_] if all(isinstance(item, list) and len(item) in (1, 2) and all(map(_is_text, item)) for item in value):
            return Batch([item[0] if len(item) == 1 else (item[0], item[1]) for item in value], single=False)
    raise ValueError("expected a text, a pair of texts, or a list of lists of one or two texts each")


_TEXT: dict[str, Any] = {"type": "string"}
_TEXTS: dict[str, Any] = {"type": "array", "items": _TEXT, "minItems": 1}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_EITHER: dict[str, Any] = {"anyOf": [_TEXT, _IDS]}

# validators of our own say in one sentence what is expected, where pydantic would tell of each form why it is not that one
TextsOrIds = Annotated[
    Any,
    BeforeValidator(_texts_or_ids),
    WithJsonSchema({"anyOf": [_TEXT, _IDS, {"type": "array", "items": _EITHER, "minItems": 1}]}),
]
"""A text, token ids, or a list of these."""
Texts = Annotated[Any, BeforeValidator(_texts), WithJsonSchema(_TEXTS)]
"""A list of texts."""
_QUESTION: dict[str, Any] = {
    "type": "object",
    "properties": {"question": _TEXT, "context": _TEXT},
    "required": ["question", "context"],
}
Questions = Annotated[
    Any,
    BeforeValidator(_questions),
    WithJsonSchema({"anyOf": [_QUESTION, {"type": "array", "items": _QUESTION, "minItems": 1}]}),
]
"""Pairs of a question and a context."""
Pairs = Annotated[
    Any, BeforeValidator(_pairs), WithJsonSchema({"anyOf": [_TEXT, _TEXTS, {"type": "array", "items": _TEXTS, "minItems": 1}]})
]
"""TEI's inputs of /predict, as a `Batch`: a text, a pair, or a list of lists of one or two texts."""
