"""Replicas of machines that do not see the controller's store get adapters from the controller."""

import asyncio
import gc
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from loraserve.adapters.files import WEIGHTS_FILE
from loraserve.adapters.segment import build_segment
from loraserve.controller import origin
from loraserve.controller.keeper import ReplicaKeeper
from loraserve.controller.origin import Origin
from loraserve.engines.base import AdapterFiles
from loraserve.errors import AdapterRejectedError, UnavailableError
from loraserve.fabric.wanted import ORIGIN
from loraserve.samples import SampleSet
from loraserve.transport.base import NotPublishedError, Region
from loraserve.transport.registry import open_transports
from placement.types import AdapterVersion, VersionId
from tests.support.controller_kit import TIMEOUT_S, Setup
from tests.support.fabric_kit import until
from tests.support.segments import own_segments


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    files_of = ReplicaKeeper.files_of

    def unseen(self: ReplicaKeeper, adapter: AdapterVersion) -> AdapterFiles:
        return replace(files_of(self, adapter), directory=Path("/not/on/this/machine"))

    monkeypatch.setattr(ReplicaKeeper, "files_of", unseen)


@pytest.mark.usefixtures("far_away")
async def test_the_first_copy_comes_from_the_controller_and_the_others_from_peers(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made = setup(with_fabric=True, cluster={"replicas": 3}, fabric={"transports": ["tcp"]})
    controller = await made.start()
    controller.origin.open("127.0.0.1")
    peer = controller.origin.peer
    assert peer is not None
    assert (peer.replica_id, len(peer.addresses)) == (ORIGIN, 1)
    for name, source in samples.adapters.items():
        version = await controller.register(name, str(source), replace=False)
        state = controller.state
        await controller.wait_until(lambda: len(state.holders(version)) == 3, TIMEOUT_S)  # noqa: B023
    totals = [link.server.fabric.counts() for link in made.fleet.links.values() if link.server.fabric]
    assert sum(sum(one.loads.values()) for one in totals) == 3 * len(samples.adapters)
    assert not any(one.failures for one in totals)
    assert sum(one.loads.get("origin", 0) for one in totals) == 0


@pytest.mark.usefixtures("far_away")
async def test_without_the_controller_s_address_the_refusal_says_what_was_tried(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made = setup(with_fabric=True, fabric={"transports": ["tcp"]})
    controller = await made.start()
    with pytest.raises(Exception, match="rank-8@"):
        await controller.register("rank-8", str(samples.adapters["rank-8"]), replace=False)
    assert not controller.state.active


async def test_it_makes_segments_for_those_who_ask_and_keeps_only_a_few(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "MAX_KEPT", 3)
    made = setup()
    controller = await made.start()
    versions = [
        await controller.register(name, str(source), replace=False)
        for name, source in samples.adapters.items()
    ]
    before = own_segments()
    served = Origin(controller.library, lambda: controller.state.adapters)
    served.open("127.0.0.1")
    assert served.peer is not None
    opened = open_transports(["tcp"], host="127.0.0.1")
    (reader,) = opened.transports
    scheme, address = served.peer.addresses[0]
    assert scheme == "tcp"
    assert len(versions) > 3
    try:
        for version in versions:
            head, size_bytes = reader.read_head(address, version, idle_timeout_s=5.0)
            assert head == controller.library.segment_head(controller.state.adapters[version].sha256, version)
            body = bytearray(size_bytes)
            reader.fetch(
                address, version, body, on_bytes=lambda *_: None, idle_timeout_s=5.0, stop=lambda: False
            )
        gc.collect()
        # Each has a descriptor of its own and one of its mapping.
        assert own_segments() == before + 2 * 3
        with pytest.raises(NotPublishedError):
            reader.read_head(address, VersionId("nobody@0"), idle_timeout_s=5.0)
    finally:
        opened.close()
        served.close()
    gc.collect()
    assert own_segments() == before


async def test_what_is_made_for_others_takes_no_more_memory_than_it_may(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup()
    controller = await made.start()
    names = ("rank-64", "rank-8")
    large, small = [
        await controller.register(name, str(samples.adapters[name]), replace=False) for name in names
    ]
    before = own_segments()
    monkeypatch.setattr(origin, "ROOM_BYTES", 1)
    monkeypatch.setattr(origin, "STAY_S", 0.0)
    served = Origin(controller.library, lambda: controller.state.adapters)
    read = served._make(large)
    assert read is not None, "however large it is, it goes alone"
    made_next: list[Region | None] = []
    making = threading.Thread(target=lambda: made_next.append(served._make(small)))
    making.start()
    await until(lambda: large not in served._kept)
    assert making.is_alive(), "somebody reads the other one still"
    del read
    await until(lambda: not making.is_alive())
    assert [one is not None for one in made_next] == [True]
    monkeypatch.setattr(origin, "STAY_S", 60.0)
    monkeypatch.setattr(origin, "ROOM_WAIT_S", 0.0)
    with pytest.raises(UnavailableError, match="no memory left"):
        served._make(large)
    assert list(served._kept) == [small], "who has read its head comes for its body"
    served.close()
    made_next.clear()
    gc.collect()
    assert own_segments() == before


async def test_a_segment_that_cannot_be_made_takes_no_room(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup()
    controller = await made.start()
    version = await controller.register("rank-8", str(samples.adapters["rank-8"]), replace=False)
    monkeypatch.setattr(origin, "ROOM_BYTES", 1)
    monkeypatch.setattr(origin, "ROOM_WAIT_S", 0.0)
    served = Origin(controller.library, lambda: controller.state.adapters)
    with monkeypatch.context() as patched:
        patched.setattr(origin, "MAX_LORA_RANK", 1)
        with pytest.raises(AdapterRejectedError):
            served._make(version)
    assert served._make(version) is not None
    served.close()


async def test_files_that_were_changed_in_the_store_are_given_to_nobody(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made = setup()
    controller = await made.start()
    version = await controller.register("rank-8", str(samples.adapters["rank-8"]), replace=False)
    weights = controller.library.directory_of(controller.state.adapters[version].sha256) / WEIGHTS_FILE
    weights.chmod(0o600)
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    served = Origin(controller.library, lambda: controller.state.adapters)
    with pytest.raises(AdapterRejectedError, match="its files have sha256"):
        served._make(version)
    served.close()


async def test_what_nobody_asks_for_again_goes_after_a_while(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "KEEP_S", 0.0)
    made = setup()
    controller = await made.start()
    version = await controller.register("rank-8", str(samples.adapters["rank-8"]), replace=False)
    served = Origin(controller.library, lambda: controller.state.adapters)
    region = served._make(version)
    assert region is not None
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            await asyncio.to_thread(thread.join, TIMEOUT_S)
    assert not served._kept
    assert bytes(region.body[:1]), "who reads it still can"
    served.close()


async def test_what_is_made_while_it_closes_is_not_kept(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup()
    controller = await made.start()
    version = await controller.register("rank-8", str(samples.adapters["rank-8"]), replace=False)
    before = own_segments()
    served = Origin(controller.library, lambda: controller.state.adapters)

    def build_and_close(*args: object, **options: object) -> object:
        served.close()
        return build_segment(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("loraserve.controller.origin.build_segment", build_and_close)
    region = served._make(version)
    assert region is not None
    del region
    gc.collect()
    assert own_segments() == before
