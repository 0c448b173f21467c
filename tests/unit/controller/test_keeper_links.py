"""What a replica's process answers once another one has taken its place is no word of the new one's."""

import asyncio
from collections.abc import Callable

import pytest

from loraserve.cluster.local_fleet import LocalLink
from loraserve.controller import keeper
from loraserve.engines.base import AdapterFiles
from loraserve.engines.description import Fetched
from loraserve.errors import LoraServeError
from loraserve.fabric.wanted import PeerAddress
from loraserve.samples import SampleSet
from placement.cluster.records import ReplicaPhase
from placement.types import ReplicaId
from tests.support.controller_kit import TIMEOUT_S, Setup

R0 = ReplicaId("replica-0")


async def test_a_load_that_a_replaced_process_acknowledges_makes_no_holder(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup(with_fabric=True, cluster={"replicas": 1}, fabric={"transports": ["tcp"]})
    controller = await made.start()
    sources, load_adapter = controller.keeper.sources, LocalLink.load_adapter
    asked, go_on = asyncio.Event(), asyncio.Event()
    holders: list[frozenset[ReplicaId]] = []

    async def load(
        self: LocalLink, files: AdapterFiles, peers: tuple[PeerAddress, ...] = ()
    ) -> Fetched | None:
        holders.append(sources.holders(files.version_id))
        if len(holders) > 1:
            return await load_adapter(self, files, peers)
        asked.set()
        await go_on.wait()  # and hears nothing of its process's end
        return None

    version = await controller.register("a", str(samples.adapters["rank-8"]), replace=False)
    monkeypatch.setattr(LocalLink, "load_adapter", load)
    await made.fleet.lose(R0)
    async with asyncio.timeout(TIMEOUT_S):
        await asked.wait()
    await made.fleet.lose(R0)
    record = controller.state.replicas[R0]
    await controller.wait_until(
        lambda: len(made.fleet.starts) == 3 and record.phase is ReplicaPhase.READY, TIMEOUT_S
    )
    go_on.set()
    await controller.wait_until(lambda: controller.state.holders(version) == (R0,), TIMEOUT_S)
    assert holders == [frozenset(), frozenset()], "the new process has nothing before it says so"
    assert sources.holders(version) == {R0}


async def test_a_load_whose_answer_never_comes_is_a_refusal_and_leaves_no_copy(
    setup: Callable[..., Setup], samples: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = setup(cluster={"replicas": 1})
    controller = await made.start()
    load_adapter = LocalLink.load_adapter

    async def load(self: LocalLink, files: AdapterFiles, peers: tuple[PeerAddress, ...] = ()) -> None:
        await load_adapter(self, files, peers)
        await asyncio.Event().wait()

    source = str(samples.adapters["rank-8"])
    with monkeypatch.context() as patched:
        patched.setattr(keeper, "LOAD_TIMEOUT_S", 0.05)
        patched.setattr(LocalLink, "load_adapter", load)
        with pytest.raises(LoraServeError, match="not loaded within"):
            async with asyncio.timeout(TIMEOUT_S):
                await controller.register("a", source, replace=False)
    pool = made.fleet.links[R0].server.pool
    assert pool.used_bytes == 0
    version = await controller.register("a", source, replace=False)
    assert pool.resident() == (version,)
