"""Live requests of an overloaded replica that move with their adapter: stopped, gone on with elsewhere."""

import asyncio
from pathlib import Path

from loraserve.client import Client
from loraserve.request import SamplingParams
from loraserve.samples import SampleSet
from placement.types import AdapterName
from tests.support.controller_kit import TIMEOUT_S
from tests.support.local_cluster import local_cluster
from tests.support.router_bench import until

TOKENS = 400
NUM_REQUESTS = 40
PARTED = {
    "placement": {
        "policy": "slora-contiguous",
        "epoch_s": 3600.0,
        "migration": "dlora",
        "migration_period_s": 3600.0,
    },
    "emulated": {"speed": 1.0},
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.0, seed=1, max_tokens=TOKENS, ignore_eos=True)


async def _tokens(client: Client, sampling: SamplingParams) -> tuple[int, ...]:
    tokens: list[int] = []
    async for step in client.generate("Once upon a time", adapter="rank-8", sampling=sampling):
        tokens += step.token_ids
    return tuple(tokens)


async def test_requests_move_to_a_replica_that_gets_their_adapter_and_go_on_from_their_tokens(
    tmp_path: Path, samples: SampleSet
) -> None:
    async with (
        local_cluster(tmp_path, samples, sections=PARTED) as cluster,
        Client(cluster.address) as client,
    ):
        controller = cluster.controller
        version = controller.state.active[AdapterName("rank-8")]
        (holder,) = controller.state.holders(version)
        (other,) = set(controller.state.replicas) - {holder}
        assert await controller.migrator.look() == 0, "nothing is overloaded"
        server = cluster.fleet.links[holder].server
        streams = [asyncio.ensure_future(_tokens(client, GREEDY)) for _ in range(NUM_REQUESTS)]
        seeded = asyncio.ensure_future(_tokens(client, SEEDED))
        try:
            await until(
                lambda: sum(one.drawn_tokens > 0 for one in server.in_flight()) > NUM_REQUESTS, TIMEOUT_S
            )
            moved = await controller.migrator.look()
            assert moved == controller.migrator.num_moved
            assert NUM_REQUESTS // 4 <= moved <= 3 * NUM_REQUESTS // 4
            assert set(controller.state.holders(version)) == {holder, other}
            answers = await asyncio.gather(*streams)
        finally:
            await asyncio.gather(*streams, seeded, return_exceptions=True)
        assert len(await seeded) == TOKENS, "what cannot be resumed exactly stays"
        assert {len(answer) for answer in answers} == {TOKENS}
        assert len(set(answers)) == 1


async def test_no_copies_are_asked_for_while_the_plan_is_frozen(tmp_path: Path, samples: SampleSet) -> None:
    async with (
        local_cluster(tmp_path, samples, sections=PARTED) as cluster,
        Client(cluster.address) as client,
    ):
        controller = cluster.controller
        state = controller.state
        await client.freeze_plan()
        plan, earlier = state.plan, list(state.book.earlier)
        (holder,) = state.holders(state.active[AdapterName("rank-8")])
        server = cluster.fleet.links[holder].server
        streams = [asyncio.ensure_future(_tokens(client, GREEDY)) for _ in range(NUM_REQUESTS)]
        try:
            await until(
                lambda: sum(one.drawn_tokens > 0 for one in server.in_flight()) == NUM_REQUESTS, TIMEOUT_S
            )
            async with asyncio.timeout(TIMEOUT_S):
                assert await controller.migrator.look() == 0
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        assert (state.plan, state.book.earlier) == (plan, earlier)
