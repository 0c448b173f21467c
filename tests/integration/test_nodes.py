"""A cluster inside a Ray cluster of several nodes, which die and come."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loraserve.client import Client
from loraserve.errors import LoraServeError
from loraserve.samples import SampleSet
from tests.support.live_cluster import GREEDY, LiveCluster, completions, kill, wait_status
from tests.support.ray_nodes import RayNodes, ray_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RECOVERY_S = 60.0
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    with ray_nodes(tmp_path_factory.mktemp("ray"), cpus=1) as cluster:
        cluster.add("127.0.0.3", cpus=1)
        cluster.add("127.0.0.4", cpus=2)
        yield cluster


def start(live: LiveCluster, nodes: RayNodes, samples: SampleSet, replicas: int) -> None:
    live.up(
        "--ray-address", nodes.address, "--engine", "emulated", "--model", str(samples.model),
        "--replicas", str(replicas),
    )  # fmt: skip


def wait_log(live: LiveCluster, name: str, text: str) -> None:
    """Wait until a process has said so in its log."""
    deadline_s = time.monotonic() + RECOVERY_S
    while text not in live.log(name):
        assert time.monotonic() < deadline_s, f"{name} did not say: {text}"
        time.sleep(0.05)


def hosts(addresses: list[str]) -> list[str]:
    return sorted(address.rpartition(":")[0] for address in addresses)


@asynccontextmanager
async def streaming(client: Client, names: list[str]) -> AsyncIterator[list[str]]:
    """Streams one after the other for each adapter meanwhile; yields what went wrong so far."""
    expected = {
        name: answer.step.token_ids
        for name, answer in zip(names, await completions(client, names, PROMPT), strict=True)
    }
    problems: list[str] = []
    done = asyncio.Event()

    async def ask(name: str) -> int:
        streams = 0
        while not done.is_set():
            tokens: list[int] = []
            try:
                async for step in client.generate(PROMPT, adapter=name, sampling=GREEDY):
                    tokens += step.token_ids
            except LoraServeError as error:
                problems.append(f"{name}: {type(error).__name__}: {error}")
            else:
                streams += 1
                if tuple(tokens) != tuple(expected[name]):
                    problems.append(f"{name}: {tokens} instead of {expected[name]}")
        return streams

    asking = [asyncio.create_task(ask(name)) for name in names]
    try:
        yield problems
    finally:
        done.set()
        streams = await asyncio.gather(*asking)
    assert min(streams) > 0


def test_too_little_room_is_one_line_and_leaves_nothing(
    nodes: RayNodes, tmp_path: Path, samples: SampleSet
) -> None:
    live = LiveCluster(cache=tmp_path, environment=nodes.environment)
    done = live.run(
        "up", "--ray-address", nodes.address, "--engine", "emulated", "--model", str(samples.model),
        "--replicas", "5", "--port", "0", "--cluster", live.name,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = [one for one in done.stderr.splitlines() if one.startswith("error:")]
    assert "room for 4 of 5 replicas at 1 CPU each" in line
    assert "127.0.0.4: 2 of 2 CPU" in line
    assert not (live.folder / "cluster.json").exists()
    assert nodes.leftovers(live.name) == {"actors": 0, "groups": 0}


def test_a_missing_or_wrong_token_is_one_line(nodes: RayNodes, tmp_path: Path, samples: SampleSet) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    for variables, said in (
        ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, "no token was found"),
        ({"RAY_AUTH_TOKEN_PATH": str(wrong)}, "refuses the token"),
        ({"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE is disabled"),
    ):
        live = LiveCluster(cache=tmp_path, environment={**nodes.environment, **variables})
        done = live.run(
            "up", "--ray-address", nodes.address, "--engine", "emulated", "--model", str(samples.model),
            "--port", "0",
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert said in done.stderr
        assert "RAY_AUTH_TOKEN_PATH=FILE" in done.stderr


def test_down_finds_what_a_killed_head_has_left(nodes: RayNodes, tmp_path: Path, samples: SampleSet) -> None:
    live = LiveCluster(cache=tmp_path, name="orphan", environment=nodes.environment)
    start(live, nodes, samples, replicas=1)
    kill(live.running().head_pid)
    live.down()
    assert nodes.leftovers(live.name) == {"actors": 0, "groups": 0}


async def test_no_stream_is_lost_with_a_node_and_its_replica_starts_where_there_is_room(
    nodes: RayNodes, tmp_path: Path, samples: SampleSet
) -> None:
    live = LiveCluster(cache=tmp_path, environment=nodes.environment)
    await asyncio.to_thread(start, live, nodes, samples, 3)
    names = ["rank-8", "rank-128"]
    try:
        for name in names:
            await asyncio.to_thread(live.call, "adapter", "add", name, str(samples.adapters[name]))
        async with live.client() as client, streaming(client, names) as problems:

            async def ready_at(*expected: str) -> None:
                await wait_status(
                    client,
                    lambda status: (
                        hosts([one.address for one in status.replicas if one.state == "ready"])
                        == list(expected)
                        and all(one.state != "ready" or len(one.resident) == 2 for one in status.replicas)
                    ),
                    RECOVERY_S,
                    f"replicas at {expected}",
                )

            await ready_at("127.0.0.2", "127.0.0.3", "127.0.0.4")
            await asyncio.to_thread(nodes.kill, "127.0.0.3")
            await ready_at("127.0.0.2", "127.0.0.4", "127.0.0.4")
            await asyncio.to_thread(nodes.kill, "127.0.0.4")
            await ready_at("127.0.0.2")
            await asyncio.to_thread(wait_log, live, "controller", "waits for room for 0 of 1 replica")
            await asyncio.to_thread(nodes.add, "127.0.0.5", 2)
            await ready_at("127.0.0.2", "127.0.0.5", "127.0.0.5")
            assert problems == []
    finally:
        await asyncio.to_thread(live.down)
    assert nodes.leftovers(live.name) == {"actors": 0, "groups": 0}
