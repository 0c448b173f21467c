"""Adapters move between the processes of a Ray cluster: from peer to peer, through a kill, and without."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loraserve.client import Client
from loraserve.client_types import ClusterStatus
from loraserve.samples import SampleSet
from placement.plans.text import plan_text
from placement.types import ReplicaId, VersionId
from tests.support.fabric_cluster import plan_of
from tests.support.fabric_sockets import fabric_port, is_listened_on, unread_bytes
from tests.support.live_cluster import POLL_S, LiveCluster, completions, kill, wait_gone, wait_status
from tests.support.segments import holders

pytestmark = pytest.mark.ray

RECOVERY_S = 40.0
ONE, TWO, THREE = (ReplicaId(f"replica-{number}") for number in range(3))
Where = Mapping[VersionId, set[ReplicaId]]


def started(folder: Path, samples: SampleSet, config: str) -> LiveCluster:
    live = LiveCluster(cache=folder / "cache")
    file = folder / "config.toml"
    file.write_text(config)
    live.up("--engine", "emulated", "--model", str(samples.model), "--config", str(file))
    return live


async def registered(client: Client, samples: SampleSet) -> list[VersionId]:
    infos = [await client.register_adapter(name, str(one)) for name, one in samples.adapters.items()]
    return [VersionId(info.version) for info in infos]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, samples: SampleSet) -> Iterator[LiveCluster]:
    """Three replicas; at the end nothing of them is left, nor of those that were killed."""
    shared_memory = set(os.listdir("/dev/shm"))
    live = started(
        tmp_path_factory.mktemp("live"),
        samples,
        "[cluster]\nreplicas = 3\n[replica]\nmax_restarts = 20\n[placement]\nepoch_s = 1\n",
    )
    ports: list[int] = []
    try:
        yield live
        ports += [fabric_port(pid) for pid in live.pids("ray::ReplicaActor")]
    finally:
        live.down()
    assert not any(is_listened_on(port) for port in ports)
    assert not [pid for name in samples.adapters for pid in holders(name)]
    assert set(os.listdir("/dev/shm")) <= shared_memory


@pytest.fixture
async def client(cluster: LiveCluster) -> AsyncIterator[Client]:
    async with cluster.client() as one:
        await wait_status(
            one, lambda s: all(r.state == "ready" for r in s.replicas), RECOVERY_S, "all replicas are ready"
        )
        yield one


@asynccontextmanager
async def asking(client: Client, names: Sequence[str]) -> AsyncIterator[Counter[str]]:
    """Ask for all adapters again and again while the block runs; every answer must be the first one's.

    Gives how often each has answered by now.
    """
    first = [one.step.token_ids for one in await completions(client, names, "Once")]
    answered: Counter[str] = Counter()
    ending = asyncio.Event()

    async def ask(name: str, expected: Sequence[int]) -> None:
        while not ending.is_set():
            (answer,) = await completions(client, [name], "Once")
            assert answer.step.token_ids == expected
            answered[name] += 1

    tasks = [asyncio.create_task(ask(name, tokens)) for name, tokens in zip(names, first, strict=True)]
    try:
        yield answered
    finally:
        ending.set()
        await asyncio.gather(*tasks)


def sources(status: ClusterStatus) -> Counter[str]:
    return sum(
        (Counter({one.source: one.loads for one in replica.fabric.sources}) for replica in status.replicas),
        Counter(),
    )


async def carried_out(client: Client, where: Where) -> ClusterStatus:
    """The status once every replica has what the plan says, and nothing else."""

    def is_so(status: ClusterStatus) -> bool:
        return all(
            set(replica.resident)
            == {version for version, here in where.items() if replica.replica_id in here}
            for replica in status.replicas
        )

    return await wait_status(client, is_so, RECOVERY_S, f"the plan is carried out: {where}")


async def test_plans_move_adapters_from_peer_to_peer_under_load(
    cluster: LiveCluster, client: Client, samples: SampleSet, tmp_path: Path
) -> None:
    """Each version is read from the controller's store once, however often it moves, and no request fails."""
    versions = await registered(client, samples)
    plans: list[Where] = [
        {key: {ONE} for key in versions},
        {key: {TWO} for key in versions},
        {version: {(ONE, THREE)[number % 2]} for number, version in enumerate(versions)},
        {version: {TWO, THREE} for version in versions},
        {key: {ONE, TWO, THREE} for key in versions},
    ]
    async with asking(client, list(samples.adapters)) as answered:
        for number, where in enumerate(plans):
            before = answered.copy()
            file = tmp_path / f"{number}.json"
            file.write_text(plan_text(plan_of(where)))
            await asyncio.to_thread(cluster.call, "plan", "apply", str(file))
            status = await carried_out(client, where)
            await wait_status(
                client,
                lambda _: all(answered[name] > before[name] for name in samples.adapters),  # noqa: B023
                RECOVERY_S,
                "all adapters answer",
            )
    came = sources(status)
    assert came.pop("origin") == len(versions)
    assert came.pop("cache", 0) > 0
    assert set(came) <= {"ucx", "tcp"}
    assert sum(came.values()) > 0
    assert not any(replica.fabric.failures for replica in status.replicas)


async def test_a_replica_that_is_killed_while_others_fetch_from_it_costs_no_load_and_no_request(
    cluster: LiveCluster, client: Client, samples: SampleSet
) -> None:
    status = await client.status()
    names = list(samples.adapters)
    versions = [VersionId(one.version) for one in status.adapters]
    assert len(versions) == len(names)
    await client.apply_plan(plan_of({key: {ONE} for key in versions}))
    before = await carried_out(client, {key: {ONE} for key in versions})
    giver, *takers = [replica.pid for replica in before.replicas]
    for pid in takers:  # What they cached is gone with them.
        kill(pid)
    await wait_status(
        client,
        lambda s: all(
            replica.state == "ready" and replica.pid not in (0, old)
            for replica, old in zip(s.replicas[1:], takers, strict=True)
        ),
        RECOVERY_S,
        "the takers are back",
    )
    port = fabric_port(giver)
    wanted = {key: {TWO, THREE} for key in versions}
    async with asking(client, names) as answered:
        # It stands still, so that what is asked of it is under way when it dies.
        os.kill(giver, signal.SIGSTOP)
        applying = asyncio.create_task(client.apply_plan(plan_of(wanted)))
        async with asyncio.timeout(RECOVERY_S):
            while not unread_bytes(port):  # noqa: ASYNC110
                await asyncio.sleep(POLL_S)
        kill(giver)
        await applying
        after = await carried_out(client, wanted)
        asked = answered.copy()
        await wait_status(
            client, lambda _: all(answered[name] > asked[name] for name in names), RECOVERY_S, "all answer"
        )
    await wait_gone([giver], 5.0)
    failures: Counter[str] = Counter()
    for replica in after.replicas[1:]:
        failures.update(replica.fabric.failures)
    assert failures["unreachable"] + failures["gone"] > 0
    assert set(failures) <= {"unreachable", "gone", "refused"}
    final = await wait_status(
        client, lambda s: all(replica.state == "ready" for replica in s.replicas), RECOVERY_S, "it is back"
    )
    assert final.replicas[0].pid not in (0, giver)


async def test_adapters_that_are_removed_leave_no_memory_behind_once_an_epoch_has_ended(
    cluster: LiveCluster, client: Client, samples: SampleSet
) -> None:
    names = {one.name: VersionId(one.version) for one in (await client.status()).adapters}
    for where in ({ONE, TWO, THREE}, {TWO}):
        plan = dict.fromkeys(names.values(), where)
        await client.apply_plan(plan_of(plan))
        status = await carried_out(client, plan)
    assert status.replicas[0].fabric.cached_bytes > 0
    for name, version in names.items():
        # Copies are named after their version, in whatever process they are.
        assert holders(version)
        await client.remove_adapter(name)
    await wait_status(
        client,
        lambda s: not any(one.resident or one.fabric.cached_bytes for one in s.replicas),
        RECOVERY_S,
        "nothing is kept of them",
    )
    assert not any(holders(version) for version in names.values())


async def test_a_cluster_without_transports_serves_and_moves_as_before(
    tmp_path: Path, samples: SampleSet
) -> None:
    live = started(tmp_path, samples, "[fabric]\ntransports = []\n")
    try:
        async with live.client() as client:
            versions = await registered(client, samples)
            async with asking(client, list(samples.adapters)):
                for where in ({ONE}, {TWO}, {ONE, TWO}):
                    await client.apply_plan(plan_of(dict.fromkeys(versions, where)))
                    status = await carried_out(client, dict.fromkeys(versions, where))
            assert not sources(status)
            assert live.call("status")["replicas"][0]["fabric"]["sources"] == []
    finally:
        live.down()
