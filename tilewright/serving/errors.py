"""Errors of requests, in the shape that clients of an endpoint know: OpenAI's under /v1/, TEI's elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import Response

INVALID, TOO_LARGE, UNSUITABLE, UNKNOWN_MODEL = 422, 413, 424, 404

_TEI_TYPES = {424: "Backend", 429: "Overloaded", 500: "Backend", 503: "Unhealthy", 504: "Backend"}
_OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_OPENAI_STATUS = {INVALID: 400, UNSUITABLE: 400}
_OPENAI_CODES = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large", 429: "overloaded", 504: "timeout"}


_LONGEST = 300  # characters of a message


class RequestError(Exception):
    """Ends a request with `status` and one clear message."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}...")  # it may quote what was sent
        self.status, self.headers = status, headers


def error_response(path: str, error: RequestError) -> Response:
    """The response of the endpoint at `path`."""
    status, message = error.status, str(error)
    if path.startswith("/v1/"):
        status = _OPENAI_STATUS.get(status, status)
        kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        content: object = {"error": {"message": message, "type": kind, "param": None, "code": _OPENAI_CODES.get(status)}}
    else:
        content = {"error": message, "error_type": _TEI_TYPES.get(status, "Validation")}
    return json_response(content, status, error.headers)


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as JSON."""
    body = to_json(content, inf_nan_mode="null")
    return Response(body, status, headers, media_type="application/json")


def explain(error: ValidationError) -> str:
    """The first thing wrong with a body, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    message = " ".join((message[:1].lower() + message[1:]).split())
    return f"{place}: {message}" if place else message
