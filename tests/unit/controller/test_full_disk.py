"""A controller whose disk is full: what it refuses, what it holds back, and that nothing is lost."""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from loraserve.controller import drains
from loraserve.controller.service import ManagementService
from loraserve.errors import WorkFailedError
from loraserve.rpc.v1 import management_pb2
from loraserve.samples import SampleSet, build_adapter
from placement.cluster import messages
from placement.cluster.records import DrainOrder, ReplicaPhase
from placement.types import AdapterName, ReplicaId
from tests.support.controller_kit import TIMEOUT_S, Setup
from tests.support.full_disk import full_disk

R0, R1 = ReplicaId("replica-0"), ReplicaId("replica-1")


async def test_changes_are_refused_with_the_file_named_and_leave_nothing(
    setup: Callable[..., Setup], samples: SampleSet, tmp_path: Path
) -> None:
    small = build_adapter(tmp_path / "small", samples.model, rank=1, seed=1)
    one = setup()
    controller = await one.start()
    kept = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    contents = controller.library.contents()
    path = one.folder / "controller.sqlite"
    with full_disk(path):
        with pytest.raises(WorkFailedError, match=f"^adapter b is not registered: {path}: .*disk"):
            await controller.register("b", str(small), replace=False)
        with pytest.raises(WorkFailedError, match=f"^adapter a is not removed: {path}: .*disk"):
            controller.remove("a")
        with pytest.raises(WorkFailedError, match=f"{path}: .*disk"):
            drains.begin_drain(controller, [R0], DrainOrder(deadline_s=1.0))
        assert controller.problem is not None
        assert str(path) in controller.problem
    assert list(controller.registrations) == [kept]
    assert controller.library.contents() == contents
    assert controller.state.replicas[R0].phase is ReplicaPhase.READY
    await controller.wait_until(lambda: controller.problem is None, TIMEOUT_S)
    controller = await one.restart()
    assert list(controller.registrations) == [kept]
    assert controller.is_served(kept)


async def test_a_full_disk_under_the_adapters_leaves_no_half_of_one(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup()
    controller = await one.start()
    folder = one.folder / "adapters"
    with (
        full_disk(folder, room_bytes=10_000),
        pytest.raises(WorkFailedError, match=f"^{folder}: no room for the adapter .*free some"),
    ):
        await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    assert list(folder.iterdir()) == []
    assert controller.registrations == {}
    await controller.register("a", str(samples.adapters["rank-8"]), replace=False)


async def test_a_table_is_given_out_only_once_it_is_durable_and_drops_wait_for_it(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup(placement={"policy": "slora-random"})
    controller = await one.start()
    versions = [
        await controller.register(name, str(path), replace=False) for name, path in samples.adapters.items()
    ]
    before = controller.table
    with full_disk(one.folder / "controller.sqlite"):
        await one.fleet.lose(R1)
        # Starts and loads go on: the other replica takes all of them, then the new one its share.
        await controller.wait_until(
            lambda: all(controller.state.holders(version) == (R0,) for version in versions), TIMEOUT_S
        )
        await controller.wait_until(
            lambda: any(controller.state.holders(version) == (R1,) for version in versions), TIMEOUT_S
        )
        assert controller.table is before, "what is not durable is not given out"
        assert controller.state.table.version > before.version
        assert controller.problem is not None
        held = set(one.fleet.links[R0].server.pool.resident())
        assert set(versions) <= held, "nothing is dropped before a table without it is out"
    await controller.wait_until(lambda: controller.problem is None, TIMEOUT_S)
    await controller.wait_until(lambda: len(controller.copies(R0)) < len(versions), TIMEOUT_S)
    assert controller.table.version == controller.state.table.version
    published = controller.table.version
    after = await one.restart()
    assert after.table.version > published
    assert all(after.is_served(version) for version in versions)


async def test_a_late_drop_is_not_carried_out_on_a_copy_that_is_wanted_again(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup(placement={"policy": "slora-random"})
    controller = await one.start()
    for name, path in samples.adapters.items():
        await controller.register(name, str(path), replace=False)
    with full_disk(one.folder / "controller.sqlite"):
        for lost in (R1, R0):
            await one.fleet.lose(lost)
            await controller.wait_until(
                lambda lost=lost: controller.state.replicas[lost].phase is ReplicaPhase.STARTING,  # type: ignore[misc]
                TIMEOUT_S,
            )
            await controller.wait_until(
                lambda lost=lost: bool(controller.copies(lost)),  # type: ignore[misc]
                TIMEOUT_S,
            )
    await controller.wait_until(lambda: controller.problem is None, TIMEOUT_S)
    await controller.wait_until(
        lambda: all(
            controller.copies(replica) == link.server.pool.resident()
            for replica, link in one.fleet.links.items()
        ),
        TIMEOUT_S,
    )
    for entry in controller.table.entries.values():
        for holder in entry.holders:
            assert entry.version_id in one.fleet.links[holder.replica_id].server.pool.resident()


async def test_a_controller_comes_back_on_a_full_disk_and_goes_on_when_there_is_room(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup()
    controller = await one.start()
    version = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    before = controller.table.version
    await one.crash()
    with full_disk(one.folder / "controller.sqlite"):
        controller = one.controller = one.make()
        controller.start()
        await controller.wait_until(lambda: controller.problem is not None, TIMEOUT_S)
        assert controller.table.version == 0, "routers keep the table that they have"
        assert controller.state.is_served(version)
    await controller.wait_until(controller.is_ready, TIMEOUT_S)
    assert controller.table.version > before
    assert controller.table.entries[AdapterName("a")].version_id == version
    assert one.fleet.starts.count(R0) == 1


def fill_at(one: Setup, kind: type[messages.Event], nth: int) -> ExitStack:
    """Have the disk full from the nth event of this kind on, until the stack is closed."""
    full, seen = ExitStack(), list[messages.Event]()

    def fill(step: messages.Event | messages.Command, stage: str) -> None:
        if isinstance(step, kind) and stage == "before":
            seen.append(step)
            if len(seen) == nth:
                full.enter_context(full_disk(one.folder / "controller.sqlite"))

    one.on_step = fill
    one.controller = one.make()
    return full


async def test_a_replacement_that_is_loaded_when_the_disk_fills_is_kept(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup()
    with fill_at(one, messages.AdapterRegistered, 2):
        controller = await one.start()
        first = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
        with pytest.raises(WorkFailedError, match=r"^a@\w+ is registered, but served only once .*disk"):
            await controller.register("a", str(samples.adapters["rank-16"]), replace=True)
        second = controller.state.adapters[controller.state.active[AdapterName("a")]]
        assert controller.table.entries[AdapterName("a")].version_id == first, "routers serve on"
        assert controller.state.is_served(second.version_id)
    await controller.wait_until(lambda: controller.is_served(second.version_id), TIMEOUT_S)
    await controller.wait_until(lambda: controller.library.contents() == (second.sha256,), TIMEOUT_S)
    controller = await one.restart()
    assert list(controller.registrations) == [second.version_id]
    assert controller.is_served(second.version_id)
    assert controller.library.contents() == (second.sha256,)


async def test_what_is_registered_again_outlives_a_deletion_that_waited_for_room(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup()
    with fill_at(one, messages.AdapterRegistered, 2):
        controller = await one.start()
        version = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
        with pytest.raises(WorkFailedError):
            await controller.register("a", str(samples.adapters["rank-16"]), replace=True)
        assert version not in controller.state.adapters
    # There is room, and the deletion of the first version still waits.
    assert await controller.register("a", str(samples.adapters["rank-8"]), replace=True) == version
    controller = await one.restart()
    assert controller.is_served(version)


async def test_a_removal_is_answered_once_a_table_without_the_name_is_out(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup()
    with fill_at(one, messages.AdapterRemoved, 1):
        controller = await one.start()
        await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
        request = management_pb2.RemoveAdapterRequest(name="a")
        removal = asyncio.ensure_future(ManagementService(controller).RemoveAdapter(request, None))
        await controller.wait_until(lambda: controller.problem is not None, TIMEOUT_S)
        assert AdapterName("a") in controller.table.entries
    async with asyncio.timeout(TIMEOUT_S):
        response = await removal
    assert AdapterName("a") not in controller.table.entries
    assert response.table_version == controller.table.version


async def test_files_that_cannot_be_deleted_are_tried_again_and_end_nothing(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = setup(placement={"epoch_s": 0.05})
    controller = await one.start()
    await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    remove, failed = controller.library.remove, asyncio.Event()

    def refuse_once(sha256: str) -> None:
        if not failed.is_set():
            failed.set()
            raise WorkFailedError("no room for the adapter; free some space")
        remove(sha256)

    monkeypatch.setattr(controller.library, "remove", refuse_once)
    controller.remove("a")
    async with asyncio.timeout(TIMEOUT_S):
        await failed.wait()
    # The event whose files could not be deleted, and the epochs, go on.
    await controller.wait_until(lambda: controller.library.contents() == (), TIMEOUT_S)
    assert controller.registrations == {}
    await one.fleet.lose(R0)
    await controller.wait_until(
        lambda: one.fleet.starts.count(R0) == 2 and controller.state.replicas[R0].phase is ReplicaPhase.READY,
        TIMEOUT_S,
    )


async def test_a_problem_stands_until_something_was_really_written(setup: Callable[..., Setup]) -> None:
    one = setup()
    controller = await one.start()
    with full_disk(one.folder / "controller.sqlite"):
        with pytest.raises(WorkFailedError):
            drains.begin_drain(controller, [R0], DrainOrder(deadline_s=1.0))
        problem = controller.problem
        assert problem is not None
        controller.dispatch(messages.EpochElapsed())
        assert controller.problem == problem, "nothing had to be written"
        await one.fleet.lose(R1)
        await controller.wait_until(lambda: R1 not in controller.state.table.replicas, TIMEOUT_S)
        drains.begin_undrain(controller, [R1])
        assert controller.problem == problem, "to delete a drain that is not there is no write"
    await controller.wait_until(lambda: controller.problem is None, TIMEOUT_S)
