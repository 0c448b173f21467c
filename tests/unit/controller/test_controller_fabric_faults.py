"""Replicas that die, forget and lie while others take adapters from them: every copy arrives all the same."""

import asyncio
import gc
from collections.abc import Callable

import pytest

from loraserve.adapters.segment import map_segment
from loraserve.adapters.segment_head import SegmentHead
from loraserve.clock import ManualClock
from loraserve.controller.advice import advise_replicas
from loraserve.fabric.wanted import Wanted
from loraserve.samples import SampleSet
from loraserve.transport.base import Region
from placement.cluster import messages
from placement.types import AdapterName, ReplicaId, VersionId
from tests.support.controller_kit import TIMEOUT_S, Setup
from tests.support.fabric_cluster import (
    REPLICAS,
    fabrics,
    failures,
    in_town,
    is_carried_out,
    loads,
    move,
    node_of,
    plan_of,
    started,
)
from tests.support.fabric_kit import Node, Stage, Town, until
from tests.support.segments import own_segments

ONE, TWO, THREE = REPLICAS
QUIET = {"check_interval_s": 60}
"""Reports come only when the test asks for them."""


def stand_in_the_body(node: Node) -> Stage:
    """Have all that the node fetches stand still when the first bytes are there."""
    stage = Stage()

    def on_piece(begin: int, end: int) -> tuple[int, int]:
        stage.stand()
        return begin, end

    node.hooks.on_piece = on_piece
    return stage


def bodies_asked(*nodes: Node) -> int:
    return sum(
        what == "body" for node in nodes for transport in node.transports for what, _ in transport.asked
    )


def only_at(*replicas: ReplicaId, versions: list[VersionId]) -> dict[VersionId, set[ReplicaId]]:
    return {version: set(replicas) for version in versions}


async def verify(made: Setup) -> None:
    """All that the replicas keep is, to the last byte, what the controller's store has."""
    for fabric in fabrics(made).values():
        for version in fabric.published():
            adapter = made.controller.state.adapters[version]
            wanted = Wanted(
                version_id=version, digest=adapter.sha256, rank=adapter.rank, size_bytes=adapter.size_bytes
            )
            acquired = await fabric.acquire(wanted)
            assert acquired.source == "cache"
            assert acquired.segment.decoded.digest == adapter.sha256
            map_segment(acquired.segment.ref).verify()
            fabric.release(version)
        fabric.check_invariants()


async def test_loads_whose_giver_dies_in_the_middle_end_elsewhere(
    town: Town, setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made, versions = await started(setup, samples, make_fabric=in_town(town), replica=QUIET)
    await move(made.controller, only_at(ONE, versions=versions))
    takers = [node_of(town, replica) for replica in (TWO, THREE)]
    for taker in takers:
        assert all(taker.fabric.forget(version) for version in versions)
    await made.controller.refresh_reports()
    before = bodies_asked(*takers)
    stages = [stand_in_the_body(taker) for taker in takers]
    controller = made.controller
    controller.dispatch(messages.PlanGiven(plan_of(only_at(TWO, THREE, versions=versions)), frozen=True))
    # Four come to each replica at a time.
    await until(lambda: bodies_asked(*takers) == before + 8)
    dead = node_of(town, ONE)
    dead.die()
    for stage in stages:
        stage.go()
    await made.fleet.lose(ONE)
    await controller.wait_until(
        lambda: all({TWO, THREE} <= set(controller.state.holders(version)) for version in versions), TIMEOUT_S
    )
    counted = failures(made)
    assert counted["gone"] >= 8
    assert set(counted) <= {"gone", "unreachable", "refused"}
    assert not any(record.refused for record in controller.state.replicas.values())
    # It comes back empty, and takes part again.
    await controller.wait_until(
        lambda: made.fleet.starts.count(ONE) == 2 and controller.is_ready(), TIMEOUT_S
    )
    await move(controller, only_at(TWO, THREE, versions=versions))
    num_read = loads(made)["origin"]
    await move(controller, only_at(ONE, versions=versions))
    assert loads(made)["origin"] == num_read
    await verify(made)


async def test_a_holder_that_comes_back_takes_its_copies_from_the_caches_of_others(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made, versions = await started(setup, samples)
    for replica in (ONE, TWO):
        await move(made.controller, only_at(replica, versions=versions))
    await made.fleet.lose(TWO)
    where = only_at(TWO, versions=versions)
    await made.controller.wait_until(
        lambda: made.fleet.starts.count(TWO) == 2 and is_carried_out(made.controller, where), TIMEOUT_S
    )
    assert fabrics(made)[TWO].counts().loads == {"tcp": len(versions)}
    assert not failures(made)


async def test_what_a_cache_has_lost_comes_from_the_next_that_has_it(
    town: Town, setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made, versions = await started(
        setup, samples, names=["rank-8"], copies=5, make_fabric=in_town(town), replica=QUIET
    )
    await move(made.controller, only_at(ONE, versions=versions))
    await move(made.controller, only_at(TWO, versions=versions))
    await made.controller.refresh_reports()
    num_read = loads(made)["origin"]
    for replica in (ONE, THREE):
        assert all(fabrics(made)[replica].forget(version) for version in versions)
    # The controller still takes the first replica for a source.
    await move(made.controller, only_at(TWO, THREE, versions=versions))
    assert loads(made)["origin"] == num_read
    assert set(failures(made)) == {"not published"}
    assert not any(fabric.counts().breakers for fabric in fabrics(made).values()), "it has answered"
    await verify(made)


async def test_a_replica_that_gives_other_bytes_is_found_out_and_left_alone_for_a_while(
    town: Town, setup: Callable[..., Setup], samples: SampleSet
) -> None:
    clock = ManualClock()
    make_fabric = in_town(town, clock=clock)
    made, versions = await started(
        setup, samples, names=["rank-8"], copies=5, make_fabric=make_fabric, replica=QUIET
    )
    controller, taker = made.controller, node_of(town, THREE)
    where = only_at(ONE, TWO, versions=versions)
    await move(controller, where)
    for version in versions:
        taker.fabric.forget(version)
        give_other_bytes(made, node_of(town, ONE), version)
    before = taker.counts.loads.get("memory", 0)

    async def take(version: VersionId) -> None:
        where[version] = {ONE, TWO, THREE}
        await move(controller, where)

    # Of two that are as near the first is asked first, and found to lie, until it has done so too often.
    for version in versions[:3]:
        await take(version)
    assert failures(made) == {"corrupt": 3}
    await controller.refresh_reports()
    assert controller.reports[THREE].fabric.open_breakers == ("replica-0/memory",)
    await take(versions[3])
    assert failures(made) == {"corrupt": 3, "refused": 1}
    clock.advance(1.5)
    await take(versions[4])
    assert failures(made) == {"corrupt": 4, "refused": 1}
    assert taker.counts.loads["memory"] == before + 5
    await controller.refresh_reports()
    assert controller.reports[THREE].fabric.failures == {"corrupt": 4, "refused": 1}
    await verify(made)


def give_other_bytes(made: Setup, node: Node, version: VersionId) -> None:
    """Publish under the version's key, and with its own head, a body that is another's."""
    adapter = made.controller.state.adapters[version]
    head = made.controller.library.segment_head(adapter.sha256, version)
    size_bytes = SegmentHead.decode(head).body_bytes
    (transport,) = node.transports
    transport.withdraw(version)
    transport.publish(version, Region(head=head, body=bytes(size_bytes), size_bytes=size_bytes))


@pytest.mark.parametrize("how", ["in order", "by a kill"])
async def test_a_controller_that_comes_back_knows_where_copies_are_held_and_cached(
    setup: Callable[..., Setup], samples: SampleSet, how: str
) -> None:
    made, versions = await started(setup, samples, replica=QUIET)
    await move(made.controller, only_at(ONE, versions=versions))
    await move(made.controller, only_at(TWO, versions=versions))
    assert all(fabrics(made)[THREE].forget(version) for version in versions)
    num_read = loads(made)["origin"]
    if how == "in order":
        await made.restart()
    else:
        await made.crash()
        made.controller = made.make()
        await made.start()
    sources = made.controller.keeper.sources
    # From what the replicas say of themselves, before the first load of the new controller.
    assert all(sources.holders(version) == {TWO} for version in versions)
    assert all(sources.keepers(version) == {ONE, TWO} for version in versions)
    before = fabrics(made)[THREE].counts().loads
    await move(made.controller, only_at(THREE, versions=versions))
    after = fabrics(made)[THREE].counts().loads
    assert after["tcp"] == before.get("tcp", 0) + len(versions)
    assert loads(made)["origin"] == num_read
    assert not failures(made)
    await verify(made)


async def test_weights_that_are_replaced_while_the_old_ones_move_are_served_and_kept_alone(
    town: Town, setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made, (old, *_) = await started(
        setup, samples, make_fabric=in_town(town), names=["rank-8"], replica=QUIET
    )
    controller, taker = made.controller, node_of(town, TWO)
    await move(controller, {old: {ONE}})
    assert all(fabrics(made)[replica].forget(old) for replica in (TWO, THREE))
    await controller.refresh_reports()
    stage = stand_in_the_body(taker)
    controller.dispatch(messages.PlanGiven(plan_of({old: {TWO}}), frozen=True))
    await stage.wait()
    name = old.rpartition("@")[0]
    registering = asyncio.ensure_future(
        controller.register(name, str(samples.adapters["rank-16"]), replace=True)
    )
    state = controller.state
    await controller.wait_until(lambda: state.active[AdapterName(name)] != old, TIMEOUT_S)
    stage.go()
    new = await registering
    await controller.wait_until(
        lambda: (
            old not in state.adapters and not any(old in record.copies for record in state.replicas.values())
        ),
        TIMEOUT_S,
    )
    assert controller.is_served(new)
    await controller.refresh_reports()
    advise_replicas(controller)
    await until(lambda: {version for one in fabrics(made).values() for version in one.published()} == {new})
    assert not failures(made)
    await verify(made)


async def test_two_hundred_loads_at_once_take_each_version_from_the_store_once(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made, versions = await started(
        setup, samples, names=["rank-8", "rank-16"], copies=50, slots=100, replica=QUIET
    )
    await move(made.controller, only_at(ONE, versions=versions))
    for replica in (TWO, THREE):
        assert all(fabrics(made)[replica].forget(version) for version in versions)
    await made.controller.refresh_reports()
    before = loads(made)
    await move(made.controller, only_at(TWO, THREE, versions=versions))
    new = loads(made) - before
    assert sum(new.values()) == 200
    assert new["origin"] + before["origin"] == len(versions)
    assert not failures(made)
    await verify(made)
    for fabric in fabrics(made).values():
        fabric.check_invariants(idle=True)
    await made.fleet.close()
    gc.collect()
    assert own_segments() == 0
