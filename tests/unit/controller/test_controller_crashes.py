"""A controller that dies in the middle of every step of its state machine, and the one that comes after."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import pytest

from loraserve.clock import WallClock
from loraserve.config import Config
from loraserve.controller import drains, plans, terms
from loraserve.controller.controller import Checkpoint, Controller
from loraserve.engines.base import EngineInfo
from loraserve.errors import AdapterRejectedError, AlreadyExistsError, NotFoundError, WorkFailedError
from loraserve.rpc.v1 import management_pb2
from loraserve.samples import SampleSet
from placement.cluster import messages
from placement.cluster.invariants import check_cluster
from placement.cluster.records import CopyPhase, DrainOrder, ReplicaPhase
from placement.latency import LatencyModel, RankKernel
from placement.profile import EngineFacts, OperatingPoint, Profile
from placement.types import AdapterName, Holder, Placement, ReplicaId
from tests.support.controller_kit import TIMEOUT_S, RefusingEngine, Setup, small_config

R0, R1, R2 = (ReplicaId(f"replica-{index}") for index in range(3))
ORDER = DrainOrder(deadline_s=5.0)
PROFILE = Profile(
    name="kind",
    source="made up",
    engine=EngineFacts(kind="emulated", model="m", kv_blocks=1000),
    latency=LatencyModel(kernel=RankKernel.PADDED_CONFIG),
    latency_basis="derived",
    operating_points=(OperatingPoint(rank=8, tokens_per_s=4e5), OperatingPoint(rank=128, tokens_per_s=1e5)),
)

EVENTS = [kind.__name__ for kind in get_args(messages.Event)]
COMMANDS = [kind.__name__ for kind in get_args(messages.Command)]
POINTS = [
    *((name, stage) for name in EVENTS + COMMANDS for stage in ("before", "after")),
    ("PublishTable", "durable"),
    ("UnloadAdapter", "released"),
    ("DrainReplica", "released"),
]
FIRST = [(name, stage, 1) for name, stage in POINTS]
LATER = [(name, stage, 4) for name, stage in POINTS if stage != "after"]


class Killed(BaseException):
    """The process ends here: nothing of the controller runs after it."""


@dataclass(slots=True)
class Killer:
    """Lets the controller die at the `nth` time that a step of this name reaches this stage."""

    name: str
    stage: str
    nth: int = 1
    seen: int = 0
    killed: asyncio.Event = field(default_factory=asyncio.Event)
    published: list[int] = field(default_factory=list)

    def __call__(self, step: messages.Event | messages.Command, stage: str) -> None:
        if self.killed.is_set():
            raise Killed
        if isinstance(step, messages.PublishTable) and stage == "durable":
            self.published.append(step.table.version)
        if (type(step).__name__, stage) == (self.name, self.stage):
            self.seen += 1
            if self.seen == self.nth:
                self.killed.set()
                raise Killed


class SlowStarter(RefusingEngine):
    """Does not start the first time."""

    may_start = False

    async def start(self) -> EngineInfo:
        """Fail once."""
        if not self.may_start:
            raise WorkFailedError("not yet")
        return await super().start()


class Scenario:
    """Everything that can happen to a cluster, in steps that may be repeated; `acknowledged` is what
    whoever asked has been told."""

    def __init__(self, setup: Setup, samples: SampleSet) -> None:
        self.setup = setup
        self.samples = samples
        self.acknowledged: dict[str, str | None] = {}

    @property
    def controller(self) -> Controller:
        return self.setup.controller

    def steps(self) -> list[Callable[[], object]]:
        return [
            lambda: self.register("a", "rank-8"),
            lambda: self.register("b", "rank-8"),
            self.weigh,
            lambda: self.register("a", "rank-16"),
            self.refused,
            lambda: self.remove("b"),
            self.lose,
            self.epoch,
            self.change_plan,
            lambda: self.undrain(R2),
            self.resize,
            self.drain,
            lambda: self.undrain(R0),
        ]

    async def register(self, name: str, source: str) -> None:
        self.acknowledged.pop(name, None)
        path = str(self.samples.adapters[source])
        self.acknowledged[name] = await self.controller.register(name, path, replace=True)

    async def weigh(self) -> None:
        wanted = management_pb2.AdapterTerms(weight=2.0, slo_ttft_ms=500.0)
        terms.set_terms(self.controller, management_pb2.SetAdapterRequest(name="a", terms=wanted))

    async def refused(self) -> None:
        try:
            await self.controller.register("c", str(self.samples.adapters["rank-32"]), replace=False)
        except (AdapterRejectedError, AlreadyExistsError) as error:
            if isinstance(error, AlreadyExistsError):
                # The controller died while it was being refused; nobody was told anything.
                self.controller.remove("c")
            self.acknowledged["c"] = None

    async def remove(self, name: str) -> None:
        self.acknowledged.pop(name, None)
        # Repeated, it may have been done before the controller died.
        with contextlib.suppress(NotFoundError):
            self.controller.remove(name)
        self.acknowledged[name] = None

    async def lose(self) -> None:
        if R1 in self.setup.fleet.links and self.setup.fleet.starts.count(R1) == 1:
            await self.setup.fleet.lose(R1)
        await self.wait_phase(R1, ReplicaPhase.READY, starts=2)

    async def epoch(self) -> None:
        self.controller.dispatch(messages.EpochElapsed())

    async def resize(self) -> None:
        """A replica is restarted for the low ranks that are all there is."""
        controller = self.controller

        def low() -> bool:
            specs = [
                one.spec for one in controller.state.replicas.values() if one.phase is ReplicaPhase.READY
            ]
            return any(
                spec is not None and spec.max_lora_rank < PROFILE.engine.max_lora_rank for spec in specs
            )

        if not low():
            asked = dict.fromkeys(controller.state.active.values(), 1000.0)
            controller.dispatch(messages.EpochElapsed(asked))
        await controller.wait_until(low, TIMEOUT_S)

    async def change_plan(self) -> None:
        """Everything on one replica, back again, and as the policy wants it."""
        holders = (Holder(replica_id=R0, share=1.0),)
        state = self.controller.state
        plans.apply_plan(self.controller, Placement(dict.fromkeys(state.active.values(), holders)))
        assert all(state.plan.holders[version] == holders for version in state.active.values())
        plans.roll_back_plan(self.controller)
        plans.freeze_plan(self.controller, frozen=False)

    async def drain(self) -> None:
        drains.begin_drain(self.controller, [R0], ORDER)
        await self.wait_phase(R0, ReplicaPhase.DRAINED)

    async def undrain(self, replica: ReplicaId) -> None:
        drains.begin_undrain(self.controller, [replica])
        await self.wait_phase(replica, ReplicaPhase.READY)

    async def wait_phase(self, replica: ReplicaId, phase: ReplicaPhase, *, starts: int = 0) -> None:
        fleet, record = self.setup.fleet, self.controller.state.replicas[replica]
        await self.controller.wait_until(
            lambda: record.phase is phase and fleet.starts.count(replica) >= starts, TIMEOUT_S
        )

    def check_acknowledged(self) -> None:
        state = self.controller.state
        for name, version in self.acknowledged.items():
            assert state.active.get(AdapterName(name)) == version
            if version is not None:
                assert self.controller.table.entries[AdapterName(name)].version_id == version

    def is_at_rest(self) -> bool:
        """Nothing is under way, and every replica has what the controller thinks it has."""
        state, fleet = self.controller.state, self.setup.fleet
        for record in state.replicas.values():
            if record.phase in (ReplicaPhase.DRAINED, ReplicaPhase.FAILED):
                if record.replica_id in fleet.links:
                    return False
                continue
            if record.phase is not ReplicaPhase.READY or record.replica_id not in fleet.links:
                return False
            pool = fleet.links[record.replica_id].server.pool
            held = [copy.phase is CopyPhase.HELD for copy in record.copies.values()]
            if not all(held) or pool.resident() != tuple(sorted(record.copies)):
                return False
        return all(
            set(state.holders(version)) == state.plan.replicas_of(version) for version in state.plan.holders
        )


@pytest.fixture
async def make_scenario(
    tmp_path: Path, samples: SampleSet
) -> AsyncIterator[Callable[[Checkpoint], Scenario]]:
    placement = {"epoch_s": 3600.0, "max_lora_ranks": "planned", "restart_s": 0.1}
    config = small_config(samples.model, cluster={"replicas": 3}, placement=placement)
    made: list[Setup] = []

    def make(on_step: Checkpoint) -> Scenario:
        started: set[ReplicaId] = set()

        def engine(replica: ReplicaId, config: Config) -> SlowStarter:
            one = SlowStarter(config.engine, config.emulated, config.model, clock=WallClock())
            one.refused_rank = 32
            one.may_start = replica != R2 or replica in started
            started.add(replica)
            return one

        made.append(Setup(tmp_path / str(len(made)), config, engine, on_step=on_step, profile=PROFILE))
        return Scenario(made[-1], samples)

    yield make
    for setup in made:
        await setup.close()


async def run_until_killed(scenario: Scenario, killer: Killer) -> list[Callable[[], object]]:
    """Go through the steps; returns those that are left, the one it died in first. It dies at the end if
    a step does not come so often, but every step comes once."""
    steps = scenario.steps()

    async def run() -> None:
        await scenario.setup.start()
        while steps:
            await steps[0]()  # type: ignore[misc]
            del steps[0]

    running = asyncio.ensure_future(run())
    killed = asyncio.ensure_future(killer.killed.wait())
    await asyncio.wait({running, killed}, return_when=asyncio.FIRST_COMPLETED)
    if not killer.killed.is_set():
        running.result()
    assert killer.seen, f"{killer.name} {killer.stage} was never reached"
    killer.killed.set()
    running.cancel()
    killed.cancel()
    await asyncio.gather(running, killed, return_exceptions=True)
    await scenario.setup.crash()
    return steps


@pytest.mark.parametrize(("name", "stage", "nth"), FIRST + LATER)
async def test_whatever_it_dies_in_the_next_controller_goes_on(
    make_scenario: Callable[[Checkpoint], Scenario], name: str, stage: str, nth: int
) -> None:
    killer = Killer(name, stage, nth=nth)
    scenario = make_scenario(killer)
    left = await run_until_killed(scenario, killer)

    versions: list[int] = []
    scenario.setup.on_step = lambda step, at: (
        versions.append(step.table.version)
        if isinstance(step, messages.PublishTable) and at == "durable"
        else None
    )
    scenario.setup.controller = scenario.setup.make()
    controller = await scenario.setup.start()
    scenario.check_acknowledged()
    check_cluster(controller.state)
    for step in left:
        await step()  # type: ignore[misc]
        scenario.check_acknowledged()
        check_cluster(controller.state)
    await controller.wait_until(scenario.is_at_rest, TIMEOUT_S)

    published = killer.published + versions
    assert published == sorted(set(published)), "table versions only grow"
    assert set(controller.state.active) == {"a"}
    assert controller.state.terms[AdapterName("a")].weight == 2.0, "for the version after, too"
    assert len(controller.state.table.replicas) == 3
    assert len(controller.library.contents()) >= 1
    for link in scenario.setup.fleet.links.values():
        link.server.check_invariants(idle=True)
