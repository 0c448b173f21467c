"""A controller over replicas with fabrics: plans to move adapters by, and what came from where."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from types import MappingProxyType

from loraserve.cluster.local_fleet import MakeFabric
from loraserve.config import Config
from loraserve.controller.controller import Controller
from loraserve.fabric.fabric import Fabric
from loraserve.samples import SampleSet
from placement.cluster import messages
from placement.types import Holder, Placement, ReplicaId, VersionId
from tests.support.controller_kit import TIMEOUT_S, Setup
from tests.support.fabric_kit import Node, Town

REPLICAS = tuple(ReplicaId(f"replica-{number}") for number in range(3))
SAMPLES = ("rank-8", "rank-16", "rank-32", "rank-64", "rank-128")
Where = Mapping[VersionId, Set[ReplicaId]]


async def started(
    setup: Callable[..., Setup],
    samples: SampleSet,
    *,
    names: Sequence[str] = SAMPLES,
    copies: int = 1,
    **options: object,
) -> tuple[Setup, list[VersionId]]:
    """Three replicas and these sample adapters, each registered under so many names; over tcp unless
    `make_fabric` says otherwise."""
    given: dict[str, object] = {"with_fabric": "make_fabric" not in options, "cluster": {"replicas": 3}}
    made = setup(**{**given, "fabric": {"transports": ["tcp"]}, **options})
    controller = await made.start()
    versions = await asyncio.gather(
        *(
            controller.register(f"{name}-{number}", str(samples.adapters[name]), replace=False)
            for name in names
            for number in range(copies)
        )
    )
    return made, versions


def plan_of(where: Where) -> Placement:
    """Each version on these replicas, in equal shares."""
    return Placement(
        MappingProxyType(
            {
                version: tuple(Holder(replica_id=one, share=1 / len(here)) for one in sorted(here))
                for version, here in where.items()
            }
        )
    )


def is_carried_out(controller: Controller, where: Where) -> bool:
    """Whether every replica has what the plan says, and nothing else."""
    return all(set(controller.state.holders(version)) == here for version, here in where.items()) and all(
        set(record.copies) == {version for version, here in where.items() if replica in here}
        for replica, record in controller.state.replicas.items()
    )


async def move(controller: Controller, where: Where) -> None:
    """Carry out a plan to the end; it stays."""
    plan = plan_of(where)
    assert (problem := controller.state.plan_problem(plan)) is None, problem
    controller.dispatch(messages.PlanGiven(plan, frozen=True))
    await controller.wait_until(lambda: is_carried_out(controller, where), TIMEOUT_S)


def fabrics(made: Setup) -> dict[ReplicaId, Fabric]:
    """The fabrics of the replicas that live."""
    found = {replica: link.server.fabric for replica, link in made.fleet.links.items()}
    return {replica: fabric for replica, fabric in found.items() if fabric is not None}


def loads(made: Setup) -> Counter[str]:
    """Where all loads of the living replicas came from."""
    return sum((Counter(one.counts().loads) for one in fabrics(made).values()), Counter())


def failures(made: Setup) -> Counter[str]:
    """How attempts of the living replicas failed."""
    return sum((Counter(one.counts().failures) for one in fabrics(made).values()), Counter())


def in_town(town: Town, **options: object) -> MakeFabric:
    """Replicas whose fabrics a test can reach into."""

    def make(replica_id: ReplicaId, config: Config) -> Fabric:
        return town(str(replica_id), **options).fabric  # type: ignore[arg-type]

    return make


def node_of(town: Town, replica: ReplicaId) -> Node:
    """The fabric of the replica's present life."""
    return next(node for node in reversed(town.nodes) if node.name == replica)
