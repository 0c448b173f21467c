"""Copies whose bytes a fabric brings: what is given back, what is fetched ahead, and what ends with it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from loraserve.config import parse_config
from loraserve.engines.base import EngineInfo
from loraserve.errors import AdapterRejectedError, DeadlineError, OverloadedError
from loraserve.fabric.advice import CacheAdvice
from loraserve.fabric.wanted import ORIGIN, PeerAddress
from loraserve.replica.pool import Residency
from loraserve.replica.server import ReplicaServer
from placement.types import ReplicaId, VersionId
from tests.support.copies_kit import RANK, MakeReplica, Replica, files_of, one_replica, some_copies
from tests.support.fabric_kit import Library, Town, a_town, from_peers, until
from tests.support.link_calls import linked
from tests.support.replica_bench import HeldEngine, ReplicaBench


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
async def town() -> AsyncIterator[Town]:
    async with a_town() as town:
        yield town


@pytest.fixture
async def make_replica(town: Town) -> AsyncIterator[MakeReplica]:
    async with AsyncExitStack() as stack:

        async def make(**options: int) -> Replica:
            return await stack.enter_async_context(one_replica(town, **options))

        yield make


@pytest.fixture
async def replica(make_replica: MakeReplica) -> Replica:
    return await make_replica()


async def test_the_engine_gets_the_segment_and_what_it_drops_is_kept(
    town: Town, library: Library, replica: Replica
) -> None:
    wanted = library()
    holder = await town.holder("holder", wanted)
    assert await replica.load(wanted, holder) == "memory"
    segment = replica.engine.given[wanted.version_id].segment
    assert segment is not None
    assert segment.decoded.digest == wanted.digest
    assert await replica.load(wanted, holder) == "", "it is there already"
    assert replica.node.counts.held_bytes == segment.size_bytes
    await replica.copies.unload(wanted.version_id)
    replica.check_idle()
    assert replica.node.fabric.cached() == (wanted.version_id,)
    assert await replica.load(wanted) == "cache"
    assert replica.node.counts.loads == {"memory": 1, "cache": 1}


async def test_what_the_engine_refuses_is_let_go_of(library: Library, replica: Replica) -> None:
    wanted = library()
    replica.engine.refused.add(wanted.version_id)
    with pytest.raises(AdapterRejectedError, match="not to my taste"):
        await replica.load(wanted)
    replica.check_idle()
    assert replica.node.fabric.forget(wanted.version_id)


async def test_a_load_that_is_cancelled_at_any_stage_leaves_nothing_behind(
    town: Town, library: Library, replica: Replica
) -> None:
    first, second = library("first"), library("second")
    holder = await town.holder("holder", first, second)
    stage = replica.node.stop_before_the_body(first)
    fetching = asyncio.ensure_future(replica.load(first, holder))
    await stage.wait()
    await replica.engine.allow(loads=0)
    loading = asyncio.ensure_future(replica.load(second, holder))
    await until(lambda: second.version_id in replica.engine.given)
    for load in (fetching, loading):
        load.cancel()
        await asyncio.sleep(0)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
    stage.go()
    await replica.engine.allow()
    await until(lambda: replica.pool.used_bytes == 0 and replica.node.fabric.is_idle)
    replica.check_idle()
    assert await replica.engine.resident() == frozenset()


async def test_a_load_that_is_cancelled_twice_is_still_taken_back(library: Library, replica: Replica) -> None:
    wanted = library()
    replica.engine.finishes_cancelled_loads = True
    await replica.engine.allow(loads=0)
    load = asyncio.ensure_future(replica.load(wanted))
    await until(lambda: wanted.version_id in replica.engine.given)
    replica.engine.may_unload.clear()
    load.cancel()
    await until(lambda: replica.engine.unloads_begun == 1)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert replica.node.counts.held_bytes > 0, "the engine has it still"
    replica.engine.may_unload.set()
    await replica.engine.allow()
    await until(lambda: replica.pool.used_bytes == 0)
    replica.check_idle()
    assert await replica.engine.resident() == frozenset()


async def test_a_load_that_is_cancelled_before_its_turn_is_taken_back_in_its_turn(
    library: Library, replica: Replica
) -> None:
    first, second = library("first"), library("second")
    await replica.engine.allow(loads=0)
    loading = asyncio.ensure_future(replica.load(first))
    await until(lambda: first.version_id in replica.engine.given)
    waiting = asyncio.ensure_future(replica.load(second))
    await until(lambda: second.version_id in replica.node.fabric.published())
    waiting.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert replica.engine.unloads_begun == 0, "the engine takes one change at a time"
    await replica.engine.allow()
    assert await loading == "origin"
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert replica.pool.resident() == (first.version_id,)
    assert await replica.engine.resident() == {first.version_id}


async def test_the_controller_is_asked_only_by_who_does_not_see_its_folder(
    town: Town, library: Library, replica: Replica
) -> None:
    seen, unseen = library("seen"), library("unseen")
    store = await town.holder("store", seen, unseen)
    controller = (PeerAddress(replica_id=ORIGIN, addresses=store.fabric.addresses),)
    for wanted, files, source in (
        (seen, files_of(seen), "origin"),
        (unseen, files_of(unseen, (store,)), "memory"),
    ):
        fetched = await replica.copies.load(files, controller)
        assert fetched is not None
        assert fetched.source == source
        assert replica.pool.residency(wanted.version_id) is Residency.RESIDENT
    assert store.memory().heads_read == {unseen.version_id: 1}


async def test_a_fetch_that_takes_too_long_is_a_refusal_and_ends(
    town: Town, library: Library, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraserve.replica.loading.FETCH_TIMEOUT_S", 0.05)
    wanted = library()
    holder = await town.holder("holder", wanted)
    stage = replica.node.stop_before_the_body(wanted)
    with pytest.raises(DeadlineError, match=r"not here after 0\.05 s"):
        await replica.load(wanted, holder)
    assert replica.pool.used_bytes == 0
    stage.go()
    await until(lambda: replica.node.fabric.is_idle)
    assert replica.node.fabric.published() == ()


async def test_a_version_waits_for_its_own_bytes_alone(
    town: Town, library: Library, replica: Replica
) -> None:
    slow, quick = library("slow"), library("quick")
    holder = await town.holder("holder", slow, quick)
    stage = replica.node.stop_before_the_body(slow)
    loads = [asyncio.ensure_future(replica.load(slow, holder)) for _ in range(2)]
    await stage.wait()
    assert await replica.load(quick, holder) == "memory"
    assert not any(load.done() for load in loads)
    dropping = asyncio.ensure_future(replica.copies.unload(slow.version_id))
    stage.go()
    assert sorted(await asyncio.gather(*loads)) == ["", "memory"]
    await dropping
    assert replica.pool.resident() == (quick.version_id,)


async def test_what_is_only_kept_makes_room_for_a_copy_even_if_nobody_else_keeps_it(
    library: Library, make_replica: MakeReplica
) -> None:
    """The store has all of it still; a plan that cannot be carried out serves nobody."""
    kept, wanted = library("kept"), library("wanted")
    replica = await make_replica(capacity_bytes=kept.size_bytes)
    fabric = replica.node.fabric
    await replica.load(kept)
    await replica.copies.unload(kept.version_id)
    replica.copies.advise(CacheAdvice(last=frozenset({kept.version_id})))
    with pytest.raises(OverloadedError):
        await fabric.prefetch(wanted)
    assert fabric.cached() == (kept.version_id,)
    assert await replica.load(wanted) == "origin"
    assert fabric.published() == (wanted.version_id,)
    with pytest.raises(OverloadedError):
        await replica.load(kept)
    assert replica.pool.resident() == (wanted.version_id,)


async def test_a_copy_is_a_last_one_only_as_long_as_the_advice_says_so(
    library: Library, make_replica: MakeReplica
) -> None:
    kept, wanted = library("kept"), library("wanted")
    replica = await make_replica(capacity_bytes=kept.size_bytes)
    fabric = replica.node.fabric
    await fabric.prefetch(kept)
    replica.copies.advise(CacheAdvice(last=frozenset({kept.version_id})))
    with pytest.raises(OverloadedError):
        await fabric.prefetch(wanted)
    replica.copies.advise(CacheAdvice())
    await fabric.prefetch(wanted)
    assert fabric.cached() == (wanted.version_id,)


# -- what is fetched ahead ---------------------------------------------------------------------


async def test_what_will_be_wanted_is_there_when_it_is_to_be_loaded(
    town: Town, library: Library, replica: Replica
) -> None:
    versions = [library(name) for name in "abc"]
    holder = await town.holder("holder", *versions)
    replica.copies.advise(CacheAdvice(soon=tuple(from_peers(one, holder) for one in versions)))
    await until(lambda: len(replica.node.fabric.cached()) == 3)
    assert [await replica.load(one) for one in versions] == ["cache"] * 3
    bodies = [key for what, key in replica.node.transports[0].asked if what == "body"]
    assert bodies == [one.version_id for one in versions]


async def test_newer_advice_replaces_what_was_to_be_fetched_ahead(
    town: Town, library: Library, replica: Replica
) -> None:
    begun, next_one, new = (library(name) for name in ("begun", "next", "new"))
    holder = await town.holder("holder", begun, next_one, new)
    stage = replica.node.stop_before_the_body(begun)
    replica.copies.advise(CacheAdvice(soon=(from_peers(begun, holder), from_peers(next_one, holder))))
    await stage.wait()
    replica.copies.advise(CacheAdvice(soon=(from_peers(new, holder),)))
    await until(lambda: new.version_id in replica.node.fabric.cached())
    stage.go()
    await until(lambda: replica.node.fabric.is_idle)
    assert replica.node.fabric.published() == (new.version_id,)


async def test_a_load_goes_on_with_a_fetch_that_is_not_wanted_ahead_any_more(
    town: Town, library: Library, replica: Replica
) -> None:
    wanted = library()
    holder = await town.holder("holder", wanted)
    stage = replica.node.stop_before_the_body(wanted)
    replica.copies.advise(CacheAdvice(soon=(from_peers(wanted, holder),)))
    await stage.wait()
    load = asyncio.ensure_future(replica.load(wanted, holder))
    await until(lambda: replica.node.counts.shared_waits == 1)
    replica.copies.advise(CacheAdvice())
    await asyncio.sleep(0)
    stage.go()
    assert await load == "memory"
    assert replica.node.counts.loads == {"memory": 1}


async def test_what_cannot_be_had_or_used_here_keeps_nothing_else_from_being_fetched_ahead(
    town: Town, library: Library, make_replica: MakeReplica, caplog: pytest.LogCaptureFixture
) -> None:
    absent, heavy, good = library("absent"), library.large("heavy"), library("good")
    holder = await town.holder("holder", heavy, good)
    replica = await make_replica(max_bytes=good.size_bytes)
    with caplog.at_level(logging.INFO, "loraserve.replica"):
        replica.copies.advise(
            CacheAdvice(soon=tuple(from_peers(one, holder) for one in (absent, heavy, good)))
        )
        await until(lambda: bool(replica.node.fabric.cached()))
    assert replica.node.fabric.published() == (good.version_id,)
    said = [record.message for record in caplog.records if "is not fetched ahead" in record.message]
    assert [line.partition(" ")[0] for line in said] == [absent.version_id, heavy.version_id]
    assert not any("\n" in line for line in said)
    steep = await make_replica(max_lora_rank=RANK - 1)
    with caplog.at_level(logging.INFO, "loraserve.replica"):
        steep.copies.advise(CacheAdvice(soon=(from_peers(good, holder),)))
        await until(lambda: "rank 4 is above 3" in caplog.text)


async def test_what_is_fetched_ahead_ends_with_the_replica(
    town: Town, library: Library, replica: Replica
) -> None:
    begun, next_one = library("begun"), library("next")
    holder = await town.holder("holder", begun, next_one)
    stage = replica.node.stop_before_the_body(begun)
    replica.copies.advise(CacheAdvice(soon=(from_peers(begun, holder), from_peers(next_one, holder))))
    await stage.wait()
    await replica.copies.stop()
    stage.go()
    await until(lambda: replica.node.fabric.is_idle)
    assert replica.node.fabric.published() == ()


async def test_what_is_registered_no_more_goes_unless_a_copy_needs_it(
    library: Library, replica: Replica
) -> None:
    cached, held = library("cached"), library("held")
    await replica.load(cached)
    await replica.copies.unload(cached.version_id)
    await replica.load(held)
    gone = CacheAdvice(gone=(cached.version_id, held.version_id, VersionId("unknown@0")))
    replica.copies.advise(gone)
    assert replica.node.fabric.published() == (held.version_id,)
    await replica.copies.unload(held.version_id)
    replica.copies.advise(gone)
    assert replica.node.fabric.published() == ()
    assert replica.node.counts.cached_bytes == 0
    await until(lambda: replica.node.counts.leaving_bytes == 0)


async def test_without_a_fabric_there_is_nothing_to_advise(library: Library) -> None:
    copies, _, engine = await some_copies(None)
    copies.advise(CacheAdvice(soon=(library(),)))
    assert await copies.load(files_of(library())) is None
    assert engine.given[library().version_id].segment is None
    await copies.stop()
    await engine.close()


@pytest.mark.parametrize("shares_processors", [True, False])
async def test_fetches_give_way_to_requests_where_the_engine_computes_on_the_same_processors(
    town: Town, monkeypatch: pytest.MonkeyPatch, shares_processors: bool
) -> None:
    config = parse_config({"engine": {"kind": "emulated"}})
    engine = HeldEngine(config.engine, config.emulated, config.model)
    info, fabric = await engine.start(), town("replica").fabric

    async def start() -> EngineInfo:
        return replace(info, shares_processors=shares_processors)

    asked: list[Callable[[], bool]] = []
    monkeypatch.setattr(engine, "start", start)
    monkeypatch.setattr(fabric, "give_way_while", asked.append)
    server = ReplicaServer(ReplicaId("r0"), config, engine, fabric=fabric)
    description = await server.start()
    async with linked(description.address) as router:
        bench = ReplicaBench(server=server, engine=engine, router=router)
        before = [is_busy() for is_busy in asked]
        call = await bench.running(version="")
        assert [before, [is_busy() for is_busy in asked]] == (
            [[False], [True]] if shares_processors else [[], []]
        )
        call.cancel()
    await server.stop(0.0)
