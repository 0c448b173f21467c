"""What replicas are told of their caches once an epoch, and what becomes of it there."""

import asyncio
import shutil
from collections.abc import Callable

from loraserve.controller.advice import MAX_SOON, advice_for, advise_replicas
from loraserve.request import GenerationRequest, SamplingParams
from loraserve.samples import SampleSet
from placement.cluster import messages
from placement.types import ReplicaId, VersionId
from tests.support.controller_kit import TIMEOUT_S, Setup
from tests.support.fabric_cluster import (
    REPLICAS,
    fabrics,
    failures,
    is_carried_out,
    loads,
    move,
    plan_of,
    started,
)
from tests.support.fabric_kit import until

ONE, TWO, THREE = REPLICAS


async def moved_away(setup: Callable[..., Setup], samples: SampleSet) -> tuple[Setup, list[VersionId]]:
    """All adapters are on the second replica, and in the first one's cache alone."""
    made, versions = await started(setup, samples, replica={"check_interval_s": 60})
    for where in (ONE, TWO):
        await move(made.controller, {version: {where} for version in versions})
    assert all(fabrics(made)[THREE].forget(version) for version in versions)
    await made.controller.refresh_reports()
    return made, versions


async def test_what_somebody_else_has_or_caches_is_no_last_copy(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made, versions = await moved_away(setup, samples)
    controller = made.controller
    assert advice_for(controller, ONE).last == frozenset()
    assert advice_for(controller, TWO).last == frozenset(), "what a copy needs is in no cache"
    num_read = loads(made)["origin"] - fabrics(made)[TWO].counts().loads.get("origin", 0)
    # Looked at whenever anything happens: before the lost replica comes back and takes them again.
    lost = asyncio.ensure_future(
        controller.wait_until(lambda: advice_for(controller, ONE).last == frozenset(versions), TIMEOUT_S)
    )
    await made.fleet.lose(TWO)
    await lost
    where = {version: {TWO} for version in versions}
    await controller.wait_until(lambda: is_carried_out(controller, where), TIMEOUT_S)
    assert advice_for(controller, ONE).last == frozenset()
    assert not failures(made)
    assert loads(made)["origin"] == num_read
    assert fabrics(made)[TWO].counts().loads == {"tcp": len(versions)}


async def test_what_is_cached_is_told_with_its_forecast(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made, versions = await moved_away(setup, samples)
    controller = made.controller
    assert advice_for(controller, ONE).demand_tokens_per_s == dict.fromkeys(versions, 0.0)
    request = GenerationRequest(
        request_id="r", prompt="Hello", version_id=versions[0], sampling=SamplingParams(max_tokens=8)
    )
    assert [step async for step in made.fleet.links[TWO].server.generate(request)]
    await controller.refresh_reports()
    controller.end_epoch()
    told = advice_for(controller, ONE).demand_tokens_per_s
    assert told == {version: controller.demand.forecast.get(version, 0.0) for version in versions}
    assert told[versions[0]] > 0


async def test_what_is_registered_no_more_leaves_the_caches_at_the_next_advice(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made, versions = await moved_away(setup, samples)
    controller, gone = made.controller, versions[0]
    before = fabrics(made)[ONE].counts().cached_bytes
    controller.remove(gone.rpartition("@")[0])
    await controller.wait_until(
        lambda: all(gone not in record.copies for record in controller.state.replicas.values()), TIMEOUT_S
    )
    assert gone in fabrics(made)[TWO].published(), "nothing but the advice takes it away"
    await controller.refresh_reports()
    assert advice_for(controller, ONE).gone == (gone,)
    assert gone not in advice_for(controller, ONE).demand_tokens_per_s
    advise_replicas(controller)
    await until(lambda: not any(gone in fabric.published() for fabric in fabrics(made).values()))
    assert 0 < fabrics(made)[ONE].counts().cached_bytes < before
    await until(lambda: not any(fabric.counts().leaving_bytes for fabric in fabrics(made).values()))
    assert set(fabrics(made)[ONE].published()) == set(versions[1:])


async def test_an_adapter_whose_files_are_gone_costs_the_others_no_advice(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made, versions = await started(
        setup, samples, names=("rank-8", "rank-16"), copies=12, slots=24, replica={"check_interval_s": 60}
    )
    controller = made.controller
    where: dict[VersionId, set[ReplicaId]] = {version: {ONE} for version in versions}
    await move(controller, where)
    await controller.refresh_reports()
    gone = controller.state.adapters[versions[0]].sha256
    shutil.rmtree(controller.library.directory_of(gone))
    where = {version: {TWO} for version in versions}
    controller.dispatch(messages.PlanGiven(plan_of(where), frozen=True))
    coming = set(versions) - set(controller.state.replicas[TWO].copies)
    good = {one for one in coming if controller.state.adapters[one].sha256 != gone}
    assert set() < good < coming
    assert {one.version_id for one in advice_for(controller, TWO).soon} == good


async def test_what_waits_for_room_is_fetched_ahead_from_those_who_have_it(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    """Two full replicas change all they have for each other's, and one place is free at a time."""
    num = MAX_SOON + 4
    made = setup(
        with_fabric=True,
        slots=num + 1,
        cluster={"replicas": 2},
        fabric={"transports": ["tcp"]},
        replica={"check_interval_s": 60},
    )
    controller = await made.start()
    smallest = str(samples.adapters["rank-8"])
    registered = await asyncio.gather(
        *(controller.register(f"a{number}", smallest, replace=False) for number in range(2 * num))
    )
    first, second = registered[:num], registered[num:]

    def here(one: ReplicaId, two: ReplicaId) -> dict[VersionId, set[ReplicaId]]:
        return {**{version: {one} for version in first}, **{version: {two} for version in second}}

    await move(controller, here(ONE, TWO))
    await controller.refresh_reports()
    assert advice_for(controller, ONE).soon == ()
    controller.dispatch(messages.PlanGiven(plan_of(here(TWO, ONE)), frozen=True))
    # Nothing has been carried out yet: that begins with the next turn of the loop.
    for replica, other, coming in ((ONE, TWO, second), (TWO, ONE, first)):
        soon = advice_for(controller, replica).soon
        loading = set(controller.state.replicas[replica].copies)
        assert len(soon) == MAX_SOON
        assert {one.version_id for one in soon} <= set(coming) - loading
        for one in soon:
            adapter = controller.state.adapters[one.version_id]
            assert one.directory is None, "the store is left to the first load"
            assert [peer.replica_id for peer in one.peers] == [other]
            assert (one.digest, one.rank, one.size_bytes) == (
                adapter.sha256,
                adapter.rank,
                adapter.size_bytes,
            )
            assert one.head_sha256 == controller.keeper.files_of(adapter).head_sha256
    advise_replicas(controller)
    where = here(TWO, ONE)
    await controller.wait_until(lambda: is_carried_out(controller, where), TIMEOUT_S)
    prefetches = [fabric.counts().prefetches for fabric in fabrics(made).values()]
    assert all(prefetches)
    assert loads(made)["origin"] == 2 * num
