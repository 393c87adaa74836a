"""Serving as a process of its own: the socket, the signals, the HTTP server around the application."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Sequence

import uvicorn

from tilewright.errors import InvalidInput
from tilewright.serving.app import create_app
from tilewright.serving.settings import Service, Settings

_BACKLOG = 2048  # connections that wait to be accepted
_GRACE = 5.0  # seconds, beyond the timeout of requests, until open requests are given up


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port`, so that a port in use is known before models are loaded; raises InvalidInput."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"cannot listen on {host}, port {port} ({reason}); choose another --host or --port") from None
    return made


async def serve(
    services: Sequence[Service], settings: Settings, listening: socket.socket, ready: Callable[[str], object]
) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted; `ready` is given the URL. Raises what loading raises."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are for the instances
    # uvicorn raises the signal that stopped it once more when it is done; the default action would leave a bad exit status
    signal.signal(signal.SIGTERM, lambda *_: None)
    app = create_app(services, settings)
    config = uvicorn.Config(
        app,
        http="h11",  # which bounds the headers of a request; uvicorn would take httptools where that is installed
        log_level="error",  # a warning for every request that is no HTTP would let anyone fill the log
        access_log=False,
        lifespan="off",  # uvicorn would print a traceback where loading fails
        server_header=False,
        timeout_graceful_shutdown=int(settings.timeout + _GRACE),
    )
    async with app.router.lifespan_context(app):
        listening.listen(_BACKLOG)
        address, port = listening.getsockname()[:2]
        ready(f"http://{f'[{address}]' if ':' in address else address}:{port}")
        await uvicorn.Server(config).serve(sockets=[listening])
