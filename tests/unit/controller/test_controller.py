"""The controller's shell over real stores, real PEFT files and in-process replicas."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from loraserve.adapters import StoredAdapter
from loraserve.clock import WallClock
from loraserve.engines.base import EngineInfo
from loraserve.engines.emulated import EmulatedEngine
from loraserve.errors import (
    AdapterRejectedError,
    AlreadyExistsError,
    BadInputError,
    NotFoundError,
    OverloadedError,
)
from loraserve.samples import SampleSet, build_adapter
from placement.cluster import messages
from placement.cluster.records import ReplicaPhase
from placement.types import AdapterName, ReplicaId, VersionId
from tests.support.controller_kit import TIMEOUT_S, Setup, small_config

R0 = ReplicaId("replica-0")


async def test_a_registered_adapter_is_on_every_replica_and_in_the_table(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    controller = await setup().start()
    version = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    await controller.wait_until(lambda: len(controller.state.holders(version)) == 2, TIMEOUT_S)
    entry = controller.state.table.entries[AdapterName("a")]
    assert entry.version_id == version
    assert entry.rank == 8


async def test_a_taken_name_is_refused_unless_it_is_to_be_replaced(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    controller = await setup().start()
    first = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    with pytest.raises(AlreadyExistsError, match="adapter a is registered"):
        await controller.register("a", str(samples.adapters["rank-16"]), replace=False)
    second = await controller.register("a", str(samples.adapters["rank-16"]), replace=True)
    assert first != second
    await controller.wait_until(
        lambda: all(list(record.copies) == [second] for record in controller.state.replicas.values()),
        TIMEOUT_S,
    )
    assert controller.state.is_served(second)
    assert list(controller.registrations) == [second], "the old version's files are forgotten"


async def test_what_no_engine_loads_leaves_no_trace(setup: Callable[..., Setup], samples: SampleSet) -> None:
    one = setup(refused_rank=16)
    controller = await one.start()
    good = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    with pytest.raises(AdapterRejectedError, match="not to my taste"):
        await controller.register("a", str(samples.adapters["rank-16"]), replace=True)
    with pytest.raises(AdapterRejectedError, match="not to my taste"):
        await controller.register("b", str(samples.adapters["rank-16"]), replace=False)
    assert controller.state.is_served(good)
    assert list(controller.state.active) == ["a"]
    assert len(controller.library.contents()) == 1


async def test_a_full_cluster_refuses_with_the_reason(
    setup: Callable[..., Setup], samples: SampleSet, tmp_path: Path
) -> None:
    controller = await setup(slots=1).start()
    for index, rank in enumerate(("rank-8", "rank-16")):
        await controller.register(f"a{index}", str(samples.adapters[rank]), replace=False)
    with pytest.raises(OverloadedError, match="no replica has room"):
        await controller.register("a2", str(samples.adapters["rank-32"]), replace=False)
    assert sorted(controller.state.table.entries) == ["a0", "a1"]


async def test_a_rank_that_no_replica_allows_is_refused(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    controller = await setup(engine={"max_lora_rank": 32}).start()
    with pytest.raises(AdapterRejectedError, match="rank is 64"):
        await controller.register("a", str(samples.adapters["rank-64"]), replace=False)


async def test_removal_takes_the_name_out_and_the_files_away(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    controller = await setup().start()
    await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    controller.remove("a")
    assert AdapterName("a") not in controller.state.table.entries
    with pytest.raises(NotFoundError, match="registered: none"):
        controller.remove("a")
    await controller.wait_until(lambda: not controller.registrations, TIMEOUT_S)
    assert controller.library.contents() == ()


async def test_content_that_is_being_registered_again_outlives_its_last_copy(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store finds the content there and reuses it; then the version that had it goes."""
    controller = await setup().start()
    source = str(samples.adapters["rank-8"])
    first = await controller.register("a", source, replace=False)
    add = controller.library.add_async

    async def add_while_it_goes(name: str, source: str, *, timeout_s: float) -> StoredAdapter:
        stored = await add(name, source, timeout_s=timeout_s)
        controller.remove("a")
        await controller.wait_until(
            lambda: not any(record.copies for record in controller.state.replicas.values()), TIMEOUT_S
        )
        return stored

    monkeypatch.setattr(controller.library, "add_async", add_while_it_goes)
    second = await controller.register("b", source, replace=False)
    assert controller.state.is_served(second)
    assert len(controller.library.contents()) == 1
    assert (list(controller.registrations), first != second) == ([second], True)


async def test_a_lost_replica_is_replaced_and_loaded_again(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup()
    controller = await one.start()
    version = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    await controller.wait_until(lambda: len(controller.state.holders(version)) == 2, TIMEOUT_S)
    await one.fleet.lose(R0)
    await controller.wait_until(
        lambda: controller.state.replicas[R0].phase is not ReplicaPhase.READY, TIMEOUT_S
    )
    assert R0 not in controller.state.table.replicas
    assert controller.state.is_served(version), "the other holder serves on"
    await controller.wait_until(lambda: len(controller.state.holders(version)) == 2, TIMEOUT_S)
    assert one.fleet.starts.count(R0) == 2


async def test_an_engine_that_dies_takes_its_replica_out_of_the_table(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup()
    controller = await one.start()
    engine = one.fleet.links[R0].server.engine
    assert isinstance(engine, EmulatedEngine)
    engine.crash("out of memory")
    await controller.wait_until(lambda: controller.state.replicas[R0].restarts == 1, TIMEOUT_S)
    assert "out of memory" in controller.state.replicas[R0].reason


async def test_a_restarted_controller_finds_registry_replicas_and_a_newer_table(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup(placement={"policy": "slora-random"})
    controller = await one.start()
    versions = [
        await controller.register(name, str(path), replace=False) for name, path in samples.adapters.items()
    ]
    before = controller.state.table
    after = (await one.restart()).state
    assert after.table.version > before.version
    assert after.table.entries == before.entries
    assert all(after.is_served(version) for version in versions)
    assert one.fleet.starts.count(R0) == 1, "the replica was adopted, not started again"


async def test_a_replica_that_died_with_the_controller_is_started_again(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    one = setup()
    controller = await one.start()
    version = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    await controller.stop()
    await one.fleet.lose(R0)
    controller = await one.restart()
    await controller.wait_until(lambda: len(controller.state.holders(version)) == 2, TIMEOUT_S)
    assert one.fleet.starts.count(R0) == 2


async def test_a_replica_that_never_starts_is_named_and_given_up(tmp_path: Path, samples: SampleSet) -> None:
    config = small_config(samples.model)

    class Broken(EmulatedEngine):
        async def start(self) -> EngineInfo:
            raise BadInputError("no such device")

    one = Setup(
        tmp_path,
        config,
        lambda replica, config: Broken(config.engine, config.emulated, config.model, clock=WallClock()),
    )
    controller = await one.start()
    assert str(controller.start_errors[R0]) == "replica replica-0 did not start: no such device"
    assert controller.state.replicas[R0].phase is ReplicaPhase.FAILED
    await controller.stop()


async def test_concurrent_registrations_all_succeed(
    setup: Callable[..., Setup], samples: SampleSet, tmp_path: Path
) -> None:
    controller = await setup().start()
    sources = [
        build_adapter(tmp_path / f"x{index}", samples.model, rank=8, seed=100 + index) for index in range(6)
    ]
    versions = await asyncio.gather(
        *(controller.register(f"x{i}", str(path), replace=False) for i, path in enumerate(sources))
    )
    assert len(set(versions)) == 6
    assert all(controller.state.is_served(version) for version in versions)


async def test_an_adapter_that_is_stored_while_answers_wait_is_not_taken_for_unneeded(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    controller = await setup().start()
    gone = VersionId("gone@0")

    async def answer() -> None:
        while not controller.state.adapters:
            controller.answered(messages.AdapterUnloaded(R0, gone))
            await asyncio.sleep(0)

    answering = asyncio.ensure_future(answer())
    version = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    await answering
    assert list(controller.registrations) == [version]
    assert len(controller.library.contents()) == 1
