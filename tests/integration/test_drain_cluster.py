"""Drains and a damaged store on a real cluster: real actors, ended and killed."""

import asyncio
from collections.abc import Iterator

import pytest

from loraserve.client_types import ClusterStatus
from loraserve.cluster.state import start_ticks
from loraserve.request import SamplingParams
from loraserve.samples import SampleSet
from tests.support.live_cluster import POLL_S, LiveCluster, completions, kill, wait_gone, wait_status

pytestmark = pytest.mark.ray

RECOVERY_S = 60.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, samples: SampleSet) -> Iterator[LiveCluster]:
    live = LiveCluster(cache=tmp_path_factory.mktemp("cache"), name="drains")
    live.up("--engine", "emulated", "--model", str(samples.model))
    try:
        for name in ("rank-8", "rank-64"):
            live.call("adapter", "add", name, str(samples.adapters[name]))
        yield live
    finally:
        live.down()


def states(status: ClusterStatus) -> list[str]:
    return [replica.state for replica in status.replicas]


async def test_a_drained_replica_ends_stays_down_over_a_new_controller_and_comes_back(
    cluster: LiveCluster,
) -> None:
    async with cluster.client(look_aside=False) as client:
        sampling = SamplingParams(max_tokens=500, ignore_eos=True)
        running = [
            asyncio.ensure_future(client.complete((index, 2), adapter="rank-8", sampling=sampling))
            for index in range(4)
        ]
        await wait_status(client, lambda s: s.router.in_flight == 4, RECOVERY_S, "all run")
        pid = (await client.status()).replicas[0].pid
        answer = await asyncio.to_thread(cluster.call, "drain", "replica-0", "--deadline", "0.2")
        assert [one["state"] for one in answer["replicas"]] == ["drained"]
        await wait_gone([pid], RECOVERY_S)
        assert [len(one.step.token_ids) for one in await asyncio.gather(*running)] == [500] * 4

        (controller,) = cluster.pids("ray::ControllerActor")
        before = await client.status()
        kill(controller)
        after = await wait_status(
            client,
            lambda s: s.controller_reachable and s.table_version > before.table_version,
            RECOVERY_S,
            "controller back",
        )
        assert states(after) == ["drained", "ready"]
        await asyncio.to_thread(cluster.call, "undrain", "replica-0")
        assert states(await client.status()) == ["ready", "ready"]


async def test_a_controller_that_finds_its_store_damaged_says_so_and_routers_serve_on(
    cluster: LiveCluster,
) -> None:
    (controller,) = cluster.pids("ray::ControllerActor")
    path = cluster.folder / "controller.sqlite"
    for name in (f"{path.name}-wal", f"{path.name}-shm"):
        (cluster.folder / name).unlink(missing_ok=True)
    path.write_bytes(b"damaged " * 4096)
    kill(controller)
    line = f"the controller cannot start: {path}: not a readable store"
    async with asyncio.timeout(RECOVERY_S):
        while line not in cluster.log("controller"):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
    assert start_ticks(controller) is None
    async with cluster.client() as client:
        answers = await completions(client, ["rank-8", "rank-64", ""], "Once")
    assert all(answer.step.token_ids for answer in answers)
    assert path.read_bytes() == b"damaged " * 4096, "it is left as it is"
