"""What every request passes before an endpoint sees it: the key, the limit on open requests, and the counting."""

from __future__ import annotations

import hmac
import time
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tilewright.serving.errors import RequestError, error_response
from tilewright.serving.metrics import Metrics
from tilewright.serving.settings import Settings

_OPEN = "/health"  # load balancers bring no key
_RETRY_AFTER = "1"  # seconds


class Gate:
    """ASGI middleware. A request that is refused here costs next to nothing: its body is not read."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, paths: Collection[str]) -> None:
        """paths: those to be counted by their names; all others are counted together."""
        self._app, self._settings, self._metrics, self._paths = app, settings, metrics, frozenset(paths)
        self._bearer = None if settings.api_key is None else f"Bearer {settings.api_key}".encode()
        self._accepted = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, held = time.monotonic(), 500, False

        def release() -> None:
            nonlocal held
            self._accepted -= held
            self._metrics.open_requests.set(self._accepted)
            held = False

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                release()  # a client that is slow to read its answer keeps nobody out
            await send(message)

        try:
            if (refusal := self._refusal(scope)) is not None:
                await error_response(scope["path"], refusal)(scope, receive, count)
                return
            if scope["method"] == "POST":
                held = True
                self._accepted += 1
                self._metrics.open_requests.set(self._accepted)
            await self._app(scope, receive, count)
        finally:
            release()
            endpoint = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.requests.labels(endpoint, str(status)).inc()
            self._metrics.request_seconds.labels(endpoint).observe(time.monotonic() - began)

    def _refusal(self, scope: Scope) -> RequestError | None:
        if self._bearer is not None and scope["path"] != _OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._bearer):
                return RequestError(401, "this server asks for its API key as `Authorization: Bearer KEY`")
        if scope["method"] == "POST" and self._accepted >= self._settings.max_requests:
            message = f"{self._settings.max_requests} requests are open already; try again"
            return RequestError(429, message, {"Retry-After": _RETRY_AFTER})
        return None
