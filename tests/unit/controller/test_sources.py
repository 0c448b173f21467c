"""From whom a loading replica gets its bytes: the nearest holder, and the origin once per version."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.controller.sources import AdapterSources
from loraserve.engines.description import FabricPlace, Fetched
from placement.types import ReplicaId, VersionId
from tests.support.controller_kit import TIMEOUT_S

V = VersionId("a@0")
ONE, TWO, THREE = (ReplicaId(f"replica-{number}") for number in range(3))
MIB = 1024**2


def place(host: str, name: str = "x") -> FabricPlace:
    return FabricPlace(host=host, addresses=(("tcp", name.encode()),))


def made(*hosts: str, racks: tuple[tuple[str, ...], ...] = ()) -> AdapterSources:
    sources = AdapterSources(racks)
    for number, host in enumerate(hosts):
        sources.met(ReplicaId(f"replica-{number}"), place(host, f"address-{number}"), ())
    return sources


async def peers_of(sources: AdapterSources, replica: ReplicaId) -> list[str]:
    async with asyncio.timeout(TIMEOUT_S), sources.turn(replica, V, 10 * MIB) as peers:
        return [peer.replica_id for peer in peers]


async def test_a_version_that_nobody_holds_is_read_from_the_origin_by_one_replica_alone() -> None:
    sources = made("h", "h", "h")
    order: list[str] = []
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with sources.turn(ONE, V, MIB) as peers:
            assert peers == ()
            inside.set()
            await go_on.wait()
            sources.has(ONE, V)
            order.append("first has it")

    async def later(replica: ReplicaId) -> None:
        async with sources.turn(replica, V, MIB) as peers:
            assert ONE in [peer.replica_id for peer in peers]
            order.append("later")
            sources.has(replica, V)

    tasks = [asyncio.ensure_future(first())]
    await inside.wait()
    tasks += [asyncio.ensure_future(later(replica)) for replica in (TWO, THREE)]
    await asyncio.sleep(0)
    assert order == []
    go_on.set()
    await asyncio.gather(*tasks)
    assert order == ["first has it", "later", "later"]


async def test_when_the_first_load_fails_the_next_one_reads_the_origin() -> None:
    sources = made("h", "h")
    inside, fail = asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with sources.turn(ONE, V, MIB):
            inside.set()
            await fail.wait()
            raise ValueError("it broke")

    task = asyncio.ensure_future(first())
    await inside.wait()
    second = asyncio.ensure_future(peers_of(sources, TWO))
    await asyncio.sleep(0)
    assert not second.done()
    fail.set()
    with pytest.raises(ValueError, match="it broke"):
        await task
    assert await second == []
    assert sources.holders(V) == frozenset()


async def test_a_first_load_that_hangs_does_not_keep_the_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loraserve.controller.sources.FIRST_WAIT_S", 0.001)
    sources = made("h", "h", "h")
    async with asyncio.timeout(TIMEOUT_S), sources.turn(ONE, V, MIB):
        async with sources.turn(TWO, V, MIB) as peers:
            assert peers == ()
            sources.has(TWO, V)
        assert await peers_of(sources, THREE) == [TWO], "the hanging one is still at it, and nobody asks it"
    assert sources.holders(V) == {TWO}


async def test_one_that_waits_and_is_cancelled_leaves_the_others_waiting() -> None:
    sources = made("h", "h", "h")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(sources.turn(ONE, V, MIB))
        waiting = [asyncio.ensure_future(peers_of(sources, replica)) for replica in (TWO, THREE)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.wait({waiting[0]})
        sources.has(ONE, V)
    assert await waiting[1] == [ONE]


async def test_the_same_host_comes_before_the_same_rack_and_that_before_the_rest() -> None:
    sources = made("here", "far", "near", "here", racks=(("here", "near"), ("far",)))
    for number in (1, 2, 3):
        sources.has(ReplicaId(f"replica-{number}"), V)
    assert await peers_of(sources, ONE) == ["replica-3", "replica-2", "replica-1"]


async def test_of_equals_the_one_that_gives_less_is_asked_first() -> None:
    sources = made("a", "b", "b", "c")
    sources.has(TWO, V)
    sources.has(THREE, V)
    async with sources.turn(ReplicaId("replica-3"), V, MIB) as busy:
        assert busy[0].replica_id == TWO
        assert await peers_of(sources, ONE) == [THREE, TWO]
    assert await peers_of(sources, ONE) == [TWO, THREE]


async def test_what_a_link_was_seen_to_carry_decides_between_holders() -> None:
    sources = made("a", "b", "c")
    sources.has(TWO, V)
    sources.has(THREE, V)
    assert await peers_of(sources, ONE) == [TWO, THREE]
    slow = Fetched(source="tcp", peer=TWO, size_bytes=10 * MIB, transfer_s=10.0)
    sources.has(ONE, VersionId("b@0"), slow)
    assert await peers_of(sources, ONE) == [THREE, TWO]
    # A small one says little, and nothing that has no duration.
    for fetched in (
        Fetched(source="tcp", peer=THREE, size_bytes=1000, transfer_s=10.0),
        Fetched(source="tcp", peer=THREE, size_bytes=10 * MIB, transfer_s=0.0),
    ):
        sources.has(ONE, VersionId("b@0"), fetched)
    assert await peers_of(sources, ONE) == [THREE, TWO]


async def test_one_transfer_does_not_tell_all_of_a_link() -> None:
    sources = made("a", "b", "c")
    for peer, seconds in ((TWO, 10.0), (THREE, 0.02), (TWO, 0.01)):
        fetched = Fetched(source="tcp", peer=peer, size_bytes=10 * MIB, transfer_s=seconds)
        sources.has(ONE, VersionId("b@0"), fetched)
    sources.has(TWO, V)
    sources.has(THREE, V)
    assert await peers_of(sources, ONE) == [THREE, TWO], "it was fast once, and slow before"


async def test_what_was_seen_of_a_replica_goes_with_it() -> None:
    sources = made("a", "b", "c")
    slow = Fetched(source="tcp", peer=TWO, size_bytes=10 * MIB, transfer_s=10.0)
    sources.has(ONE, VersionId("b@0"), slow)
    sources.lost(TWO)
    sources.met(TWO, place("b", "another process"), (V,))
    sources.has(THREE, V)
    assert await peers_of(sources, ONE) == [TWO, THREE], "its machine may be another one now"


async def test_nothing_is_remembered_of_versions_that_nobody_has() -> None:
    sources = made("h", "h")
    assert await peers_of(sources, ONE) == []
    assert not sources._versions, "its load has failed"
    sources.has(ONE, V)
    sources.has_not(ONE, V)
    sources.has_not(TWO, V)
    assert not sources._versions
    sources.caches(ONE, (V, VersionId("b@0")))
    sources.caches(ONE, (V,))
    sources.caches(TWO, (V,))
    assert sources._cached_at == {V: {ONE, TWO}}
    sources.lost(ONE)
    sources.caches(TWO, ())
    assert not sources._cached_at


async def test_who_caches_a_version_gives_it_while_it_lives_and_keeps_it() -> None:
    sources = made("h", "h")
    sources.caches(TWO, (V,))
    assert await peers_of(sources, ONE) == [TWO]
    assert sources.keepers(V) == {TWO}
    assert sources.holders(V) == frozenset()
    sources.caches(TWO, ())
    assert await peers_of(sources, ONE) == []
    sources.caches(TWO, (V,))
    sources.lost(TWO)
    sources.caches(TWO, (V,))  # A report of a process that is gone.
    assert await peers_of(sources, ONE) == []
    assert sources.keepers(V) == frozenset()


async def test_of_those_who_only_cache_a_version_one_keeps_it() -> None:
    sources = made("h", "h", "h")
    for replica in (TWO, THREE):
        sources.caches(replica, (V,))
    assert [sources.keeps_last(one, V) for one in (ONE, TWO, THREE)] == [False, True, False]
    sources.has(THREE, V)
    assert not any(sources.keeps_last(one, V) for one in (ONE, TWO)), "a copy needs it elsewhere"
    sources.has_not(THREE, V)
    sources.lost(TWO)
    assert sources.keeps_last(THREE, V)


async def test_a_replica_without_a_fabric_waits_for_nobody_and_gives_nothing() -> None:
    sources = made("h", "h")
    sources.met(THREE, FabricPlace(), (V,))
    async with sources.turn(ONE, V, MIB) as peers:
        assert peers == ()
        assert await peers_of(sources, THREE) == []


async def test_what_is_dropped_or_lost_is_no_source_any_more() -> None:
    sources = made("h", "h", "h")
    sources.met(TWO, place("h"), (V,))
    sources.met(THREE, place("h"), (V,))
    sources.has_not(TWO, V)
    assert await peers_of(sources, ONE) == [THREE]
    sources.lost(THREE)
    assert await peers_of(sources, ONE) == []
    sources.has(THREE, V)  # An answer of a process that is gone.
    assert sources.holders(V) == frozenset()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["load", "fail", "drop", "lose", "meet"]), st.integers(0, 3), st.integers(0, 1)
        ),
        max_size=30,
    )
)
def test_no_version_is_read_from_the_origin_while_somebody_holds_it(
    steps: list[tuple[str, int, int]],
) -> None:
    async def run() -> None:
        sources = made("a", "a", "b", "c")
        held: dict[str, set[int]] = {"v0": set(), "v1": set()}
        gone: set[int] = set()
        reads: Counter[str] = Counter()
        for action, number, which in steps:
            replica, name = ReplicaId(f"replica-{number}"), f"v{which}"
            version = VersionId(name)
            if action in ("load", "fail") and number not in gone:
                async with sources.turn(replica, version, MIB) as peers:
                    expected = {f"replica-{one}" for one in held[name] - {number}}
                    assert {peer.replica_id for peer in peers} == expected
                    reads[name] += not peers
                    if action == "load":
                        sources.has(replica, version)
                        held[name].add(number)
            elif action == "drop":
                sources.has_not(replica, version)
                held[name].discard(number)
            elif action == "lose":
                sources.lost(replica)
                gone.add(number)
                for one in held.values():
                    one.discard(number)
            elif action == "meet" and number in gone:
                gone.discard(number)
                sources.met(replica, place("a"), ())
            assert sources.holders(version) == {f"replica-{one}" for one in held[name]}

    asyncio.run(run())
