"""The cluster's state machine under random events beside a model of the replicas it commands.

The model does what commands say and keeps what a controller's death leaves behind, so that the rules are
checked against what replicas really hold and not against what the state machine believes.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from placement.cluster import messages
from placement.cluster.invariants import check_cluster
from placement.cluster.records import CopyPhase, DrainOrder, ReplicaPhase
from placement.cluster.resize import Resizer
from placement.cluster.state import ClusterState
from placement.latency import LatencyModel, RankKernel
from placement.plans.book import MAX_EARLIER, EarlierPlan
from placement.plans.rank_sizing import RankSizingLimits
from placement.plans.repair import repaired
from placement.policies import POLICIES, policy
from placement.policies.base import PlacementPolicy, Room
from placement.profile import EngineFacts, OperatingPoint, Profile
from placement.table import RoutingTable
from placement.types import AdapterName, AdapterVersion, Holder, Placement, ReplicaId, Snapshot, VersionId
from tests.support.cluster_kit import adapter, spec

MAX_LOADS = 2
PROFILES = {
    "": Profile(
        name="kind",
        source="made up",
        engine=EngineFacts(kind="vllm", model="m", kv_blocks=1000),
        latency=LatencyModel(kernel=RankKernel.PADDED_CONFIG),
        latency_basis="derived",
        operating_points=tuple(
            OperatingPoint(rank=rank, tokens_per_s=20 - rank / 16) for rank in (8, 64, 128)
        ),
    )
}
NAMES = tuple(AdapterName(f"a{index}") for index in range(4))


@dataclass(frozen=True, slots=True)
class Wild:
    """Puts everything elsewhere whenever the demand changes, and every fourth time as nobody may."""

    name: str = "wild"

    def plan(self, snapshot: Snapshot) -> Placement:
        # Placement is a Mapping's value here: its order is no part of the seed.
        draw = random.Random(repr(sorted(snapshot.demand_tokens_per_s.items())))
        is_bad = draw.random() < 0.25
        rooms = list(Room.of(snapshot.replicas).values())
        placed: dict[VersionId, tuple[Holder, ...]] = {}
        for one in sorted(snapshot.adapters, key=lambda one: (draw.random(), one.version_id)):
            fitting = [room for room in rooms if is_bad or room.fits(one)]
            chosen = draw.sample(fitting, draw.randint(0 if is_bad else min(1, len(fitting)), len(fitting)))
            for room in chosen:
                if room.fits(one):
                    room.put(one)
            # One has a share at least.
            weights = [1.0, *(draw.choice([0.0, 0.5, 1.0]) for _ in chosen)][: len(chosen)]
            shares = [weight / sum(weights) for weight in weights]
            if chosen:
                placed[one.version_id] = tuple(
                    Holder(replica_id=room.spec.replica_id, share=share, spill=share == 0)
                    for room, share in zip(chosen, shares, strict=True)
                )
        return Placement(MappingProxyType(placed))


def registered(name: AdapterName, shape: int) -> messages.AdapterRegistered:
    rank = (8, 64, 128)[shape - 1]
    return messages.AdapterRegistered(adapter(name, digest=str(shape) * 64, rank=rank, size_bytes=5 * shape))


def policy_of(name: str) -> PlacementPolicy:
    return Wild() if name == "wild" else policy(name)


@dataclass(slots=True)
class Process:
    """What one replica's process really has: versions by `loading`, `held` or `dropping`; and its setting."""

    max_lora_rank: int
    copies: dict[VersionId, str] = field(default_factory=dict)
    draining: bool = False

    def of(self, residency: str) -> frozenset[VersionId]:
        return frozenset(version for version, one in self.copies.items() if one == residency)


@dataclass(slots=True)
class Disk:
    """What the store keeps, in the order of registration."""

    adapters: dict[VersionId, AdapterVersion] = field(default_factory=dict)
    drains: dict[ReplicaId, DrainOrder] = field(default_factory=dict)
    max_lora_ranks: dict[ReplicaId, int | None] = field(default_factory=dict)
    plan: Placement = field(default_factory=Placement)
    frozen: Placement | None = None
    earlier: dict[int, EarlierPlan] = field(default_factory=dict)
    table_version: int = 0


class ClusterMachine(RuleBasedStateMachine):
    """Random registrations, losses, drains, answers, epochs and controller deaths."""

    def __init__(self) -> None:
        super().__init__()
        self.state: ClusterState | None = None
        self.disk = Disk()
        self.processes: dict[ReplicaId, Process] = {}
        self.pending: list[messages.Command] = []
        self.table = RoutingTable()
        """What routers serve by: the last one published, across controllers."""

    # -- the model -----------------------------------------------------------------------------

    def tell(self, event: messages.Event, *, may_vanish: frozenset[AdapterName] = frozenset()) -> None:
        assert self.state is not None
        state = self.state
        self.take(lambda: state.handle(event), str(event), may_vanish)

    def tell_all(self, events: Sequence[messages.Together]) -> None:
        assert self.state is not None
        state = self.state
        self.take(lambda: state.handle_many(events), str(events), frozenset())

    def take(
        self, handle: Callable[[], list[messages.Command]], what: str, may_vanish: frozenset[AdapterName]
    ) -> None:
        assert self.state is not None
        before, may_vanish = self.served(), may_vanish | self.forced()
        named = set(self.state.table.entries)
        for command in handle():
            self.execute(command)
        gone = before - self.served()
        assert gone <= may_vanish, f"{gone} lost their last copy through {what}"
        unknown = named & set(self.state.active) - set(self.state.table.entries)
        assert not unknown, f"{unknown} are registered, and routers do not know them any more"

    def execute(self, command: messages.Command) -> None:
        assert self.state is not None
        match command:
            case messages.SaveAdapter(adapter=new):
                self.disk.adapters.pop(new.version_id, None)
                self.disk.adapters[new.version_id] = new
            case messages.DeleteAdapter(version_id=version):
                self.disk.adapters.pop(version, None)
            case messages.SavePlan(plan=plan):
                self.disk.plan = plan
            case messages.KeepPlan(number=number, plan=None):
                del self.disk.earlier[number]
            case messages.KeepPlan(number=number, plan=plan, ended_by=why):
                assert plan is not None
                assert number not in self.disk.earlier
                self.disk.earlier[number] = EarlierPlan(number=number, plan=plan, ended_by=why)
            case messages.SaveFreeze(plan=plan):
                self.disk.frozen = plan
            case messages.SaveDrain(replica_id=replica, order=None):
                self.disk.drains.pop(replica, None)
            case messages.SaveDrain(replica_id=replica, order=order):
                assert order is not None
                self.disk.drains[replica] = order
            case messages.SaveMaxLoraRank(replica_id=replica, max_lora_rank=rank):
                self.disk.max_lora_ranks[replica] = rank
            case messages.PublishTable(table=table):
                assert table.version == self.disk.table_version + 1
                self.disk.table_version, self.table = table.version, table
            case messages.LoadAdapter(replica_id=replica, adapter=wanted):
                assert self.state.replicas[replica].phase is ReplicaPhase.READY or (
                    self.processes[replica].copies.get(wanted.version_id) == "loading"
                ), "a replica that drains gets no new copies"
                self.processes[replica].copies.setdefault(wanted.version_id, "loading")
                assert len(self.processes[replica].of("loading")) <= MAX_LOADS
                self.pending.append(command)
            case messages.UnloadAdapter(replica_id=replica, version_id=version):
                if version in self.processes[replica].copies:
                    self.processes[replica].copies[version] = "dropping"
                # The shell does not ask twice at a time.
                if command not in self.pending:
                    self.pending.append(command)
            case messages.DrainReplica(replica_id=replica):
                assert replica not in self.table.replicas
                resized = [one for one in self.state.replicas.values() if one.resize is not None]
                assert len(resized) <= 1, "one restarts at a time"
                self.processes[replica].draining = True
                self.pending.append(command)
            case messages.StopReplica(replica_id=replica):
                assert replica not in self.table.replicas
                self.end(replica)
            case messages.StartReplica(replica_id=replica):
                assert replica not in self.processes, "its process before has ended"

    def end(self, replica: ReplicaId) -> None:
        self.processes.pop(replica, None)
        self.pending = [command for command in self.pending if getattr(command, "replica_id", "") != replica]

    def ready(self, replica: ReplicaId) -> messages.ReplicaReady:
        assert self.state is not None
        setting = self.state.replicas[replica].max_lora_rank or self.specs[replica].max_lora_rank
        process = self.processes.setdefault(replica, Process(setting))
        return messages.ReplicaReady(
            replace(self.specs[replica], max_lora_rank=process.max_lora_rank),
            f"{replica}:1",
            resident=process.of("held"),
            loading=process.of("loading"),
            dropping=process.of("dropping"),
            draining=process.draining,
        )

    def lost_with(self, replica: ReplicaId) -> frozenset[AdapterName]:
        """The names whose every holder is this replica."""
        assert self.state is not None
        entries = self.state.table.entries.values()
        return frozenset(e.name for e in entries if {h.replica_id for h in e.holders} == {replica})

    def served(self) -> set[AdapterName]:
        """The names that the table names a holder of."""
        assert self.state is not None
        return {entry.name for entry in self.state.table.entries.values() if entry.holders}

    def in_phase(self, *phases: ReplicaPhase) -> list[ReplicaId]:
        assert self.state is not None
        return [record.replica_id for record in self.state.replicas.values() if record.phase in phases]

    # -- what happens --------------------------------------------------------------------------

    @initialize(
        policy_name=st.sampled_from([*sorted(POLICIES), *["wild"] * len(POLICIES)]),
        slots=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        ranks=st.lists(st.sampled_from([8, 64, 128]), min_size=3, max_size=3),
        shapes=st.lists(st.integers(1, 3), max_size=4),
        resizing=st.booleans(),
    )
    def begin(
        self, policy_name: str, slots: list[int], ranks: list[int], shapes: list[int], resizing: bool
    ) -> None:
        ids = [ReplicaId(f"replica-{index}") for index in range(len(slots))]
        self.specs = {
            key: spec(key, slots=count, max_rank=rank, pool_bytes=45)
            for key, count, rank in zip(ids, slots, ranks, strict=False)
        }
        self.policy = policy_of(policy_name)
        self.limits = RankSizingLimits(restart_s=1.0, min_gain=0.01) if resizing else None
        self.state = ClusterState(
            replica_ids=ids,
            policy=self.policy,
            max_loads=MAX_LOADS,
            resizer=Resizer(self.limits),
            profiles=PROFILES,
        )
        if not shapes:
            return
        for replica in ids:
            self.tell(self.ready(replica))
        for name, shape in zip(NAMES, shapes, strict=False):
            self.register(name, shape)
        self.answer_all()

    @rule(name=st.sampled_from(NAMES), shape=st.integers(1, 3))
    def register_one(self, name: AdapterName, shape: int) -> None:
        self.register(name, shape)

    def register(self, name: AdapterName, shape: int) -> None:
        self.tell(registered(name, shape))

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: AdapterName) -> None:
        self.tell(messages.AdapterRemoved(name), may_vanish=frozenset({name}))

    @precondition(lambda self: bool(self.state.active))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        assert self.state is not None
        version = data.draw(st.sampled_from(sorted(self.state.active.values())))
        name = self.state.adapters[version].name
        self.tell(messages.AdapterWithdrawn(version), may_vanish=frozenset({name}))

    @rule(data=st.data(), succeeds=st.booleans())
    def come_up(self, data: st.DataObject, succeeds: bool) -> None:
        starting = self.in_phase(ReplicaPhase.STARTING)
        if not starting:
            return
        replica = data.draw(st.sampled_from(starting))
        self.tell(self.ready(replica) if succeeds else messages.ReplicaLost(replica, "no memory"))

    @precondition(lambda self: bool(self.processes))
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        running = [
            one for one in self.in_phase(ReplicaPhase.READY, ReplicaPhase.DRAINING) if one in self.processes
        ]
        if running:
            replica = data.draw(st.sampled_from(running))
            vanishing = self.lost_with(replica)
            self.end(replica)
            self.tell(messages.ReplicaLost(replica, "killed"), may_vanish=vanishing)

    @rule(data=st.data(), force=st.sampled_from([False, False, True]))
    def drain(self, data: st.DataObject, force: bool) -> None:
        assert self.state is not None
        replica = data.draw(st.sampled_from(sorted(self.specs)))
        if force or self.state.drain_problem([replica]) is None:
            order = DrainOrder(deadline_s=1.0, force=force)
            vanishing = self.lost_with(replica) if force else frozenset()
            self.tell(messages.DrainRequested(replica, order), may_vanish=vanishing)

    @rule(data=st.data())
    def undrain(self, data: st.DataObject) -> None:
        self.tell(messages.UndrainRequested(data.draw(st.sampled_from(sorted(self.specs)))))

    @precondition(lambda self: bool(self.pending))
    @rule(data=st.data(), succeeds=st.booleans())
    def answer(self, data: st.DataObject, succeeds: bool) -> None:
        self.settle(self.pending.pop(data.draw(st.integers(0, len(self.pending) - 1))), succeeds=succeeds)

    @precondition(lambda self: len(self.pending) > 1)
    @rule(data=st.data())
    def answer_at_once(self, data: st.DataObject) -> None:
        """Several answers that the controller takes in together, and registrations among them."""
        assert self.state is not None
        places = data.draw(st.sets(st.integers(0, len(self.pending) - 1), min_size=1))
        chosen = [self.pending[place] for place in places]
        succeeds = data.draw(st.lists(st.booleans(), min_size=len(chosen), max_size=len(chosen)))
        answers = []
        for command, is_done in zip(chosen, succeeds, strict=True):
            if (answer := self.answer_to(command, succeeds=is_done)) is not None:
                answers.append(answer)
        drains = [one for one in chosen if isinstance(one, messages.DrainReplica)]
        done = [one for one in chosen if one not in drains]
        self.pending = [one for one in self.pending if one not in done]
        shapes = data.draw(st.dictionaries(st.sampled_from(NAMES), st.integers(1, 3), max_size=3))
        events = [*answers, *(registered(name, shape) for name, shape in shapes.items())]
        self.tell_all(data.draw(st.permutations(events)))

    @precondition(lambda self: bool(self.pending))
    @rule()
    def answer_all_that_wait(self) -> None:
        self.answer_all()

    def answer_all(self) -> None:
        while self.pending:
            self.settle(self.pending.pop(0))

    def settle(self, command: messages.Command, *, succeeds: bool = True) -> None:
        """One answer: what it does to the replica, then the news of it."""
        if isinstance(command, messages.DrainReplica):
            self.tell(messages.ReplicaDrained(command.replica_id))
        elif (answer := self.answer_to(command, succeeds=succeeds)) is not None:
            self.tell(answer)

    def answer_to(self, command: messages.Command, *, succeeds: bool) -> messages.Answer | None:
        """What a load or drop does to the replica, and what it answers; None for none."""
        match command:
            case messages.LoadAdapter(replica_id=replica, adapter=wanted) if succeeds:
                self.processes[replica].copies[wanted.version_id] = "held"
                return messages.AdapterLoaded(replica, wanted.version_id)
            case messages.LoadAdapter(replica_id=replica, adapter=wanted):
                del self.processes[replica].copies[wanted.version_id]
                return messages.AdapterLoadFailed(replica, wanted.version_id, "refused")
            case messages.UnloadAdapter(replica_id=replica, version_id=version) if succeeds:
                self.processes[replica].copies.pop(version, None)
                return messages.AdapterUnloaded(replica, version)
            case messages.UnloadAdapter() | messages.DrainReplica():
                return None
            case _:
                raise AssertionError(f"{command} is not answered")

    def forced(self) -> frozenset[AdapterName]:
        """What a forced drain may give up once no other replica can be hoped for."""
        assert self.state is not None
        forced = [one for one in self.state.replicas.values() if one.drain is not None and one.drain.force]
        return frozenset(name for one in forced for name in self.lost_with(one.replica_id))

    @rule(demand=st.lists(st.integers(0, 9), min_size=4, max_size=4))
    def epoch(self, demand: list[int]) -> None:
        assert self.state is not None
        active, frozen = self.state.active, self.state.book.frozen
        rates = {
            active[name]: float(rate) for name, rate in zip(NAMES, demand, strict=True) if name in active
        }
        before = self.state.snapshot()
        held = self.state.holdings.all_holders()
        self.tell(messages.EpochElapsed(rates))
        # A plan in force that is not the frozen one, for want of room to exchange copies, goes back to it.
        is_planned = self.state.published and self.state.snapshot().replicas == before.replicas
        if frozen is not None and is_planned:
            wanted = repaired(before, frozen, held)
            assert self.state.plan == wanted or self.state.book.problem, "a frozen plan moves"

    @rule(frozen=st.booleans())
    def freeze(self, frozen: bool) -> None:
        assert self.state is not None
        self.tell(messages.FreezeRequested(frozen))
        assert (self.state.book.frozen is not None) == frozen

    @precondition(lambda self: bool(self.state.book.earlier))
    @rule()
    def roll_back(self) -> None:
        assert self.state is not None
        last = self.state.book.earlier[-1].plan
        self.tell(messages.RollbackRequested())
        assert self.state.book.frozen in (last, None)

    @rule(seed=st.integers(0, 9), whose=st.sampled_from(["frozen", "given", "reactive", "reactive"]))
    def apply(self, seed: int, whose: str) -> None:
        """A plan made for another demand, good or bad, by an operator or a migration."""
        frozen, is_reactive = whose == "frozen", whose == "reactive"
        assert self.state is not None
        made_for = {version: float(seed) for version in self.state.active.values()}
        snapshot = replace(self.state.snapshot(), demand_tokens_per_s=made_for)
        plan, before = Wild().plan(snapshot), self.state.book.frozen
        problem = self.state.plan_problem(plan)
        self.tell(messages.PlanGiven(plan, frozen, is_reactive))
        assert self.state.book.frozen == (plan if frozen and problem is None else before)
        if problem is None:
            assert self.state.plan == plan or self.state.book.frozen is not None or self.state.book.problem

    @precondition(lambda self: self.state.published)
    @rule()
    def restart_controller(self) -> None:
        """It dies and comes back with the store, among the replicas as they are."""
        self.pending.clear()
        self.state = ClusterState(
            replica_ids=sorted(self.specs),
            policy=self.policy,
            adapters=list(self.disk.adapters.values()),
            plan=self.disk.plan,
            frozen_plan=self.disk.frozen,
            earlier_plans=self.disk.earlier.values(),
            drains=dict(self.disk.drains),
            table_version=self.disk.table_version,
            recovering=True,
            max_loads=MAX_LOADS,
            resizer=Resizer(self.limits),
            profiles=PROFILES,
            max_lora_ranks={key: rank for key, rank in self.disk.max_lora_ranks.items() if rank is not None},
        )
        for replica in self.in_phase(ReplicaPhase.UNKNOWN):
            if replica in self.processes:
                self.tell(self.ready(replica))
            else:
                self.tell(messages.ReplicaLost(replica, "it was gone"))

    # -- what holds ----------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if self.state is None:
            return
        check_cluster(self.state)
        assert list(self.disk.earlier.values()) == self.state.book.earlier
        assert len(self.state.book.earlier) <= MAX_EARLIER
        assert not any(one.ended_by == "requests were moved" for one in self.state.book.earlier[:-1])
        assert (self.disk.plan, self.disk.frozen) == (self.state.plan, self.state.book.frozen)
        if not self.state.published:
            return
        for entry in self.table.entries.values():
            for holder in entry.holders:
                process = self.processes[holder.replica_id]
                assert process.copies[entry.version_id] == "held"
                assert not process.draining
        for replica, process in self.processes.items():
            assert len(process.copies) <= self.specs[replica].pool_adapters
            for version in process.of("held"):
                known = self.state.adapters.get(version)
                assert known is None or known.rank <= process.max_lora_rank
        for record in self.state.replicas.values():
            assert record.max_lora_rank == self.disk.max_lora_ranks.get(record.replica_id)

    def teardown(self) -> None:
        """Answered in full, it comes to rest: every adapter served or refused, every drain done or held
        up by an adapter that nobody else can take."""
        if self.state is None:
            return
        state = self.state
        for number in range(20):
            for replica in self.in_phase(ReplicaPhase.STARTING):
                self.tell(self.ready(replica))
            while self.pending:
                self.settle(self.pending.pop(0))
                self.holds()
            # The last rounds end what an epoch begins: a replica that is to restart with another setting
            # does, or serves on after some epochs.
            resized = [record for record in state.replicas.values() if record.resize is not None]
            if resized or number < 4:
                self.tell(messages.EpochElapsed())
        assert all(record.resize is None for record in state.replicas.values())
        for version in state.active.values():
            assert state.is_served(version) or state.refusal(version) is not None
            planned, there = state.plan.replicas_of(version), set(state.holders(version))
            refused = {one.replica_id for one in state.replicas.values() if version in one.refused}
            assert not there or planned - refused <= there, "an exchange of copies came to an end"
        for record in state.replicas.values():
            if record.phase is ReplicaPhase.READY:
                assert all(copy.phase is CopyPhase.HELD for copy in record.copies.values())
                held = self.processes[record.replica_id].of("held")
                assert set(record.copies) == held, "the state and the replica agree"
            elif record.phase is ReplicaPhase.DRAINING:
                assert state.drain_waits_for(record.replica_id)
                assert not record.leaving


TestClusterMachine = ClusterMachine.TestCase
TestClusterMachine.settings = settings(
    max_examples=300, stateful_step_count=30, deadline=None, report_multiple_bugs=False
)
