"""A local Ray cluster of emulated replicas, its processes killed one kind after another."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from loraserve.client import Client, GenerationStream
from loraserve.cluster.processes import processes_of
from loraserve.request import SamplingParams
from loraserve.samples import SampleSet
from tests.support.live_cluster import LiveCluster, completions, kill, wait_gone, wait_status

pytestmark = pytest.mark.ray

RECOVERY_S = 40.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, samples: SampleSet) -> Iterator[LiveCluster]:
    live = LiveCluster(cache=tmp_path_factory.mktemp("cache"))
    live.up("--engine", "emulated", "--model", str(samples.model))
    try:
        for name, folder in samples.adapters.items():
            live.call("adapter", "add", name, str(folder))
        yield live
    finally:
        live.down()


@pytest.fixture
async def client(cluster: LiveCluster) -> AsyncIterator[Client]:
    async with cluster.client() as one:
        await wait_status(
            one,
            lambda status: [replica.state for replica in status.replicas] == ["ready", "ready"],
            RECOVERY_S,
            "both replicas ready",
        )
        yield one


async def test_every_adapter_answers_with_its_own_tokens(
    cluster: LiveCluster, client: Client, samples: SampleSet
) -> None:
    names = ["", *samples.adapters]
    answers = await completions(client, names, "Once upon a time")
    assert len({answer.step.token_ids for answer in answers}) == len(names)
    for name, answer in zip(names, answers, strict=True):
        assert (answer.adapter_version or "").partition("@")[0] == name
    again = await completions(client, names, "Once upon a time")
    assert [one.step.token_ids for one in again] == [one.step.token_ids for one in answers]


def test_status_shows_replicas_adapters_and_counters(cluster: LiveCluster) -> None:
    status = cluster.call("status")
    assert [replica["replica_id"] for replica in status["replicas"]] == ["replica-0", "replica-1"]
    assert {adapter["name"]: adapter["rank"] for adapter in status["adapters"]} == {
        "rank-8": 8,
        "rank-16": 16,
        "rank-32": 32,
        "rank-64": 64,
        "rank-128": 128,
    }
    assert status["controller_reachable"] is True
    people = cluster.run("status", "--cluster", cluster.name)
    assert people.returncode == 0
    assert "rank-128" in people.stdout


def test_a_second_up_of_the_same_name_is_refused_and_harms_nothing(
    cluster: LiveCluster, samples: SampleSet
) -> None:
    again = cluster.run("up", "--engine", "emulated", "--cluster", cluster.name, "--port", "0")
    assert again.returncode == 2
    assert "is running" in again.stderr
    assert cluster.call("status")["controller_reachable"] is True


def test_a_bad_adapter_is_one_line_and_exit_code_2(cluster: LiveCluster, tmp_path: Path) -> None:
    done = cluster.run("adapter", "add", "bad", str(tmp_path), "--cluster", cluster.name)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "adapter_config.json" in done.stderr


def test_a_registered_name_is_refused_without_replace(cluster: LiveCluster, samples: SampleSet) -> None:
    done = cluster.run("adapter", "add", "rank-8", str(samples.adapters["rank-8"]), "--cluster", cluster.name)
    assert done.returncode == 2
    assert "--replace" in done.stderr


def test_replay_answers_every_request_and_writes_a_report(cluster: LiveCluster, tmp_path: Path) -> None:
    out = tmp_path / "report"
    summary = cluster.call("replay", "demo", "--speedup", "20", "--out", str(out))
    assert {path.name for path in out.iterdir()} >= {"records.jsonl", "summary.json", "report.html"}
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert len(records) == 120
    assert {record["outcome"] for record in records} == {"ok"}
    assert summary["overall"]["requests"] == 120, sorted(summary)


async def test_requests_go_on_while_the_controller_is_killed_and_comes_back(
    cluster: LiveCluster, client: Client, samples: SampleSet
) -> None:
    before = await client.status()
    answers = {
        answer.request_id: answer.step.token_ids
        for answer in await completions(client, list(samples.adapters), "A quiet")
    }
    stop = asyncio.Event()

    async def keep_asking() -> int:
        asked = 0
        while not stop.is_set():
            got = await completions(client, list(samples.adapters), "A quiet")
            assert [one.step.token_ids for one in got] == list(answers.values())
            asked += len(got)
        return asked

    asking = asyncio.create_task(keep_asking())
    (controller,) = cluster.pids("ray::ControllerActor")
    kill(controller)
    away = await wait_status(client, lambda s: not s.controller_reachable, RECOVERY_S, "controller away")
    assert len(away.adapters) == 5, "the router still shows its last table"
    after = await wait_status(
        client,
        lambda s: s.controller_reachable and s.table_version > before.table_version,
        RECOVERY_S,
        "controller back",
    )
    stop.set()
    assert await asking > 0
    assert [adapter.version for adapter in after.adapters] == [one.version for one in before.adapters]
    assert [replica.pid for replica in after.replicas] == [replica.pid for replica in before.replicas]
    assert {one.name: one.holders for one in after.adapters} == {
        one.name: one.holders for one in before.adapters
    }


async def test_a_killed_replica_is_started_again_and_holds_its_adapters(
    cluster: LiveCluster, client: Client, samples: SampleSet
) -> None:
    before = await client.status()
    victim = before.replicas[0]
    kill(victim.pid)
    await wait_gone([victim.pid], 5.0)
    after = await wait_status(
        client,
        lambda s: s.replicas[0].pid not in (0, victim.pid) and len(s.replicas[0].resident) == 5,
        RECOVERY_S,
        "the replica is back",
    )
    assert after.replicas[1].pid == before.replicas[1].pid
    answers = await completions(client, list(samples.adapters), "Hello")
    assert all(answer.step.output_tokens == 16 for answer in answers)


async def test_requests_in_flight_on_a_killed_replica_go_on_elsewhere(
    cluster: LiveCluster, client: Client
) -> None:
    status = await client.status()
    long = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    wanted = (await client.complete("Tell me everything", adapter="rank-8", sampling=long)).step.token_ids
    streams = [client.generate("Tell me everything", adapter="rank-8", sampling=long) for _ in range(8)]
    async with asyncio.timeout(RECOVERY_S):
        firsts = await asyncio.gather(*(anext(stream) for stream in streams))
        kill(status.replicas[1].pid)
        rests = await asyncio.gather(*(rest_of(stream) for stream in streams))
    for first, rest in zip(firsts, rests, strict=True):
        assert [*first.token_ids, *rest] == list(wanted)
    assert any(stream.resumed for stream in streams)
    assert (await client.status()).router.in_flight == 0


async def rest_of(stream: GenerationStream) -> list[int]:
    return [token async for step in stream for token in step.token_ids]


@pytest.mark.slow
async def test_a_frozen_replica_is_as_good_as_dead(cluster: LiveCluster, client: Client) -> None:
    """Its connections stand and nothing comes: the router misses its signs of life, the client gRPC's."""
    before = await client.status()
    long = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    wanted = (await client.complete("Tell me everything", adapter="rank-8", sampling=long)).step.token_ids
    victim = before.replicas[1].pid
    async with cluster.client(look_aside=False) as proxied:
        streams = [
            one.generate("Tell me everything", adapter="rank-8", sampling=long)
            for one in (client, proxied)
            for _ in range(4)
        ]
        firsts = [await anext(stream) for stream in streams]
        os.kill(victim, signal.SIGSTOP)
        async with asyncio.timeout(RECOVERY_S):
            rests = [await rest_of(stream) for stream in streams]
    for first, rest in zip(firsts, rests, strict=True):
        assert [*first.token_ids, *rest] == list(wanted)
    for kind in (streams[:4], streams[4:]):
        assert any(stream.attempts > 1 or stream.served_by.failovers for stream in kind)
    await wait_status(
        client,
        lambda status: status.replicas[1].pid not in (0, victim) and status.replicas[1].state == "ready",
        RECOVERY_S,
        "the replica has been replaced",
    )
    await wait_gone([victim], 5.0)


async def test_a_killed_router_comes_back_at_its_address(cluster: LiveCluster, client: Client) -> None:
    (router,) = cluster.pids("ray::RouterActor")
    kill(router)
    await wait_gone([router], 5.0)
    async with cluster.client() as fresh:
        await fresh.wait_ready(RECOVERY_S)
        answer = await fresh.complete("Hello", adapter="rank-8", sampling=SamplingParams(max_tokens=4))
    assert answer.step.output_tokens == 4


def test_a_cluster_whose_head_was_killed_is_cleaned_up_by_down(tmp_path: Path, samples: SampleSet) -> None:
    live = LiveCluster(cache=tmp_path, name="orphan")
    live.up("--engine", "emulated", "--model", str(samples.model), "--replicas", "1")
    running = live.running()
    kill(running.head_pid)
    live.down()
    assert processes_of(running.run_id) == []


def test_a_replica_that_cannot_start_is_named_with_the_tail_of_its_log(
    tmp_path: Path, samples: SampleSet
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in samples.model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "tokenizer.json").write_text("{}")
    live = LiveCluster(cache=tmp_path / "cache", name="broken")
    done = live.run("up", "--engine", "emulated", "--model", str(model), "--cluster", "broken", "--port", "0")
    assert done.returncode == 1
    assert "replica replica-0 did not start" in done.stderr
    assert "tokenizer.json" in done.stderr
    assert not (live.folder / "cluster.json").exists()


def test_adapters_survive_down_and_up(tmp_path: Path, samples: SampleSet) -> None:
    live = LiveCluster(cache=tmp_path, name="again")
    arguments = ("--engine", "emulated", "--model", str(samples.model), "--replicas", "1")
    live.up(*arguments)
    live.call("adapter", "add", "mine", str(samples.adapters["rank-16"]))
    live.down()
    live.up(*arguments)
    try:
        (adapter,) = live.call("adapter", "list")["adapters"]
        assert adapter["name"] == "mine"
        generated = live.call("generate", "Hello", "--adapter", "mine", "--max-tokens", "3")
        assert generated
    finally:
        live.down()
