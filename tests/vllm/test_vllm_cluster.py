"""Two real vLLM replicas behind the router: the same tokens as vLLM alone, through every kill."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from loraserve.client import Client, GenerationStream
from loraserve.cluster.processes import parent_of
from loraserve.request import SamplingParams
from loraserve.samples import SampleSet
from tests.support.live_cluster import LiveCluster, kill, wait_gone, wait_status
from tests.support.vllm_bench import MAX_TOKENS, PROMPTS

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="session")]

NAMES = ("", "rank-8", "rank-16", "rank-32", "rank-64", "rank-128")
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
RECOVERY_S = 120.0
ENGINE_TITLE = b"VLLM::EngineCor"
LONG_TOKENS = 400
"""Of one stream: still under way when the process that serves it is killed."""

References = Mapping[str, Sequence[list[int]]]


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, samples: SampleSet, references: References
) -> Iterator[LiveCluster]:
    """`references` first: one engine at a time starts faster on two cores."""
    live = LiveCluster(cache=tmp_path_factory.mktemp("cache"))
    config = tmp_path_factory.mktemp("config") / "config.toml"
    config.write_text("[replica]\nmax_restarts = 20\n")
    live.up(
        "--config",
        str(config),
        "--engine",
        "vllm",
        "--model",
        str(samples.model),
        "--dtype",
        "float32",
        "--adapter-slots",
        "5",
    )
    try:
        for name, folder in samples.adapters.items():
            live.call("adapter", "add", name, str(folder))
        yield live
    finally:
        live.down()


@pytest_asyncio.fixture(loop_scope="session")
async def client(cluster: LiveCluster) -> AsyncIterator[Client]:
    """A client, once both replicas hold all five adapters."""
    async with cluster.client() as one:
        await wait_status(
            one,
            lambda status: all(len(replica.resident) == 5 for replica in status.replicas),
            RECOVERY_S,
            "both replicas hold everything",
        )
        yield one


async def ask_all(client: Client, order: Sequence[str]) -> dict[str, list[list[int]]]:
    """Every prompt with every adapter, all in flight together."""
    pairs = [(name, prompt) for prompt in PROMPTS for name in order]
    answers = await asyncio.gather(
        *(client.complete(prompt, adapter=name, sampling=GREEDY) for name, prompt in pairs)
    )
    found: dict[str, list[list[int]]] = {name: [] for name in order}
    for (name, _), answer in zip(pairs, answers, strict=True):
        found[name].append(list(answer.step.token_ids))
    return found


async def test_mixed_batches_through_the_router_equal_vllm_alone(
    client: Client, references: References
) -> None:
    for seed in range(3):
        order = random.Random(seed).sample(NAMES, len(NAMES))
        assert await ask_all(client, order) == references


async def test_streams_carry_the_same_tokens_and_name_their_weights(
    client: Client, references: References
) -> None:
    for name in NAMES:
        stream = client.generate(PROMPTS[0], adapter=name, sampling=GREEDY)
        steps = [step async for step in stream]
        assert [token for step in steps for token in step.token_ids] == references[name][0]
        assert (stream.adapter_version or "").partition("@")[0] == name
        assert stream.served_by is not None
        assert stream.served_by.replica in ("replica-0", "replica-1")


async def test_both_replicas_take_part(client: Client) -> None:
    answers = await asyncio.gather(
        *(client.complete(PROMPTS[0], adapter="rank-8", sampling=GREEDY) for _ in range(8))
    )
    assert {answer.served_by.replica for answer in answers if answer.served_by} == {
        "replica-0",
        "replica-1",
    }


async def test_a_killed_controller_costs_no_request_and_no_replica(
    cluster: LiveCluster, client: Client, references: References
) -> None:
    before = await client.status()
    (controller,) = cluster.pids("ray::ControllerActor")
    asking = asyncio.create_task(ask_all(client, NAMES))
    kill(controller)
    assert await asking == references
    after = await wait_status(
        client,
        lambda s: s.controller_reachable and s.table_version > before.table_version,
        RECOVERY_S,
        "controller back",
    )
    assert [replica.pid for replica in after.replicas] == [replica.pid for replica in before.replicas]
    assert {one.name: one.version for one in after.adapters} == {
        one.name: one.version for one in before.adapters
    }
    assert await ask_all(client, NAMES) == references


async def test_a_killed_replica_takes_its_engine_with_it_and_comes_back_the_same(
    cluster: LiveCluster, client: Client, references: References
) -> None:
    before = await wait_status(
        client,
        lambda s: s.controller_reachable and all(replica.pid for replica in s.replicas),
        RECOVERY_S,
        "the controller, who alone knows the pids, answers",
    )
    victim = before.replicas[0].pid
    engine = engine_of(victim)
    kill(victim)
    await wait_gone([victim, engine], 5.0)
    assert await ask_all(client, NAMES) == references, "the other holder serves on"
    await wait_status(
        client,
        lambda s: s.replicas[0].pid not in (0, victim) and len(s.replicas[0].resident) == 5,
        RECOVERY_S,
        "the replica is back",
    )
    assert await ask_all(client, NAMES) == references


@pytest.mark.parametrize(("what", "look_aside"), [("replica", True), ("engine", False)])
async def test_streams_outlive_the_replica_that_serves_them_token_by_token(
    cluster: LiveCluster, what: str, look_aside: bool
) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=LONG_TOKENS, ignore_eos=True)
    async with cluster.client(look_aside=look_aside) as client:
        before = await wait_status(
            client,
            lambda s: s.controller_reachable and all(len(one.resident) == 5 for one in s.replicas),
            RECOVERY_S,
            "both replicas hold everything",
        )
        # Looked for before the streams begin: they end within a second or two.
        victim = before.replicas[0].pid
        if what == "engine":
            victim = engine_of(victim)
        wanted = [await client.complete(PROMPTS[1], adapter=name, sampling=sampling) for name in NAMES]
        streams = [client.generate(PROMPTS[1], adapter=name, sampling=sampling) for name in NAMES]
        begun = await asyncio.gather(*(_read(stream, 8) for stream in streams))
        kill(victim)
        rests = await asyncio.gather(*(_read(stream, 10_000) for stream in streams))
        for one, first, rest in zip(wanted, begun, rests, strict=True):
            assert first[0] + rest[0] == list(one.step.token_ids)
            assert first[1] + rest[1] == one.step.text
        moved = [stream.attempts > 1 or stream.served_by.failovers > 0 for stream in streams]
        assert any(moved), (
            f"process {victim} served none of the streams, so the test shows nothing; they were served by "
            f"{[stream.served_by for stream in streams]}; the status before: {before}"
        )
        await wait_status(
            client,
            lambda s: (
                s.controller_reachable
                and s.replicas[0].pid not in (0, before.replicas[0].pid)
                and all(len(one.resident) == 5 for one in s.replicas)
            ),
            RECOVERY_S,
            "the replica is back",
        )


def engine_of(replica: int) -> int:
    """The engine process of a replica that is up: by its title, or by how it was started, for not every one
    of them could set its title. AssertionError tells what there was instead."""
    children: dict[int, bytes] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if parent_of(int(folder.name)) == replica:
                told = (folder / "comm").read_bytes() + (folder / "cmdline").read_bytes()
                children[int(folder.name)] = told
    engines = [pid for pid, told in children.items() if ENGINE_TITLE in told or b"spawn_main" in told]
    assert len(engines) == 1, f"replica {replica} has no engine, or two; its children: {children}"
    return engines[0]


async def _read(stream: GenerationStream, at_least: int) -> tuple[list[int], str]:
    """So many tokens, or all that are left, with their text."""
    tokens: list[int] = []
    text = ""
    async for step in stream:
        tokens += step.token_ids
        text += step.text
        if len(tokens) >= at_least:
            break
    return tokens, text


async def test_removing_and_replacing_an_adapter_never_mixes_its_versions(
    cluster: LiveCluster, client: Client, samples: SampleSet, references: References
) -> None:
    """The name rank-8 gets the weights of rank-16: the answers are rank-16's, never rank-8's."""
    (old,) = [one.version for one in (await client.status()).adapters if one.name == "rank-8"]
    await client.remove_adapter("rank-16")
    info = await client.register_adapter("rank-8", str(samples.adapters["rank-16"]), replace=True)
    assert info.version != old
    for prompt, expected in zip(PROMPTS, references["rank-16"], strict=True):
        answer = await client.complete(prompt, adapter="rank-8", sampling=GREEDY)
        assert list(answer.step.token_ids) == expected
        assert answer.adapter_version == info.version
