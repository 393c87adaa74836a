"""The instances of one model at work: each takes what is queued whenever it is free, and is started anew when it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tilewright.errors import TilewrightError
from tilewright.instances import Instance
from tilewright.manifest import HEAD_OUTPUTS, Manifest
from tilewright.serving.metrics import Metrics
from tilewright.serving.queue import Inputs, Outputs, Work, WorkQueue
from tilewright.serving.settings import Service

_ATTEMPTS = 2
_LONGEST_PAUSE = 30.0  # seconds between attempts to start an instance

logger = logging.getLogger("tilewright.serving")


class Lost(Exception):
    """Every instance that was given a sequence died."""


class Pool:
    """An async context manager; raises what loading raises on entry."""

    def __init__(self, service: Service, manifest: Manifest, metrics: Metrics, hang: float) -> None:
        """hang: seconds after which an instance that has not answered is taken to hang, and ended."""
        self._service, self._manifest, self._hang, self._metrics = service, manifest, hang, metrics
        self._queue = WorkQueue()
        self._names = list(HEAD_OUTPUTS[manifest.head.kind]) or [output.name for output in manifest.outputs]
        self._threads = ThreadPoolExecutor(service.instances, "instance")
        self._running: set[Instance] = set()
        self._tasks: list[asyncio.Task[None]] = []
        metrics.queue_length.labels(service.name).set_function(lambda: len(self._queue))
        metrics.ready.labels(service.name).set_function(lambda: len(self._running))
        metrics.restarts.labels(service.name)

    async def __aenter__(self) -> Pool:
        try:
            started = [self._on_thread(self._start) for _ in range(self._service.instances)]
            self._running = {await one for one in started}
        except BaseException:
            await self._end(started)
            raise
        self._tasks = [asyncio.create_task(self._work(instance)) for instance in self._running]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._end([])

    @property
    def pids(self) -> list[int]:
        """Process ids of the instances that run."""
        return sorted(instance.pid for instance in self._running)

    async def run(self, sequences: Sequence[Inputs]) -> list[Outputs]:
        """The outputs of the head for each sequence; raises Lost. Cancelled, it drops what no instance has begun."""
        loop = asyncio.get_running_loop()
        works = [Work(inputs, loop.create_future()) for inputs in sequences]
        self._queue.put(works)
        try:
            return await asyncio.gather(*(work.done for work in works))
        finally:
            self._queue.drop(works)

    async def _work(self, instance: Instance) -> None:
        """Serve with `instance`, and with those that take its place."""
        while True:
            batch = await self._next_batch(instance)
            try:
                if not batch:
                    await self._on_thread(instance.reply)  # says how it died
                await self._run(instance, batch)
            except Exception as error:
                bug = not isinstance(error, TilewrightError)
                logger.warning("an instance of %s, process %d, %s", self._service.name, instance.pid, error, exc_info=bug)
                self._retry(batch)
                instance = await self._replace(instance)

    async def _next_batch(self, instance: Instance) -> list[Work]:
        """What to run next; nothing if the instance dies meanwhile."""
        loop = asyncio.get_running_loop()
        died = loop.create_future()
        take = asyncio.ensure_future(self._queue.take(self._service.batch_tokens))
        loop.add_reader(instance.lifeline, lambda: died.cancel())
        try:
            await asyncio.wait({died, take}, return_when=asyncio.FIRST_COMPLETED)
            return take.result() if take.done() else []
        finally:
            loop.remove_reader(instance.lifeline)
            take.cancel()

    async def _run(self, instance: Instance, batch: list[Work]) -> None:
        name, metrics, began = self._service.name, self._metrics, time.monotonic()
        for work in batch:
            metrics.queue_seconds.labels(name).observe(began - work.queued)
        call = self._on_thread(instance.call, "run", [work.inputs for work in batch], self._names)
        done, _ = await asyncio.wait({call}, timeout=self._hang)
        if not done:
            instance.kill()
        outputs, seconds = await call
        metrics.inference_seconds.labels(name).observe(seconds)
        metrics.batch_tokens.labels(name).observe(sum(work.tokens for work in batch))
        metrics.batch_sequences.labels(name).observe(len(batch))
        for work, own in zip(batch, outputs, strict=True):
            if not work.done.done():
                work.done.set_result(own)

    def _retry(self, batch: list[Work]) -> None:
        again = [work for work in batch if not work.done.done()]
        for work in again:
            work.attempts += 1
            if work.attempts == _ATTEMPTS:
                work.done.set_exception(Lost(f"{_ATTEMPTS} instances died while they ran this request"))
        self._queue.put_back([work for work in again if not work.done.done()])

    async def _replace(self, instance: Instance) -> Instance:
        self._running.discard(instance)
        await self._on_thread(instance.close)
        pause = 1.0
        while True:
            try:
                instance = await self._on_thread(self._start)
                break
            except (TilewrightError, OSError) as error:
                logger.error("an instance of %s cannot be started, next try in %g s: %s", self._service.name, pause, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        self._running.add(instance)
        self._metrics.restarts.labels(self._service.name).inc()
        return instance

    def _start(self) -> Instance:
        instance = Instance(self._service.launch)
        try:
            instance.reply()
            if instance.call("manifest") != self._manifest:
                raise TilewrightError(f"{self._service.launch.artifact} was replaced; restart the server to serve the new one")
        except BaseException:
            instance.close()
            raise
        return instance

    def _on_thread(self, function: Any, *arguments: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def _end(self, started: Sequence[asyncio.Future[Instance]]) -> None:
        for one in started:
            try:
                self._running.add(await one)
            except Exception:  # known to whoever waits for all of them
                continue
        for instance in self._running:
            instance.close()
        self._threads.shutdown()
