"""The memory of segments goes back whoever lets go of them last, and whenever."""

import asyncio
import gc
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from loraserve.adapters.segment import build_segment
from loraserve.clock import WallClock
from loraserve.fabric.cache import SegmentCache
from loraserve.fabric.counts import Tally
from tests.support.fabric_kit import WAIT_S, Library
from tests.support.segments import own_segments


class CollectingPool(ThreadPoolExecutor):
    """Garbage is collected in it while it holds its lock, as it may be at any allocation."""

    def __init__(self) -> None:
        super().__init__(1)
        self.is_locked = False

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> "Future[Any]":
        assert not self.is_locked, "it would wait for itself for ever"
        self.is_locked = True
        try:
            gc.collect()
            return super().submit(work, *args, **options)
        finally:
            self.is_locked = False


async def test_a_segment_that_is_found_to_be_garbage_in_the_middle_of_anything_goes_back(
    library: Library,
) -> None:
    wanted, who, closers = library(), object(), CollectingPool()
    assert wanted.directory is not None
    garbage, other = (
        build_segment(wanted.directory, name=wanted.version_id, digest=None, max_lora_rank=64)
        for _ in range(2)
    )
    cache = SegmentCache(
        (), capacity_bytes=2**20, max_cached=1, closers=closers, clock=WallClock(), tally=Tally()
    )
    assert cache.reserve(who, garbage.size_bytes)
    owner: Any = cache.add(wanted.version_id, garbage, who=who, digest="", fetch_s=1.0).owner
    owner.itself = owner
    del owner
    assert cache.drop_unpinned(wanted.version_id)
    await cache.discard(other)
    async with asyncio.timeout(WAIT_S):
        await cache.wait_gone(WAIT_S)
    assert cache.leaving_bytes == 0
    closers.shutdown()
    del garbage
    assert own_segments() == 0
