"""Virtual time for an event loop: sleepers wake in order, and no real time passes.

The public double for code that takes a `Clock` and a `sleep`; live processes never import it.
"""

import asyncio
import heapq
import itertools
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")

SETTLE_TURNS = 20
"""Turns of the loop after which runnable tasks are taken to have come to rest."""


class VirtualTime:
    """A clock and its `sleep`; `run` drives both until the given work is done."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def now_s(self) -> float:
        """Virtual seconds since the start."""
        return self._now_s

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock has been moved this far."""
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_s + seconds, next(self._order), future))
        await future

    async def run(self, work: Awaitable[T]) -> T:
        """The result of `work`; RuntimeError if it waits for something that no sleeper brings about."""
        task = asyncio.ensure_future(work)
        try:
            while not await self._settled(task):
                if not self._wake_next():
                    raise RuntimeError("the work waits, but nobody sleeps who could end the wait")
            return await task
        finally:
            task.cancel()

    async def _settled(self, task: "asyncio.Future[T]") -> bool:
        for _ in range(SETTLE_TURNS):
            if task.done():
                return True
            await asyncio.sleep(0)
        return task.done()

    def _wake_next(self) -> bool:
        while self._sleepers:
            due_s, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                self._now_s = max(self._now_s, due_s)
                future.set_result(None)
                return True
        return False
