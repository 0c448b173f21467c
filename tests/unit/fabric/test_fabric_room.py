"""Bytes here, coming and going stay within the room and the budget, and the right ones give way."""

import asyncio
import logging
from dataclasses import replace

import pytest

from loraserve.clock import ManualClock
from loraserve.errors import OverloadedError
from loraserve.fabric.wanted import Acquired, Wanted
from loraserve.transport.memory import Fault, FaultKind
from tests.support.adapter_maker import one_line
from tests.support.fabric_kit import WAIT_S, Library, Node, Stage, Town, from_peers, until


def five(library: Library) -> list[Wanted]:
    """Five versions of one size."""
    return [library(f"n{number}") for number in range(5)]


def names(node: Node) -> list[str]:
    """What is here, by name."""
    return [version.partition("@")[0] for version in node.fabric.published()]


async def test_a_full_pool_refuses_in_one_line_and_takes_when_something_is_released(
    town: Town, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    versions = five(library)
    node = town("node", capacity_bytes=2 * versions[0].size_bytes)
    for wanted in versions[:2]:
        await node.fabric.acquire(wanted)
    with caplog.at_level(logging.WARNING), pytest.raises(OverloadedError, match="are in use") as error:
        await node.fabric.acquire(versions[2])
    assert [record.getMessage() for record in caplog.records] == [one_line(error.value)]
    assert node.counts.failures == {"overloaded": 1}
    node.fabric.release(versions[0].version_id)
    await node.fabric.acquire(versions[2])
    assert names(node) == ["n1", "n2"]
    assert (node.counts.evictions, node.counts.evicted_bytes) == (1, versions[0].size_bytes)
    node.check(idle=True)


async def test_what_is_larger_than_all_room_evicts_nothing(town: Town, library: Library) -> None:
    small, large = library("small"), library.large("large")
    node = town("node", capacity_bytes=small.size_bytes + 65536)
    holder = await town.holder("holder", library("other"))
    await node.fabric.prefetch(small)
    stage = node.stop_before_the_body(library("other"))
    running = asyncio.create_task(node.fabric.prefetch(from_peers(library("other"), holder)))
    await stage.wait()
    with pytest.raises(OverloadedError):
        await node.fabric.acquire(large)
    stage.go()
    await running
    assert names(node) == ["other", "small"]
    assert node.counts.gave_way == 0


async def test_one_that_turns_out_larger_than_told_needs_room_for_all_of_it(
    town: Town, library: Library
) -> None:
    small, large = library("small"), library.large("large")
    node = town("node", capacity_bytes=large.size_bytes)
    holder = await town.holder("holder", large)
    await node.fabric.acquire(small)
    for wanted in (replace(large, size_bytes=1), replace(from_peers(large, holder), size_bytes=1)):
        with pytest.raises(OverloadedError):
            await node.fabric.acquire(wanted)
        node.check(idle=True)
    node.fabric.release(small.version_id)
    await node.fabric.acquire(replace(large, size_bytes=1))
    assert names(node) == ["large"]


async def test_the_cheapest_to_get_back_goes_never_a_last_copy(town: Town, library: Library) -> None:
    clock = ManualClock()
    versions = five(library)
    node = town("node", capacity_bytes=3 * versions[0].size_bytes, clock=clock)
    for wanted in versions[:3]:
        await node.fabric.acquire(wanted)
        node.fabric.release(wanted.version_id)
        clock.advance(100)
    node.fabric.mark_last(versions[0].version_id, True)
    await node.fabric.prefetch(versions[3])
    assert names(node) == ["n0", "n2", "n3"], "the one that was idle longest, but for the last copy"
    node.fabric.set_demand({versions[2].version_id: 5000.0})
    await node.fabric.prefetch(versions[4])
    assert names(node) == ["n0", "n2", "n4"], "nobody is expected to ask for it"
    for wanted in (versions[2], versions[4]):
        node.fabric.mark_last(wanted.version_id, True)
    with pytest.raises(OverloadedError):
        await node.fabric.acquire(versions[1])
    node.fabric.mark_last(versions[0].version_id, False)
    await node.fabric.acquire(versions[1])
    assert names(node) == ["n1", "n2", "n4"]


async def test_a_last_copy_that_has_gone_and_come_back_is_one_only_if_said_again(
    town: Town, library: Library
) -> None:
    versions = five(library)
    node = town("node", capacity_bytes=versions[0].size_bytes)
    await node.fabric.prefetch(versions[0])
    node.fabric.mark_last(versions[0].version_id, True)
    assert node.fabric.forget(versions[0].version_id)
    await until(lambda: node.counts.leaving_bytes == 0)
    await node.fabric.prefetch(versions[0])
    await node.fabric.prefetch(versions[1])
    assert names(node) == ["n1"]


async def test_no_more_are_kept_than_there_are_descriptors_for(town: Town, library: Library) -> None:
    clock = ManualClock()
    versions = five(library)
    node = town("node", clock=clock, max_cached=2)
    for wanted in versions[:4]:
        await node.fabric.acquire(wanted)
        clock.advance(100)
    assert names(node) == ["n0", "n1", "n2", "n3"], "what is used is not counted"
    for wanted in versions[:4]:
        node.fabric.release(wanted.version_id)
        clock.advance(100)
    assert names(node) == ["n2", "n3"], "those that were let go of last"
    await node.fabric.prefetch(versions[4])
    assert names(node) == ["n3", "n4"]
    node.fabric.mark_last(versions[3].version_id, True)
    node.fabric.mark_last(versions[4].version_id, True)
    await node.fabric.prefetch(versions[0])
    assert names(node) == ["n3", "n4"], "it has come, and went at once"
    await until(lambda: node.counts.leaving_bytes == 0)


async def test_a_version_is_forgotten_on_demand_but_not_while_it_is_used(
    town: Town, library: Library
) -> None:
    wanted, node = library(), town("node")
    await node.fabric.acquire(wanted)
    assert not node.fabric.forget(wanted.version_id)
    node.fabric.release(wanted.version_id)
    assert node.fabric.forget(wanted.version_id)
    assert node.fabric.forget(wanted.version_id)
    assert node.counts.cached_bytes == 0
    assert names(node) == []


async def test_what_is_evicted_takes_room_until_its_last_reader_has_ended(
    town: Town, library: Library
) -> None:
    first, second = library.large("first"), library.large("second")
    holder, reader = town("holder", capacity_bytes=first.size_bytes), town("reader", idle_timeout_s=WAIT_S)
    await holder.fabric.prefetch(first)
    stall = holder.inject(FaultKind.STALL, 10)
    reading = asyncio.create_task(reader.fabric.acquire(from_peers(first, holder)))
    assert await asyncio.to_thread(stall.reached.wait, WAIT_S)
    waiting = asyncio.create_task(holder.fabric.acquire(second))
    await until(lambda: holder.counts.leaving_bytes > 0)
    holder.check()
    assert names(holder) == []
    assert holder.counts.num_waiting == 1, "its room is not free yet"
    stall.release.set()
    acquired = await reading
    assert acquired.segment.decoded.digest == first.digest
    await waiting
    assert holder.counts.leaving_bytes == 0
    holder.check(idle=True)


async def test_room_that_a_fetch_gives_back_soon_is_waited_for_and_nothing_evicted(
    town: Town, library: Library
) -> None:
    kept, given_up, wanted = (library.large(name) for name in ("kept", "given up", "wanted"))
    holder = await town.holder("holder", given_up, wanted)
    node = town("node", capacity_bytes=wanted.size_bytes + kept.size_bytes + 65536)
    await node.fabric.prefetch(kept)
    stage = node.stop_before_the_body(given_up)
    ending = asyncio.create_task(node.fabric.acquire(from_peers(given_up, holder)))
    await stage.wait()
    ending.cancel()
    coming = asyncio.create_task(node.fabric.acquire(from_peers(wanted, holder)))
    await until(lambda: node.counts.num_waiting == 1)
    assert names(node) == ["kept"]
    stage.go()
    await coming
    assert names(node) == ["kept", "wanted"]
    assert node.counts.evictions == 0


async def leaving(town: Town, first: Wanted, *pinned: Wanted) -> tuple[Node, Fault, "asyncio.Task[Acquired]"]:
    """A full replica that has evicted its first version while a peer reads it, and has these others."""
    room = first.size_bytes + sum(one.size_bytes for one in pinned)
    holder, reader = town("holder", capacity_bytes=room), town("reader", idle_timeout_s=WAIT_S)
    await holder.fabric.prefetch(first)
    for one in pinned:
        await holder.fabric.acquire(one)
    stall = holder.inject(FaultKind.STALL, 10)
    reading = asyncio.create_task(reader.fabric.acquire(from_peers(first, holder)))
    assert await asyncio.to_thread(stall.reached.wait, WAIT_S)
    assert holder.fabric.forget(first.version_id)
    return holder, stall, reading


async def test_who_waits_for_room_takes_what_is_released_meanwhile(town: Town, library: Library) -> None:
    first, second, third = five(library)[:3]
    holder, stall, reading = await leaving(town, first, second)
    waiting = asyncio.create_task(holder.fabric.acquire(third))
    await until(lambda: holder.counts.num_waiting == 1)
    holder.fabric.release(second.version_id)
    await waiting
    assert holder.counts.leaving_bytes == first.size_bytes, "the reader has not ended"
    stall.release.set()
    await reading


async def test_a_fetch_that_waits_for_more_room_ends_when_nobody_wants_it(
    town: Town, library: Library
) -> None:
    first, second = library("first"), library("second")
    holder, stall, reading = await leaving(town, first)
    waiting = asyncio.create_task(holder.fabric.acquire(replace(second, size_bytes=0)))
    await until(lambda: holder.counts.num_fetching == 1 and not waiting.done())
    await asyncio.wait((waiting,), timeout=0.05)
    waiting.cancel()
    await until(lambda: holder.fabric.is_idle)
    assert holder.counts.leaving_bytes == first.size_bytes, "the reader has not ended"
    assert names(holder) == []
    stall.release.set()
    await reading


async def test_bytes_in_flight_stay_in_the_budget_in_order_and_a_larger_one_goes_alone(
    town: Town, library: Library
) -> None:
    small, large = five(library)[:4], library.large()
    holder = await town.holder("holder", *small, large)
    node = town("node", max_fetches=10, inflight_bytes=2 * small[0].size_bytes)
    stages: dict[str, Stage] = {one.version_id: Stage() for one in (*small, large)}
    node.hooks.before_body = lambda key, stop: stages[key].stand()
    order = [small[0], small[1], large, small[2], small[3]]
    tasks = [asyncio.create_task(node.fabric.acquire(from_peers(one, holder))) for one in order]
    for together in ([small[0], small[1]], [large], [small[2], small[3]]):
        for one in together:
            await stages[one.version_id].wait()
        node.check()
        assert node.counts.num_fetching == len(together)
        assert sum(stage.reached.is_set() for stage in stages.values()) == order.index(together[-1]) + 1
        for one in together:
            stages[one.version_id].go()
    await asyncio.gather(*tasks)
    node.check(idle=True)


async def test_a_prefetch_goes_behind_acquisitions_and_gives_way_to_them(
    town: Town, library: Library
) -> None:
    early, late, wanted = five(library)[:3]
    holder, node = await town.holder("holder", early, late, wanted), town("node", max_fetches=1)
    stage = node.stop_before_the_body(early)
    prefetches = [asyncio.create_task(node.fabric.prefetch(from_peers(one, holder))) for one in (early, late)]
    await stage.wait()
    acquiring = asyncio.create_task(node.fabric.acquire(from_peers(wanted, holder)))
    await until(lambda: node.counts.num_waiting == 2)
    node.check()
    stage.go()
    await acquiring
    await asyncio.gather(*prefetches)
    bodies = [key for what, key in node.transports[0].asked if what == "body"]
    assert bodies == [one.version_id for one in (early, wanted, late, early)]
    assert (node.counts.gave_way, node.counts.failures) == (1, {})
    assert node.counts.held_bytes == wanted.size_bytes
    node.check(idle=True)


async def test_a_prefetch_that_somebody_waits_for_gives_way_no_more(town: Town, library: Library) -> None:
    early, other = library.large("early"), library.large("other")
    holder, node = await town.holder("holder", early, other), town("node", max_fetches=1)
    stage = node.stop_before_the_body(early)
    prefetch = asyncio.create_task(node.fabric.prefetch(from_peers(early, holder)))
    await stage.wait()
    acquiring = [asyncio.create_task(node.fabric.acquire(from_peers(one, holder))) for one in (early, other)]
    await until(lambda: node.counts.num_waiting == 1)
    stage.go()
    await asyncio.gather(prefetch, *acquiring)
    assert node.counts.gave_way == 0
    assert node.counts.held_bytes == early.size_bytes + other.size_bytes


async def test_a_prefetch_that_always_gives_way_is_given_up(town: Town, library: Library) -> None:
    versions = five(library)
    holder = await town.holder("holder", *versions)
    node = town("node", max_fetches=1, max_giving_way=2)
    stages = [Stage() for _ in range(3)]
    left = iter(stages)
    first = versions[0].version_id
    node.hooks.before_body = lambda key, stop: next(left).stand() if key == first else None
    prefetch = asyncio.create_task(node.fabric.prefetch(from_peers(versions[0], holder)))
    for number, stage in enumerate(stages):
        await stage.wait()
        other = from_peers(versions[number + 1], holder)
        acquiring = asyncio.create_task(node.fabric.acquire(other))
        await until(lambda: node.counts.num_waiting == 1)
        stage.go()
        await acquiring
    with pytest.raises(OverloadedError, match="gave way too often"):
        await prefetch
    node.check(idle=True)


async def test_an_acquisition_takes_the_room_of_a_prefetch_that_runs(town: Town, library: Library) -> None:
    early, wanted = library.large("early"), library.large("wanted")
    holder = await town.holder("holder", early, wanted)
    node = town("node", capacity_bytes=early.size_bytes + 65536)
    stage = node.stop_before_the_body(early)
    prefetch = asyncio.create_task(node.fabric.prefetch(from_peers(early, holder)))
    await stage.wait()
    acquiring = asyncio.create_task(node.fabric.acquire(from_peers(wanted, holder)))
    await until(lambda: node.counts.num_waiting == 1)
    stage.go()
    await acquiring
    with pytest.raises(OverloadedError):
        await prefetch
    assert names(node) == ["wanted"]
    node.check(idle=True)


async def test_what_is_prefetched_is_there_when_it_is_wanted(town: Town, library: Library) -> None:
    wanted = library()
    holder, node = await town.holder("holder", wanted), town("node")
    await node.fabric.prefetch(from_peers(wanted, holder))
    assert (node.counts.held_bytes, node.counts.cached_bytes) == (0, wanted.size_bytes)
    assert (await node.fabric.acquire(from_peers(wanted, holder))).source == "cache"
    await node.fabric.prefetch(from_peers(wanted, holder))
    assert node.counts.prefetches == 1
