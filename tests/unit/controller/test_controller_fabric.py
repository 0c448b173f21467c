"""Replicas that take adapters from each other over real sockets, as plans move them about."""

import random
from collections.abc import Callable

import pytest

from loraserve.samples import SampleSet
from tests.support.controller_kit import Setup
from tests.support.fabric_cluster import REPLICAS, fabrics, failures, loads, move, started


@pytest.mark.parametrize("seed", range(3))
async def test_plans_move_adapters_from_peer_to_peer_and_the_store_is_read_once_per_version(
    setup: Callable[..., Setup], samples: SampleSet, seed: int
) -> None:
    made, versions = await started(setup, samples)
    rng = random.Random(seed)
    for _ in range(6):
        where = {version: set(rng.sample(REPLICAS, rng.randint(1, 3))) for version in versions}
        await move(made.controller, where)
        assert loads(made)["origin"] == len(versions)
    assert loads(made)["tcp"] > 0
    assert not failures(made)
    for fabric in fabrics(made).values():
        fabric.check_invariants()


async def test_what_a_replica_has_dropped_is_still_in_its_cache(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made, versions = await started(setup, samples)
    one, two, _ = REPLICAS
    for where in (one, two, one):
        await move(made.controller, {version: {where} for version in versions})
    assert fabrics(made)[one].counts().loads["cache"] == len(versions)
