"""The Python client against a whole cluster in one process: what dies is not seen by those who read."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loraserve.client import Client, GenerationStream
from loraserve.errors import StreamBrokenError
from loraserve.request import GenerationStep, SamplingParams
from loraserve.samples import SampleSet
from placement.types import ReplicaId
from tests.support.local_cluster import LocalCluster, local_cluster

PROMPT = "hi €"
GREEDY = SamplingParams(temperature=0.0, max_tokens=1000, ignore_eos=True, stop=("never said",))
SEEDED = SamplingParams(temperature=1.0, seed=7, max_tokens=1000, ignore_eos=True)
NUM_STREAMS = 6
Answer = tuple[tuple[int, ...], str]


@pytest.fixture
async def cluster(tmp_path: Path, samples: SampleSet) -> AsyncIterator[LocalCluster]:
    async with local_cluster(tmp_path, samples, num_routers=2) as one:
        yield one


@pytest.fixture
def names(samples: SampleSet) -> list[str]:
    """An adapter per stream, and the base model for the last one."""
    some = sorted(samples.adapters)[:2]
    return [some[index % 2] for index in range(NUM_STREAMS - 1)] + [""]


async def whole_answers(
    cluster: LocalCluster, names: list[str], sampling: SamplingParams = GREEDY
) -> list[Answer]:
    """What is said when nothing happens."""
    async with Client(cluster.address) as client:
        done = [await client.complete(PROMPT, adapter=name, sampling=sampling) for name in names]
    return [(one.step.token_ids, one.step.text) for one in done]


async def rest(stream: GenerationStream, first: GenerationStep) -> Answer:
    """The whole answer from its first step on; the steps must follow on one another."""
    steps, count = [first], len(first.token_ids)
    async for step in stream:
        count += len(step.token_ids)
        assert step.output_tokens == count
        steps.append(step)
    return tuple(token for step in steps for token in step.token_ids), "".join(step.text for step in steps)


async def begin(client: Client, names: list[str]) -> list[tuple[GenerationStream, GenerationStep]]:
    """Streams that have all begun and are far from their ends."""
    streams = [client.generate(PROMPT, adapter=name, sampling=GREEDY) for name in names]
    firsts = [await anext(stream) for stream in streams]
    assert all(0 < step.output_tokens < GREEDY.max_tokens for step in firsts)
    return list(zip(streams, firsts, strict=True))


async def test_streams_go_on_when_the_replica_that_the_client_reads_from_is_lost(
    cluster: LocalCluster, names: list[str]
) -> None:
    whole = await whole_answers(cluster, names)
    (whole_seeded,) = await whole_answers(cluster, [""], SEEDED)
    async with Client(cluster.addresses) as client:
        begun = await begin(client, names)
        seeded = client.generate(PROMPT, sampling=SEEDED)
        first = await anext(seeded)
        # A router said who answers before the first step came: the client has gone there itself.
        lost = seeded.served_by.replica
        assert lost is not None
        concerned = [stream for stream, _ in begun if stream.served_by.replica == lost]
        assert concerned
        await cluster.fleet.lose(ReplicaId(lost))
        with pytest.raises(StreamBrokenError, match="a seed") as caught:
            await rest(seeded, first)
        answers = await asyncio.gather(*(rest(stream, step) for stream, step in begun))
    assert answers == whole
    assert all(stream.resumed for stream in concerned)
    came = caught.value.token_ids
    assert 0 < len(came) < SEEDED.max_tokens
    assert (came, caught.value.text) == (
        whole_seeded[0][: len(came)],
        whole_seeded[1][: len(caught.value.text)],
    )


async def test_streams_through_routers_go_on_when_a_replica_and_a_router_are_lost(
    cluster: LocalCluster, names: list[str]
) -> None:
    whole = await whole_answers(cluster, names)
    async with Client(cluster.addresses, look_aside=False) as client:
        begun = await begin(client, names)
        await cluster.fleet.lose(ReplicaId("replica-0"))
        await cluster.routers[1].stop(0.0)
        answers = await asyncio.gather(*(rest(stream, step) for stream, step in begun))
    assert answers == whole
    # The routers take turns, so half of the streams were at the one that stopped.
    assert sum(stream.resumed for stream, _ in begun) == NUM_STREAMS // 2
    kept = [outcome for outcome in cluster.routers[0].outcomes if outcome.status == "OK"]
    assert any(outcome.attempts > 1 for outcome in kept), "the router that stayed moved no stream"
