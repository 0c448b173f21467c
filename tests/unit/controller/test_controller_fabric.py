"""Replicas that take adapters from each other over real sockets, as plans move them about."""

import random
from collections import Counter
from collections.abc import Callable
from types import MappingProxyType

import pytest

from loraserve.controller.controller import Controller
from loraserve.fabric.fabric import Fabric
from loraserve.samples import SampleSet
from placement.cluster import messages
from placement.types import Holder, Placement, ReplicaId, VersionId
from tests.support.controller_kit import TIMEOUT_S, Setup

REPLICAS = tuple(ReplicaId(f"replica-{number}") for number in range(3))


def fabrics(made: Setup) -> dict[ReplicaId, Fabric]:
    found = {replica: link.server.fabric for replica, link in made.fleet.links.items()}
    return {replica: fabric for replica, fabric in found.items() if fabric is not None}


def loads(made: Setup) -> Counter[str]:
    total: Counter[str] = Counter()
    for fabric in fabrics(made).values():
        total.update(fabric.counts().loads)
    return total


async def move(controller: Controller, holders: dict[VersionId, set[ReplicaId]]) -> None:
    """Carry out a plan to the end."""
    plan = Placement(
        MappingProxyType(
            {
                version: tuple(Holder(replica_id=one, share=1 / len(where)) for one in sorted(where))
                for version, where in holders.items()
            }
        )
    )
    controller.dispatch(messages.PlanGiven(plan, frozen=True))

    def is_there() -> bool:
        return all(
            set(controller.state.holders(version)) == where for version, where in holders.items()
        ) and all(
            set(record.copies) == {version for version, where in holders.items() if replica in where}
            for replica, record in controller.state.replicas.items()
        )

    await controller.wait_until(is_there, TIMEOUT_S)


async def started(
    setup: Callable[..., Setup], samples: SampleSet, **options: object
) -> tuple[Setup, list[VersionId]]:
    made = setup(with_fabric=True, cluster={"replicas": 3}, fabric={"transports": ["tcp"]}, **options)
    controller = await made.start()
    versions = [
        await controller.register(name, str(source), replace=False)
        for name, source in samples.adapters.items()
    ]
    return made, versions


@pytest.mark.parametrize("seed", range(3))
async def test_plans_move_adapters_from_peer_to_peer_and_the_store_is_read_once_per_version(
    setup: Callable[..., Setup], samples: SampleSet, seed: int
) -> None:
    made, versions = await started(setup, samples)
    rng = random.Random(seed)
    for _ in range(6):
        holders = {version: set(rng.sample(REPLICAS, rng.randint(1, 3))) for version in versions}
        await move(made.controller, holders)
        assert loads(made)["origin"] == len(versions)
    assert loads(made)["tcp"] > 0
    for fabric in fabrics(made).values():
        fabric.check_invariants()
        assert not fabric.counts().failures


async def test_what_a_replica_has_dropped_is_still_in_its_cache(
    setup: Callable[..., Setup], samples: SampleSet
) -> None:
    made, versions = await started(setup, samples)
    one, two, _ = REPLICAS
    for where in (one, two, one):
        await move(made.controller, {version: {where} for version in versions})
    assert fabrics(made)[one].counts().loads["cache"] == len(versions)
