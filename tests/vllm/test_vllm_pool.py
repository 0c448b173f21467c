"""The adapter pool of a replica against workers that fail, stall and die: nobody waits for ever."""

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from loraserve.adapters.segment import AdapterSegment, build_segment, map_segment
from loraserve.engines.base import AdapterFiles
from loraserve.engines.vllm_pool import EnginePool
from loraserve.errors import AdapterRejectedError, EngineDeadError, StaleError, WorkFailedError
from placement.types import VersionId
from tests.support.adapter_maker import AdapterMaker
from tests.support.fake_workers import FakeWorkers
from tests.support.segments import own_segments

PATIENCE_S = 10.0


class PoolBench:
    """A pool of ten over two ranks with two slots each."""

    def __init__(self, folder: Path) -> None:
        self.workers = FakeWorkers(num_ranks=2, num_slots=2)
        self.num_requests = 0
        self.pool = EnginePool(
            self.workers,
            num_slots=2,
            num_adapters=10,
            max_lora_rank=8,
            num_requests=lambda: self.num_requests,
        )
        self._folder = folder
        self._requests = 0

    def files(self, name: str) -> AdapterFiles:
        """Version `name`@0, of rank 4."""
        return AdapterFiles(version_id=version(name), directory=self._folder, rank=4, size_bytes=1)

    async def load(self, *names: str) -> None:
        """Load versions one after the other."""
        for name in names:
            await self.pool.load(self.files(name))

    async def enter(self, name: str) -> str:
        """A new request that has been let in."""
        request = self.new_request()
        assert await asyncio.wait_for(self.pool.enter(version(name), request), PATIENCE_S)
        return request

    def waits(self, name: str) -> "tuple[str, asyncio.Task[bool]]":
        """A new request and its wait."""
        request = self.new_request()
        return request, asyncio.create_task(self.pool.enter(version(name), request))

    def new_request(self) -> str:
        self._requests += 1
        return f"request-{self._requests}"

    def segments(self) -> int:
        """How many segments the pool itself keeps in memory, beside the ranks' mappings."""
        return own_segments() - sum(len(rank.pool) for rank in self.workers.ranks)

    def is_empty(self) -> bool:
        """Whether no rank has anything."""
        return not any(rank.pool or rank.active for rank in self.workers.ranks)


def version(name: str) -> VersionId:
    return VersionId(f"{name}@0")


async def ends(task: "asyncio.Future[Any]") -> Any:
    """What the task ends with, its error included."""
    (end,) = await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), PATIENCE_S)
    return end


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[PoolBench]:
    """The pool; whatever happens in a test, no memory stays."""
    one = PoolBench(AdapterMaker(tmp_path)())
    before = one.segments()
    yield one
    one.pool.close()
    assert one.segments() == before
    one.workers.end()


def fails(_: int) -> Any:
    raise KeyError("something inside vLLM")


FAULTS: dict[str, tuple[str, Callable[[int], Any], type[Exception], str]] = {
    "cannot open it": ("loraserve_open", fails, WorkFailedError, "something inside vLLM"),
    "finds it damaged": (
        "loraserve_advance",
        lambda _: ("failed", "no layer for it"),
        AdapterRejectedError,
        "no layer for it",
    ),
    "fails inside vLLM": ("loraserve_advance", fails, WorkFailedError, "something inside vLLM"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_one_rank_does_not_take_no_rank_keeps(bench: PoolBench, fault: str) -> None:
    method, answer, error, message = FAULTS[fault]
    segments = bench.segments()
    bench.workers.ranks[1].faults[method] = answer
    with pytest.raises(error, match=message):
        await bench.load("bad")
    assert bench.is_empty()
    assert bench.segments() == segments
    assert bench.pool.pin(version("bad")) is None
    bench.workers.ranks[1].faults.clear()
    await bench.load("bad")
    await bench.enter("bad")


@pytest.mark.parametrize("answer", [fails, lambda _: ("failed", "out of memory")])
async def test_a_slot_that_cannot_be_written_refuses_its_requests_and_serves_others(
    bench: PoolBench, answer: Callable[[int], Any]
) -> None:
    await bench.load("one", "two", "three")
    assert [bench.pool.is_active(version(name)) for name in ("one", "two", "three")] == [True, True, False]
    bench.workers.ranks[1].faults["loraserve_advance"] = answer
    for leaving in ("one", "two"):
        bench.pool.leave(version(leaving), await bench.enter(leaving))
    waiting = [bench.waits("three")[1] for _ in range(2)]
    refusals = [await ends(task) for task in waiting]
    assert [type(refusal) for refusal in refusals] == [WorkFailedError] * 2
    assert "adapter three@0: " in str(refusals[0])
    bench.workers.ranks[1].faults.clear()
    # What the first rank had written already is out of its slot again.
    for name in ("one", "two"):
        await bench.enter(name)


async def test_a_version_that_goes_while_another_waits_for_a_slot_has_left_it_first(bench: PoolBench) -> None:
    await bench.load("one", "two", "three")
    unload = asyncio.create_task(bench.pool.unload(version("one")))
    _, waiting = bench.waits("three")
    assert await ends(waiting) is True
    assert await ends(unload) is None
    assert [rank.active for rank in bench.workers.ranks] == [{2, 3}] * 2


async def test_an_engine_that_dies_takes_all_who_wait(bench: PoolBench) -> None:
    await bench.load("one", "two", "three")
    running = [(name, await bench.enter(name)) for name in ("one", "two")]
    bench.workers.hold("loraserve_deactivate")
    _, in_line = bench.waits("three")
    bench.pool.leave(version("one"), running[0][1])
    await bench.workers.reached("loraserve_deactivate")
    loading = asyncio.create_task(bench.load("four"))
    unloading = asyncio.create_task(bench.pool.unload(version("one")))
    await asyncio.sleep(0)
    bench.workers.die()
    found = await asyncio.gather(*(ends(task) for task in (in_line, loading, unloading)))
    assert [type(end) for end in found] == [EngineDeadError] * 3
    bench.pool.leave(version("two"), running[1][1])
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(bench.pool.enter(version("two"), "late"), PATIENCE_S)
    bench.pool.close()
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(bench.pool.enter(version("two"), "later"), PATIENCE_S)


async def test_a_pool_that_closes_lets_nobody_wait(bench: PoolBench) -> None:
    """Also not for a slot whose request is never read to its end."""
    await bench.load("one", "two", "three")
    for name in ("one", "two"):
        await bench.enter(name)
    _, waiting = bench.waits("three")
    gate = bench.workers.hold("loraserve_open")
    loads = [asyncio.create_task(bench.load(name)) for name in ("four", "five")]
    await bench.workers.reached("loraserve_open")
    bench.workers.die()
    bench.pool.close()
    gate.set()
    found = await asyncio.gather(*(ends(task) for task in (waiting, *loads)))
    assert [type(end) for end in found] == [EngineDeadError] * 3


async def test_who_gives_up_is_never_let_in_and_holds_up_nobody(bench: PoolBench) -> None:
    await bench.load("one", "two", "three")
    running = [await bench.enter(name) for name in ("one", "two")]
    given_up, leaving = bench.waits("three")
    cancelled, gone = bench.waits("three")
    _, patient = bench.waits("three")
    await asyncio.sleep(0)
    bench.pool.give_up(given_up)
    bench.pool.give_up("unknown")
    assert await ends(leaving) is False
    gone.cancel()
    assert isinstance(await ends(gone), asyncio.CancelledError)
    for request in (given_up, cancelled):
        bench.pool.leave(version("three"), request)
    assert not patient.done()
    bench.pool.leave(version("two"), running[1])
    assert await ends(patient) is True
    (active,) = [slot for slot in bench.pool._table.snapshot().slots if slot.version_id == version("three")]
    assert active.num_admitted == 1


async def test_a_load_goes_on_when_its_caller_has_gone(bench: PoolBench) -> None:
    gate = bench.workers.hold("loraserve_open")
    caller = asyncio.create_task(bench.load("one"))
    await bench.workers.reached("loraserve_open")
    caller.cancel()
    assert isinstance(await ends(caller), asyncio.CancelledError)
    assert bench.pool.pin(version("one")) is None
    gate.set()
    await bench.load("one")
    assert await bench.pool.resident() == {version("one")}
    assert bench.workers.asked.count("loraserve_open") == 1


async def test_memory_is_given_back_after_the_slot(bench: PoolBench) -> None:
    await bench.load("one")
    await bench.enter("one")
    bench.pool.pin(version("one"))
    with pytest.raises(StaleError, match="1 requests still use it"):
        await bench.pool.unload(version("one"))
    bench.pool.leave(version("one"), "request-1")
    bench.pool.unpin(version("one"))
    segments = bench.segments()
    gate = bench.workers.hold("loraserve_close")
    unload = asyncio.create_task(bench.pool.unload(version("one")))
    await bench.workers.reached("loraserve_close")
    assert bench.pool.pin(version("one")) is None
    assert not unload.done()
    assert bench.segments() == segments
    assert not any(rank.active for rank in bench.workers.ranks)
    gate.set()
    assert await ends(unload) is None
    assert bench.is_empty()
    assert bench.segments() == segments - 1


async def test_memory_is_given_back_also_when_the_engine_dies_meanwhile(bench: PoolBench) -> None:
    segments = bench.segments()
    await bench.load("one")
    bench.workers.hold("loraserve_close")
    unload = asyncio.create_task(bench.pool.unload(version("one")))
    await bench.workers.reached("loraserve_close")
    bench.workers.die()
    assert isinstance(await ends(unload), EngineDeadError)
    assert bench.segments() == segments


@pytest.fixture
def given(tmp_path: Path) -> Iterator[AdapterSegment]:
    """A segment of `one`@0 that is this test's, and no folder is beside it."""
    segment = build_segment(
        AdapterMaker(tmp_path / "given")(), name=version("one"), digest=None, max_lora_rank=8
    )
    yield segment
    segment.close()


def with_segment(segment: AdapterSegment, name: str = "one", rank: int = 4) -> AdapterFiles:
    return AdapterFiles(
        version_id=version(name), directory=Path("none"), rank=rank, size_bytes=1, segment=segment
    )


async def test_a_segment_that_is_given_is_used_as_it_is_and_left_to_its_giver(
    bench: PoolBench, given: AdapterSegment
) -> None:
    descriptors = own_segments()
    await bench.pool.load(with_segment(given))
    await bench.enter("one")
    # A mapping per rank, and nothing else.
    assert own_segments() == descriptors + 2
    bench.pool.leave(version("one"), "request-1")
    await bench.pool.unload(version("one"))
    assert own_segments() == descriptors
    map_segment(given.ref).verify()
    # Once more, and the pool is closed with it.
    await bench.pool.load(with_segment(given))
    bench.pool.close()
    bench.workers.end()
    assert own_segments() == descriptors
    map_segment(given.ref).verify()


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_segment_that_is_given_in_vain_is_used_by_nobody_afterwards(
    bench: PoolBench, given: AdapterSegment, fault: str
) -> None:
    method, answer, error, message = FAULTS[fault]
    descriptors = own_segments()
    bench.workers.ranks[1].faults[method] = answer
    with pytest.raises(error, match=message):
        await bench.pool.load(with_segment(given))
    assert bench.is_empty()
    assert own_segments() == descriptors
    map_segment(given.ref).verify()


async def test_a_segment_of_another_version_or_rank_is_refused(
    bench: PoolBench, given: AdapterSegment
) -> None:
    with pytest.raises(AdapterRejectedError, match="adapter two@0: its segment is that of 'one@0'"):
        await bench.pool.load(with_segment(given, "two"))
    with pytest.raises(AdapterRejectedError, match=r"rank 9 is above engine\.max_lora_rank 8"):
        await bench.pool.load(with_segment(given, rank=9))
    low = EnginePool(bench.workers, num_slots=2, num_adapters=10, max_lora_rank=2, num_requests=lambda: 0)
    # What its head says counts, also for a caller that believes otherwise.
    with pytest.raises(AdapterRejectedError, match=r"its rank 4 is above engine\.max_lora_rank 2"):
        await low.load(with_segment(given, rank=1))
    low.close()
    given.close()
    with pytest.raises(WorkFailedError, match="adapter one@0: the segment of one@0 is closed"):
        await bench.pool.load(with_segment(given))
    assert bench.workers.asked == []


async def test_other_content_than_the_registry_knows_is_refused(bench: PoolBench) -> None:
    files = dataclasses.replace(bench.files("one"), digest="0" * 64)
    with pytest.raises(AdapterRejectedError, match=r"adapter one@0: its files have sha256 .*, not 0000"):
        await bench.pool.load(files)
    assert bench.is_empty()


@asynccontextmanager
async def admitted(bench: PoolBench, name: str) -> AsyncIterator[bool]:
    """A request as the engine treats it, from its pin to its end."""
    request = bench.new_request()
    lora = bench.pool.pin(version(name))
    try:
        yield lora is not None and await bench.pool.enter(version(name), request)
    finally:
        bench.pool.leave(version(name), request)
        if lora is not None:
            bench.pool.unpin(version(name))


@pytest.mark.parametrize("seed", range(5))
async def test_in_any_turmoil_a_request_runs_only_while_its_version_is_in_a_slot(
    bench: PoolBench, seed: int
) -> None:
    dice = random.Random(seed)
    names = ("one", "two", "three", "four", "five")
    await bench.load(*names)
    ran = 0

    async def request(name: str) -> None:
        nonlocal ran
        async with admitted(bench, name) as entered:
            for _ in range(dice.randrange(6) if entered else 0):
                number = bench.pool._held[version(name)].lora_id
                assert all(number in rank.active for rank in bench.workers.ranks)
                await asyncio.sleep(0)
                ran += 1

    async def change(name: str) -> None:
        try:
            await bench.pool.unload(version(name))
        except StaleError:
            return
        await bench.load(name)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for _ in range(200):
            kind = dice.random()
            task = group.create_task((change if kind < 0.1 else request)(dice.choice(names)))
            if kind > 0.9:
                asyncio.get_running_loop().call_later(dice.random() * 0.01, task.cancel)
            if dice.random() < 0.3:
                await asyncio.sleep(0)
    assert ran > 100
    assert await bench.pool.resident() == {version(name) for name in names}
    bench.pool._table.check_invariants()
    assert not any(slot.num_admitted for slot in bench.pool._table.snapshot().slots)


async def test_workers_hear_whether_requests_run(bench: PoolBench) -> None:
    """One that waits for the very version that is being prepared does not run."""
    heard: list[bool | None] = []

    async def hear(name: str, num_requests: int) -> None:
        bench.num_requests = num_requests
        await bench.load(name)
        heard.append(bench.workers.ranks[1].is_busy)

    await hear("one", 0)
    await hear("two", 1)
    for name in ("one", "two"):
        await bench.enter(name)
    _, waiting = bench.waits("three")
    await hear("three", 1)
    await hear("four", 2)
    assert heard == [False, True, False, True]
    waiting.cancel()
    await ends(waiting)
