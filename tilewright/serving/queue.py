"""Sequences that wait for an instance, and how many of them an instance takes at once."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Inputs = dict[str, NDArray[np.int32]]
Outputs = dict[str, NDArray[Any]]


@dataclass(eq=False)
class Work:
    """One sequence: its inputs, i32[tokens] each, and the future of its outputs. attempts: instances that died with it."""

    inputs: Inputs
    done: asyncio.Future[Outputs]
    attempts: int = 0
    queued: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> int:
        """Its length."""
        return len(self.inputs["input_ids"])


class WorkQueue:
    """First come, first served. An instance never waits for a batch to fill: it takes what is there."""

    def __init__(self) -> None:
        self._waiting: deque[Work] = deque()
        self._tokens = 0
        self._idle = 0
        self._filled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, works: list[Work]) -> None:
        """Append sequences of a request."""
        self._waiting.extend(works)
        self._grew(works)

    def put_back(self, works: list[Work]) -> None:
        """Let sequences that an instance took and did not finish come next."""
        self._waiting.extendleft(reversed(works))
        self._grew(works)

    def drop(self, works: list[Work]) -> None:
        """Forget those of `works` that nobody has finished, as their request has ended."""
        pending = [work for work in works if not work.done.done()]
        for work in pending:
            work.done.cancel()
        if pending:
            self._waiting = deque(work for work in self._waiting if not work.done.done())
            self._tokens = sum(work.tokens for work in self._waiting)

    async def take(self, budget: int) -> list[Work]:
        """The next sequences, of `budget` tokens together or a single longer one, once there are any.

        Where several instances are idle they share what waits, and what an instance has died with is taken alone, so that
        it cannot take others along again.
        """
        self._idle += 1
        try:
            while not self._waiting:
                self._filled.clear()
                await self._filled.wait()
            return self._next(min(budget, -(-self._tokens // self._idle)))
        finally:
            self._idle -= 1

    def _next(self, budget: int) -> list[Work]:
        batch = [self._waiting.popleft()]
        tokens = batch[0].tokens
        while self._waiting and not batch[0].attempts and not self._waiting[0].attempts:
            if tokens + self._waiting[0].tokens > budget:
                break
            batch.append(self._waiting.popleft())
            tokens += batch[-1].tokens
        self._tokens -= tokens
        return batch

    def _grew(self, works: list[Work]) -> None:
        self._tokens += sum(work.tokens for work in works)
        self._filled.set()
