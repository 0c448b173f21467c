"""The keeper over replicas that do not end when told to, or end later than at first asked for."""

import asyncio
from collections.abc import Callable

import pytest

from loraserve.cluster.local_fleet import LocalFleet
from loraserve.controller import drains
from loraserve.controller.keeper import MAX_KILLS
from loraserve.engines.base import AdapterFiles
from loraserve.engines.description import ReplicaReport
from loraserve.errors import ReplicaStartError
from loraserve.fabric.wanted import PeerAddress
from loraserve.samples import SampleSet
from placement.cluster import messages
from placement.cluster.records import DrainOrder, ReplicaPhase
from placement.types import ReplicaId
from tests.support.controller_kit import TIMEOUT_S, Setup

R0 = ReplicaId("replica-0")
AT_ONCE = DrainOrder(deadline_s=0.0)


class FailingKills:
    """The first kills of a fleet fail; `killed` is set by the first that does not."""

    def __init__(self, fleet: LocalFleet, times: int) -> None:
        self.left = times
        self.killed = asyncio.Event()
        self._kill = fleet.kill

    async def __call__(self, replica_id: ReplicaId) -> None:
        if self.left:
            self.left -= 1
            raise ReplicaStartError(replica_id, "Ray does not remove its placement group")
        await self._kill(replica_id)
        self.killed.set()


def failing_kills(monkeypatch: pytest.MonkeyPatch, fleet: LocalFleet, times: int) -> FailingKills:
    kills = FailingKills(fleet, times)
    monkeypatch.setattr(fleet, "kill", kills)
    return kills


async def test_a_lost_replica_is_started_again_though_its_end_fails(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setup()
    controller = await one.start()
    version = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    # Once after the loss, and once more as it is to be started.
    kills = failing_kills(monkeypatch, one.fleet, 2)
    await one.fleet.lose(R0)
    await controller.wait_until(lambda: R0 not in controller.table.replicas, TIMEOUT_S)
    await controller.wait_until(
        lambda: one.fleet.starts.count(R0) == 2 and R0 in controller.state.holders(version), TIMEOUT_S
    )
    assert kills.left == 0


async def test_a_replica_whose_report_cannot_be_taken_in_is_lost_and_not_forgotten(
    setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setup()
    controller = await one.start()

    async def report() -> ReplicaReport:
        raise RuntimeError("a field is missing")

    # As a replica of another release may do.
    monkeypatch.setattr(one.fleet.links[R0], "report", report)
    await controller.wait_until(lambda: one.fleet.starts.count(R0) == 2, TIMEOUT_S)
    await controller.wait_until(lambda: R0 in controller.table.replicas, TIMEOUT_S)
    assert controller.state.replicas[R0].restarts == 1


async def test_a_load_that_fails_as_nobody_expects_is_refused_and_tried_again(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setup()
    controller = await one.start()

    async def load_adapter(files: AdapterFiles, peers: tuple[PeerAddress, ...] = ()) -> None:
        raise RuntimeError("a field is missing")

    with monkeypatch.context() as patched:
        patched.setattr(one.fleet.links[R0], "load_adapter", load_adapter)
        version = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
        await controller.wait_until(lambda: version in controller.state.replicas[R0].refused, TIMEOUT_S)
    assert version not in controller.state.replicas[R0].copies
    controller.end_epoch()
    await controller.wait_until(lambda: R0 in controller.state.holders(version), TIMEOUT_S)


async def test_a_drained_replica_is_ended_though_that_fails_at_first(
    setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setup()
    controller = await one.start()
    kills = failing_kills(monkeypatch, one.fleet, 2)
    drains.begin_drain(controller, [R0], AT_ONCE)
    async with asyncio.timeout(TIMEOUT_S):
        await kills.killed.wait()
    assert controller.state.replicas[R0].phase is ReplicaPhase.DRAINED
    assert R0 not in one.fleet.links


async def test_a_drained_replica_that_does_not_end_is_left_to_its_next_start(
    setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setup()
    controller = await one.start()
    kills = failing_kills(monkeypatch, one.fleet, MAX_KILLS)
    record = controller.state.replicas[R0]
    drains.begin_drain(controller, [R0], AT_ONCE)
    await controller.wait_until(lambda: record.phase is ReplicaPhase.DRAINED, TIMEOUT_S)
    drains.begin_undrain(controller, [R0])
    await controller.wait_until(lambda: record.phase is ReplicaPhase.READY, TIMEOUT_S)
    assert (kills.left, one.fleet.starts.count(R0)) == (0, 2)


async def test_a_drained_replica_that_its_controller_did_not_end_is_ended_by_the_next_one(
    setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setup()
    controller = await one.start()
    kills = failing_kills(monkeypatch, one.fleet, MAX_KILLS)
    drains.begin_drain(controller, [R0], AT_ONCE)
    await controller.wait_until(
        lambda: controller.state.replicas[R0].phase is ReplicaPhase.DRAINED, TIMEOUT_S
    )
    await one.crash()
    assert R0 in one.fleet.links
    kills.left = 0
    one.controller = one.make()
    controller = await one.start()
    async with asyncio.timeout(TIMEOUT_S):
        await kills.killed.wait()
    assert controller.state.replicas[R0].phase is ReplicaPhase.DRAINED
    assert R0 not in one.fleet.links


async def test_of_two_drains_the_later_one_says_how_many_requests_were_moved(
    setup: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, moved = setup(), list[int]()

    def note(step: messages.Event | messages.Command, stage: str) -> None:
        if isinstance(step, messages.ReplicaDrained) and stage == "before":
            moved.append(one.controller.keeper.moved[R0])

    one.on_step = note
    one.controller = one.make()
    controller = await one.start()
    waits, idle = asyncio.Event(), asyncio.Event()

    async def drain(deadline_s: float) -> int:
        if deadline_s > 0:
            waits.set()
            await idle.wait()
            return 0
        idle.set()
        for _ in range(10):
            # Whoever has waited for the end of the requests hears of it first.
            await asyncio.sleep(0)
        return 3

    monkeypatch.setattr(one.fleet.links[R0], "drain", drain)
    drains.begin_drain(controller, [R0], DrainOrder(deadline_s=60.0))
    async with asyncio.timeout(TIMEOUT_S):
        await waits.wait()
    drains.begin_drain(controller, [R0], AT_ONCE)
    await controller.wait_until(
        lambda: controller.state.replicas[R0].phase is ReplicaPhase.DRAINED, TIMEOUT_S
    )
    assert moved == [3]
