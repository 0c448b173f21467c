"""Loads, drops, cancellations and advice in any order leave copies, memory and accounts as they should be."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from loraserve.errors import LoraServeError
from loraserve.fabric.advice import CacheAdvice
from loraserve.fabric.wanted import Wanted
from loraserve.replica.pool import Residency
from tests.support.copies_kit import Replica, one_replica
from tests.support.fabric_kit import WAIT_S, Library, Node, Town, a_town, from_peers, until

NUM_STEPS = 120


@pytest.fixture
async def town() -> AsyncIterator[Town]:
    async with a_town() as town:
        yield town


async def some_step(
    rng: random.Random,
    replica: Replica,
    holder: Node,
    versions: list[Wanted],
    loads: list["asyncio.Task[str]"],
) -> "asyncio.Task[str] | asyncio.Task[None] | None":
    """Begin something; what can be waited for."""
    wanted = rng.choice(versions)
    match rng.choices(("load", "drop", "cancel", "advise", "refuse"), (8, 4, 3, 2, 1))[0]:
        case "load":
            loads.append(asyncio.create_task(replica.load(wanted, *[holder][: rng.randint(0, 3)])))
            return loads[-1]
        case "drop":
            return asyncio.create_task(replica.copies.unload(wanted.version_id))
        case "cancel" if loads:
            load = rng.choice(loads)
            for _ in range(rng.randint(1, 2)):
                load.cancel()
                await asyncio.sleep(0)
        case "advise":
            replica.copies.advise(
                CacheAdvice(
                    last=frozenset(one.version_id for one in rng.sample(versions, 2)),
                    gone=(wanted.version_id,),
                    soon=tuple(from_peers(one, holder) for one in rng.sample(versions, 2)),
                )
            )
        case "refuse":
            replica.engine.refused ^= {wanted.version_id}
    return None


@pytest.mark.parametrize("seed", range(6))
async def test_the_engine_has_what_the_replica_has_and_the_fabric_keeps_it(
    town: Town, tmp_path: Path, seed: int
) -> None:
    rng, library = random.Random(seed), Library(tmp_path)
    versions = [library(f"n{number}") for number in range(5)]
    holder = await town.holder("holder", *versions)
    loads: list[asyncio.Task[str]] = []
    async with one_replica(town, capacity_bytes=4 * versions[0].size_bytes) as replica:
        replica.engine.finishes_cancelled_loads = bool(seed % 2)
        begun = []
        for _ in range(NUM_STEPS):
            begun.append(await some_step(rng, replica, holder, versions, loads))
            for _ in range(rng.choice((0, 1, 2, 5, 50))):
                await asyncio.sleep(0)
            replica.node.check()
            replica.engine.check_segments()
        replica.engine.refused.clear()
        async with asyncio.timeout(WAIT_S):
            ended = await asyncio.gather(*filter(None, begun), return_exceptions=True)
        for one in ended:
            assert isinstance(one, str | LoraServeError | asyncio.CancelledError | None), one
        await until(lambda: replica.pool.versions(Residency.LOADING) == ())
        resident = set(replica.pool.resident())
        assert await replica.engine.resident() == resident
        held = replica.node.counts.held_bytes
        assert held == sum(one.size_bytes for one in versions if one.version_id in resident)
