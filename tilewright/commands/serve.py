"""`tilewright serve`: artifacts behind HTTP."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tilewright.commands.output import IsaLevel, stderr
from tilewright.commands.throughput import Goal, run_trials
from tilewright.cpu import available_cores
from tilewright.errors import InvalidInput

if TYPE_CHECKING:
    from tilewright.serving.settings import Service

_THREAD_TOKENS = 512
"""Tokens of a call for each thread unless told otherwise: two runs of an engine. A larger batch gains no throughput, and what
arrives meanwhile waits for its end."""

_PERCENTILE, _MAX_BATCH = 99.0, 8  # of the search, as `tilewright benchmark` has them


def serve(
    artifacts: Annotated[
        list[str],
        typer.Argument(help="Directories that `tilewright compile` wrote; NAME=DIRECTORY sets a model's name."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any free one.")] = 8000,
    instances: Annotated[
        int | None, typer.Option(min=1, help="Processes of each model.", show_default="as many as the cores allow")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each instance.", show_default="1")] = None,
    latency_bound: Annotated[
        str | None, typer.Option(help="Search instances, threads and batch for the most throughput within this, as 10ms.")
    ] = None,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of a sequence in that search.")] = 128,
    duration: Annotated[float, typer.Option(min=0.0, help="Seconds for each setting of that search.")] = 1.0,
    isa: IsaLevel = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of one call of an instance.", show_default="512 per thread")
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Open requests beyond which others get 429.")] = 512,
    max_inputs: Annotated[int, typer.Option(min=1, help="Most inputs of a request.")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a request.")] = 65_536,
    max_bytes: Annotated[int, typer.Option(min=1, help="Most bytes of a request's body.")] = 2_000_000,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds until a request is given up.")] = 30.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="TILEWRIGHT_API_KEY", help="Ask requests for this key as a bearer token.")
    ] = None,
) -> None:
    """Serve artifacts over HTTP: the APIs of OpenAI (/v1/embeddings, /v1/rerank) and TEI (/embed, /rerank, /predict)."""
    from tilewright.serving import process
    from tilewright.serving.settings import Settings

    if api_key == "":
        raise InvalidInput("the API key is empty; give one, or leave the option out to ask for none")
    if latency_bound is not None and (instances or threads or batch_tokens):
        raise InvalidInput("--latency-bound chooses these itself; drop --instances, --threads and --batch-tokens")
    settings = Settings(max_requests, max_bytes, max_inputs, max_tokens, timeout, api_key)
    named = _names(artifacts)
    console = stderr()
    with process.bind(host, port) as listening:
        if latency_bound is None:
            services = _divide(named, isa, instances, threads, batch_tokens)
        else:
            services = _search(named, isa, latency_bound, seq_len, duration)
        for service in services:
            size = f"{service.instances} instance(s) of {service.launch.threads} thread(s)"
            console.print(f"{service.name}: {size}, up to {service.batch_tokens} tokens a call", markup=False)
        if api_key is None and not listening.getsockname()[0].startswith(("127.", "::1")):
            console.print(f"note: anyone who reaches {host} can use this server; --api-key asks for a key", markup=False)
        serving = process.serve(services, settings, listening, lambda url: console.print(f"listening on {url}", markup=False))
        asyncio.run(serving)


def _names(artifacts: list[str]) -> dict[str, Path]:
    """Artifacts by the names of their models."""
    named: dict[str, Path] = {}
    for argument in artifacts:
        name, given, path = argument.partition("=")
        directory = Path(path if given else argument)
        name = name if given else directory.resolve().name.removesuffix(".tw")
        if not name or name in named:
            raise InvalidInput(f"two models cannot both be called {name!r}; name one with NAME=DIRECTORY")
        named[name] = directory
    return named


def _divide(
    named: dict[str, Path], isa: str | None, instances: int | None, threads: int | None, batch_tokens: int | None
) -> list[Service]:
    """As many instances of each model as the cores allow, unless told otherwise: throughput grows most with instances."""
    from tilewright.instances import Launch
    from tilewright.serving.settings import Service

    threads = threads or 1
    count = instances or max(1, available_cores() // (threads * len(named)))
    tokens = batch_tokens or _THREAD_TOKENS * threads
    return [Service(name, Launch(path, isa, threads), count, tokens) for name, path in named.items()]


def _search(named: dict[str, Path], isa: str | None, latency_bound: str, seq_len: int, duration: float) -> list[Service]:
    """What gives each model the most throughput within the bound, on its share of the cores."""
    from tilewright.instances import Launch
    from tilewright.serving.settings import Service
    from tilewright.throughput import best, parse_bound

    bound = parse_bound(latency_bound)
    cores = sorted(os.sched_getaffinity(0))[: max(1, available_cores() // len(named))]
    services = []
    for name, path in named.items():
        goal = Goal(latency_bound, _PERCENTILE, len(cores), _MAX_BATCH, seq_len, duration)
        trials, _ = run_trials(path, isa, goal, bound, cores)
        chosen = best(trials, bound)
        if chosen is None:
            least = min(trial.latency for trial in trials)
            raise InvalidInput(
                f"nothing keeps {bound:g} ms for {name}; the smallest p{_PERCENTILE:g} is {least:.2f} ms: allow that or more"
            )
        setting = chosen.setting
        services.append(Service(name, Launch(path, isa, setting.threads), setting.instances, setting.batch * seq_len))
    return services
