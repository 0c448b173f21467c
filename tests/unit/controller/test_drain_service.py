"""Drains as an operator asks for them: through a router, over a cluster that works meanwhile."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path

import pytest

from loraserve.client import Client
from loraserve.client_types import DrainStatus
from loraserve.config import Config
from loraserve.controller.fleet import ReplicaLink
from loraserve.errors import BadInputError, NotFoundError, StaleError
from loraserve.request import SamplingParams
from loraserve.samples import SampleSet
from placement.cluster.records import ReplicaPhase
from placement.types import ReplicaId
from tests.support.cli import run_cli
from tests.support.local_cluster import LocalCluster, local_cluster

WAIT_S = 30.0


@pytest.fixture
async def cluster(tmp_path: Path, samples: SampleSet) -> AsyncIterator[LocalCluster]:
    async with local_cluster(tmp_path, samples) as one:
        yield one


async def drained(
    client: Client, *replicas: str, node: str = "", deadline_s: float | None = None, force: bool = False
) -> tuple[DrainStatus, ...]:
    """Wait for the end of a drain."""
    async with aclosing(client.drain(replicas, node=node, deadline_s=deadline_s, force=force)) as progress:
        return [statuses async for statuses in progress][-1]


class Impatience:
    """How engines sleep: as long as a step takes, until they are to `hurry`."""

    def __init__(self) -> None:
        self.hurry = asyncio.Event()
        self.hurry.set()

    async def __call__(self, seconds: float) -> None:
        if self.hurry.is_set():
            await asyncio.sleep(0)
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.hurry.wait()


async def test_requests_that_outlast_a_drain_go_on_elsewhere_and_lose_no_token(
    tmp_path: Path, samples: SampleSet
) -> None:
    sleep, sections = Impatience(), {"emulated": {"speed": 0.1}}
    async with local_cluster(tmp_path, samples, sleep=sleep, sections=sections) as cluster:
        # 40 ms a step, and 16 s for 400 tokens.
        sleep.hurry.clear()
        await outlast_a_drain(cluster, sleep.hurry)


async def outlast_a_drain(cluster: LocalCluster, hurry: asyncio.Event) -> None:
    sampling = SamplingParams(max_tokens=400, ignore_eos=True)
    async with Client(cluster.address, look_aside=False) as client:
        begun = asyncio.Barrier(9)

        async def run(index: int) -> int:
            stream = client.generate((index, 2, 3), adapter="rank-8", sampling=sampling)
            tokens = len((await anext(stream)).token_ids)
            async with asyncio.timeout(WAIT_S):
                await begun.wait()
            async for step in stream:
                tokens += len(step.token_ids)
            return tokens

        streams = [asyncio.ensure_future(run(index)) for index in range(8)]
        await begun.wait()
        # None of them can have ended by itself when their replica is told to end them.
        (status,) = await drained(client, "replica-0", deadline_s=0.0)
        assert (status.state, status.running) == ("drained", 0)
        assert status.moved > 0
        hurry.set()
        assert await asyncio.gather(*streams) == [400] * 8
        answer = await client.complete((1, 2, 3), adapter="rank-64", sampling=SamplingParams(max_tokens=5))
        assert answer.served_by.replica == "replica-1"
        states = {replica.replica_id: replica.state for replica in (await client.status()).replicas}
        assert states == {"replica-0": "drained", "replica-1": "ready"}
        with pytest.raises(StaleError, match=r"^draining replica-1 is refused: no replica would be left"):
            await drained(client, "replica-1")
        async with aclosing(client.undrain(["replica-0"])) as progress:
            states_seen = [one.state async for (one,) in progress]
        assert states_seen[-1] == "ready"


async def test_what_names_no_replica_is_refused(cluster: LocalCluster) -> None:
    async with Client(cluster.address) as client:
        with pytest.raises(NotFoundError, match="no replica replica-9; replicas: replica-0, replica-1"):
            await drained(client, "replica-9")
        with pytest.raises(NotFoundError, match="no replica is known on node n9; nodes: local"):
            await drained(client, node="n9")
        with pytest.raises(BadInputError, match="replica_ids, node_id: give one of them"):
            await drained(client)
        with pytest.raises(BadInputError, match="deadline_s: -1; expected seconds"):
            await drained(client, "replica-0", deadline_s=-1.0)
        with pytest.raises(StaleError, match="no replica would be left"):
            await drained(client, node="local")


async def test_a_node_s_drain_leaves_out_what_is_being_started_elsewhere(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, may_start = cluster.fleet.start, asyncio.Event()

    async def start_late(replica_id: ReplicaId, config: Config) -> ReplicaLink:
        await may_start.wait()
        return await start(replica_id, config)

    monkeypatch.setattr(cluster.fleet, "start", start_late)
    controller = cluster.controller
    lost = controller.state.replicas[ReplicaId("replica-0")]
    await cluster.fleet.lose(lost.replica_id)
    await controller.wait_until(lambda: lost.phase is ReplicaPhase.STARTING, WAIT_S)
    async with Client(cluster.address) as client:
        statuses = await drained(client, node="local", deadline_s=0.0, force=True)
        assert [(one.replica_id, one.state) for one in statuses] == [("replica-1", "drained")]
        assert await drained(client, node="local") == statuses, "what is drained already is done"
        assert lost.phase is ReplicaPhase.STARTING
        may_start.set()
        async with aclosing(client.undrain(node="local")) as progress:
            last = [statuses async for statuses in progress][-1]
        assert ("replica-1", "ready") in [(one.replica_id, one.state) for one in last]


async def test_the_commands_show_how_far_it_is_and_how_it_ended(cluster: LocalCluster) -> None:
    where = ("--address", cluster.address)
    ran = await run_cli("drain", "replica-0", "--deadline", "1", "--json", *where)
    assert ran.exit_code == 0, ran.stderr
    assert ran.json()["replicas"][0]["state"] == "drained"
    assert "replica-0 is drained" in ran.stderr
    refused, unnamed = await asyncio.gather(run_cli("drain", "replica-1", *where), run_cli("drain", *where))
    assert (refused.exit_code, unnamed.exit_code) == (1, 2)
    assert refused.stderr.startswith("error: draining replica-1 is refused: ")
    assert unnamed.stderr == "error: name the replicas, or a node by --node NODE\n"
    ran = await run_cli("undrain", "replica-0", *where)
    assert ran.exit_code == 0, ran.stderr
    assert ran.stdout == "replica-0 is ready\n"
