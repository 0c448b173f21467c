"""What is acquired is the adapter, from the nearest place that has it, and fetched once."""

import asyncio
from dataclasses import replace

import pytest

from loraserve.adapters.segment import map_segment
from loraserve.errors import AlreadyExistsError, UnavailableError
from loraserve.fabric.fabric import Fabric
from loraserve.fabric.wanted import Acquired, FetchFailedError, Wanted
from tests.support.fabric_kit import PLENTY, Library, Node, Town, from_peers, until


def check_is(acquired: Acquired, wanted: Wanted) -> None:
    """It is this version, byte for byte, and the engine's workers can map it."""
    head = acquired.segment.decoded
    assert (head.name, head.digest) == (wanted.version_id, wanted.digest)
    mapped = map_segment(acquired.segment.ref)
    mapped.verify()


async def test_it_comes_from_the_origin_and_then_from_peer_to_peer(town: Town, library: Library) -> None:
    wanted = library.large()
    first, second, third = town("first"), town("second"), town("third")
    for node, peers, source, peer in (
        (first, (), "origin", ""),
        (second, (first,), "peer", "first"),
        (third, (second, first), "peer", "second"),
    ):
        acquired = await node.fabric.acquire(from_peers(wanted, *peers, origin=not peers))
        check_is(acquired, wanted)
        assert (acquired.source, acquired.peer) == (source, peer)
        assert node.counts.loads == {"memory" if peers else "origin": 1}
        assert node.counts.held_bytes == acquired.size_bytes == acquired.segment.size_bytes
        node.check(idle=True)
    assert third.transports[0].asked == [("head", wanted.version_id), ("body", wanted.version_id)]


async def test_a_peer_comes_before_the_origin_but_not_without_the_heads_digest(
    town: Town, library: Library
) -> None:
    wanted = library()
    holder, node, other = await town.holder("holder", wanted), town("node"), town("other")
    acquired = await node.fabric.acquire(from_peers(wanted, holder, origin=True))
    assert acquired.source == "peer"
    unsure = replace(from_peers(wanted, holder, origin=True), head_sha256="")
    acquired = await other.fabric.acquire(unsure)
    assert acquired.source == "origin"
    assert other.transports[0].asked == []


async def test_what_is_released_stays_cached_and_published(town: Town, library: Library) -> None:
    wanted = library()
    holder, node = await town.holder("holder", wanted), town("node")
    holder.fabric.release(wanted.version_id)
    assert holder.counts.held_bytes == 0
    assert holder.counts.cached_bytes > 0
    await node.fabric.acquire(from_peers(wanted, holder))
    again = await holder.fabric.acquire(wanted)
    assert again.source == "cache"
    assert holder.counts.loads == {"origin": 1, "cache": 1}
    assert holder.fabric.published() == (wanted.version_id,)


async def test_a_version_is_held_until_it_is_released_as_often_as_it_was_acquired(
    town: Town, library: Library
) -> None:
    wanted, node = library(), town("node")
    for _ in range(2):
        await node.fabric.acquire(wanted)
    node.fabric.release(wanted.version_id)
    assert node.counts.held_bytes > 0
    for _ in range(2):
        node.fabric.release(wanted.version_id)
        assert node.counts.held_bytes == 0


async def test_those_who_want_the_same_share_one_fetch(town: Town, library: Library) -> None:
    wanted = library.large()
    holder, node = await town.holder("holder", wanted), town("node")
    told: list[tuple[int, int]] = []
    acquisitions = [
        node.fabric.acquire(from_peers(wanted, holder), on_progress=lambda *done: told.append(done))
        for _ in range(20)
    ]
    everywhere = await asyncio.gather(*acquisitions)
    assert len({id(one.segment) for one in everywhere}) == 1
    assert holder.memory().bodies_read == {wanted.version_id: 1}
    assert node.counts.shared_waits == 19
    body_bytes = everywhere[0].segment.body_bytes
    assert all(0 < done <= size == body_bytes for done, size in told)
    for left in reversed(range(20)):
        assert node.counts.held_bytes > 0
        node.fabric.release(wanted.version_id)
        assert (node.counts.held_bytes > 0) == (left > 0)


async def test_who_joins_a_fetch_that_fails_goes_on_to_the_sources_that_it_alone_knows(
    town: Town, library: Library
) -> None:
    """As a load that meets a fetch ahead, which knows no origin."""
    wanted = library.large()
    holder, node = await town.holder("holder", wanted), town("node")
    stage = node.stop_before_the_body(wanted)
    ahead = asyncio.create_task(node.fabric.prefetch(from_peers(wanted, holder)))
    await stage.wait()
    loads = [
        asyncio.create_task(node.fabric.acquire(from_peers(wanted, holder, origin=True))) for _ in range(2)
    ]
    await until(lambda: node.counts.shared_waits == 2)
    holder.die()
    stage.go()
    for load in loads:
        acquired = await load
        check_is(acquired, wanted)
        assert acquired.source == "origin"
    with pytest.raises(FetchFailedError, match="holder over memory: gone"):
        await ahead
    assert node.counts.loads == {"origin": 1}
    node.check(idle=True)


async def test_two_versions_of_one_name_at_once_are_two_things(town: Town, library: Library) -> None:
    old, new = library.large("same", seed=1), library.large("same", seed=2)
    holder, node = await town.holder("holder", old, new), town("node")
    got = await asyncio.gather(
        *[node.fabric.acquire(from_peers(one, holder)) for one in (old, new, old, new)]
    )
    for acquired, wanted in zip(got, (old, new, old, new), strict=True):
        check_is(acquired, wanted)
    assert node.counts.loads == {"memory": 2}


async def test_200_acquisitions_of_50_versions_fetch_each_once(town: Town, library: Library) -> None:
    versions = [library(f"n{number}") for number in range(50)]
    holders = [await town.holder("left", *versions[:30]), await town.holder("right", *versions[20:])]
    node = town("node", max_fetches=4, inflight_bytes=3 * versions[0].size_bytes)

    async def acquire(number: int) -> None:
        wanted = versions[number % 50]
        acquired = await node.fabric.acquire(from_peers(wanted, *holders, origin=True))
        check_is(acquired, wanted)
        node.check()

    await asyncio.gather(*[acquire(number) for number in range(200)])
    node.check(idle=True)
    read = holders[0].memory().bodies_read + holders[1].memory().bodies_read
    assert read == {one.version_id: 1 for one in versions}
    assert node.counts.shared_waits == 150
    assert node.counts.failures == {"not published": 20}, "those that only the second holder has"
    for number in range(200):
        node.fabric.release(versions[number % 50].version_id)
    assert node.counts.held_bytes == 0


async def test_another_content_under_the_same_version_is_refused(town: Town, library: Library) -> None:
    wanted, node = library(), town("node")
    other = replace(wanted, digest="0" * 64)
    coming = asyncio.create_task(node.fabric.acquire(wanted))
    await asyncio.sleep(0)
    with pytest.raises(AlreadyExistsError, match="is coming with sha256"):
        await node.fabric.acquire(other)
    await coming
    with pytest.raises(AlreadyExistsError, match="is here with sha256"):
        await node.fabric.acquire(other)


async def test_without_transports_there_is_the_origin(library: Library) -> None:
    fabric = Fabric((), capacity_bytes=PLENTY)
    assert fabric.addresses == ()
    assert (await fabric.acquire(library())).source == "origin"
    await fabric.close()
    with pytest.raises(UnavailableError, match="closed"):
        await fabric.acquire(library())


async def test_nobody_asks_itself(town: Town, library: Library) -> None:
    node: Node = town("node")
    acquired = await node.fabric.acquire(from_peers(library(), node, origin=True))
    assert acquired.source == "origin"
    assert node.transports[0].asked == []
