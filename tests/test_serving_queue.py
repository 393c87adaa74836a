"""What an instance takes from the queue."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tilewright.serving.queue import Work, WorkQueue

lengths = st.lists(st.integers(1, 20), min_size=1, max_size=12)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 10))


def works(*tokens: int) -> list[Work]:
    loop = asyncio.get_running_loop()
    return [Work({"input_ids": np.zeros(count, np.int32)}, loop.create_future()) for count in tokens]


@given(lengths, st.integers(1, 40))
def test_a_batch_is_what_comes_next_within_the_budget(tokens: list[int], budget: int) -> None:
    async def scenario() -> None:
        queue, put = WorkQueue(), works(*tokens)
        queue.put(put)
        taken = []
        while len(queue):
            batch = await queue.take(budget)
            assert len(batch) == 1 or sum(work.tokens for work in batch) <= budget
            following = put[len(taken) + len(batch) :][:1]
            assert not following or sum(work.tokens for work in [*batch, *following]) > budget
            taken += batch
        assert taken == put

    run(scenario())


def test_idle_instances_share_what_comes() -> None:
    async def scenario() -> None:
        queue = WorkQueue()
        takers = [asyncio.create_task(queue.take(100)) for _ in range(3)]
        await asyncio.sleep(0)
        queue.put(works(*[5] * 6))
        assert [len(batch) for batch in await asyncio.gather(*takers)] == [2, 2, 2]

    run(scenario())


def test_what_comes_back_goes_first_and_alone() -> None:
    async def scenario() -> None:
        queue, (first, second, third) = WorkQueue(), works(1, 1, 1)
        queue.put([third])
        first.attempts = second.attempts = 1
        queue.put_back([first, second])
        assert [await queue.take(100) for _ in range(3)] == [[first], [second], [third]]

    run(scenario())


def test_what_was_given_up_is_not_taken() -> None:
    async def scenario() -> None:
        queue, mine, other = WorkQueue(), works(1, 2), works(3)
        queue.put([*mine, *other])
        queue.drop(mine)
        assert len(queue) == 1
        assert all(work.done.cancelled() for work in mine)
        assert await queue.take(100) == other

    run(scenario())


def test_a_taker_that_leaves_takes_nothing() -> None:
    async def scenario() -> None:
        queue, put = WorkQueue(), works(4, 4)
        leaving = asyncio.create_task(queue.take(100))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        queue.put(put)
        assert await queue.take(100) == put  # and the one that has left has no share

    run(scenario())
