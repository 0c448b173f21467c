"""The cluster's state machine under random events, and the rules it must never break."""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from placement import cluster_messages as messages
from placement.cluster import ClusterState
from placement.cluster_records import CopyPhase, ReplicaPhase
from placement.invariants import check_cluster
from placement.policies import POLICIES, policy
from placement.types import AdapterName, AdapterVersion, ReplicaId, ReplicaSpec, VersionId, version_id

R0, R1 = ReplicaId("replica-0"), ReplicaId("replica-1")


def spec(replica: ReplicaId, *, slots: int = 4, max_rank: int = 128, pool_bytes: int = 1000) -> ReplicaSpec:
    return ReplicaSpec(replica_id=replica, max_lora_rank=max_rank, adapter_slots=slots, pool_bytes=pool_bytes)


def adapter(name: str, *, digest: str = "0" * 64, rank: int = 8, size_bytes: int = 10) -> AdapterVersion:
    key = AdapterName(name)
    return AdapterVersion(
        version_id=version_id(key, digest), name=key, sha256=digest, rank=rank, size_bytes=size_bytes
    )


def cluster(*, slots: int = 4, replicas: tuple[ReplicaId, ...] = (R0, R1)) -> ClusterState:
    """A cluster whose replicas are all up."""
    state = ClusterState(replica_ids=replicas, policy=policy("least-loaded"), base_model="m")
    for replica in replicas:
        state.handle(messages.ReplicaReady(spec(replica, slots=slots), f"127.0.0.1:{replica[-1]}"))
    return state


def acknowledge(state: ClusterState, commands: list[messages.Command]) -> list[messages.Command]:
    """Answer every load and drop with success until the state machine asks for nothing more."""
    seen = list(commands)
    queue = list(commands)
    while queue:
        command = queue.pop(0)
        more: list[messages.Command] = []
        if isinstance(command, messages.LoadAdapter):
            more = state.handle(messages.AdapterLoaded(command.replica_id, command.adapter.version_id))
        elif isinstance(command, messages.UnloadAdapter):
            more = state.handle(messages.AdapterUnloaded(command.replica_id, command.version_id))
        queue += more
        seen += more
        check_cluster(state)
    return seen


def test_the_first_table_waits_for_every_replica() -> None:
    state = ClusterState(replica_ids=(R0, R1), policy=policy("least-loaded"))
    assert state.handle(messages.ReplicaReady(spec(R0), "a:1")) == []
    commands = state.handle(messages.ReplicaReady(spec(R1), "a:2"))
    assert [command.table.version for command in commands if isinstance(command, messages.PublishTable)] == [
        1
    ]
    assert set(state.table.replicas) == {R0, R1}


def test_a_replica_that_is_given_up_does_not_hold_the_first_table_back() -> None:
    state = ClusterState(replica_ids=(R0, R1), policy=policy("least-loaded"))
    state.handle(messages.ReplicaReady(spec(R0), "a:1"))
    state.handle(messages.ReplicaGivenUp(R1, "no memory"))
    assert state.table.version == 1
    assert set(state.table.replicas) == {R0}


def test_an_adapter_is_routed_only_after_a_replica_acknowledged_it() -> None:
    state = cluster()
    new = adapter("a")
    commands = state.handle(messages.AdapterRegistered(new))
    assert not state.is_served(new.version_id)
    assert {c.replica_id for c in commands if isinstance(c, messages.LoadAdapter)} == {R0, R1}
    state.handle(messages.AdapterLoaded(R1, new.version_id))
    assert state.is_served(new.version_id)
    entry = state.table.entries[new.name]
    assert [(holder.replica_id, holder.share) for holder in entry.holders] == [(R1, 1.0)]


def test_registration_is_saved_before_any_replica_loads() -> None:
    commands = cluster().handle(messages.AdapterRegistered(adapter("a")))
    kinds = [type(command) for command in commands]
    assert kinds.index(messages.SaveAdapter) < kinds.index(messages.LoadAdapter)


def test_a_new_version_is_published_before_the_old_one_is_dropped() -> None:
    state = cluster()
    old, new = adapter("a", digest="1" * 64), adapter("a", digest="2" * 64)
    acknowledge(state, state.handle(messages.AdapterRegistered(old)))
    commands = state.handle(messages.AdapterRegistered(new))
    assert state.is_served(old.version_id)
    assert not any(isinstance(command, messages.UnloadAdapter) for command in commands)
    seen = acknowledge(state, commands)
    assert state.is_served(new.version_id)
    published = next(
        i
        for i, command in enumerate(seen)
        if isinstance(command, messages.PublishTable)
        and command.table.entries[new.name].version_id == new.version_id
    )
    dropped = [i for i, command in enumerate(seen) if isinstance(command, messages.UnloadAdapter)]
    assert len(dropped) == 2
    assert min(dropped) > published
    assert all(old.version_id not in record.copies for record in state.replicas.values())
    assert messages.DeleteAdapter(old.version_id) in seen


def test_a_new_version_finds_room_in_a_full_cluster_without_a_gap() -> None:
    state = cluster(slots=1)
    old, new = adapter("a", digest="1" * 64), adapter("a", digest="2" * 64)
    acknowledge(state, state.handle(messages.AdapterRegistered(old)))
    assert len(state.holders(old.version_id)) == 2
    queue = state.handle(messages.AdapterRegistered(new))
    while queue:
        assert AdapterName("a") in state.table.entries, "the name was never without a holder"
        command = queue.pop(0)
        if isinstance(command, messages.LoadAdapter):
            queue += state.handle(messages.AdapterLoaded(command.replica_id, command.adapter.version_id))
        elif isinstance(command, messages.UnloadAdapter):
            queue += state.handle(messages.AdapterUnloaded(command.replica_id, command.version_id))
    assert len(state.holders(new.version_id)) == 2


def test_a_refused_version_is_withdrawn_and_the_one_before_serves_on() -> None:
    state = cluster()
    old, bad = adapter("a", digest="1" * 64), adapter("a", digest="2" * 64)
    acknowledge(state, state.handle(messages.AdapterRegistered(old)))
    state.handle(messages.AdapterRegistered(bad))
    for replica in (R0, R1):
        state.handle(messages.AdapterLoadFailed(replica, bad.version_id, "wrong shape"))
    assert state.refusal(bad.version_id) == "wrong shape"
    state.handle(messages.AdapterWithdrawn(bad.version_id))
    assert state.is_served(old.version_id)
    assert bad.version_id not in state.adapters


def test_an_adapter_that_fits_nowhere_is_refused_at_once() -> None:
    state = cluster(slots=1)
    acknowledge(state, state.handle(messages.AdapterRegistered(adapter("a"))))
    acknowledge(state, state.handle(messages.AdapterRegistered(adapter("b"))))
    third = adapter("c")
    acknowledge(state, state.handle(messages.AdapterRegistered(third)))
    assert "no replica has a free slot" in (state.refusal(third.version_id) or "")
    assert state.is_served(adapter("a").version_id)
    assert state.is_served(adapter("b").version_id)


def test_a_lost_replica_leaves_the_table_and_is_started_again_a_bounded_number_of_times() -> None:
    state = cluster()
    acknowledge(state, state.handle(messages.AdapterRegistered(adapter("a"))))
    for attempt in (1, 2, 3):
        commands = state.handle(messages.ReplicaLost(R0, "killed"))
        assert messages.StartReplica(R0, attempt) in commands
        assert R0 not in state.table.replicas
        state.handle(messages.ReplicaReady(spec(R0), "a:1"))
    commands = state.handle(messages.ReplicaLost(R0, "killed"))
    assert not any(isinstance(command, messages.StartReplica) for command in commands)
    assert state.replicas[R0].phase is ReplicaPhase.FAILED


def test_a_recovering_controller_drops_nothing_before_it_has_looked_for_every_replica() -> None:
    known = adapter("a")
    state = ClusterState(
        replica_ids=(R0, R1),
        policy=policy("slora-random"),
        adapters=[known],
        table_version=7,
        recovering=True,
    )
    resident = frozenset({known.version_id, VersionId("stray@1")})
    assert state.handle(messages.ReplicaReady(spec(R0), "a:1", resident)) == []
    commands = state.handle(messages.ReplicaReady(spec(R1), "a:2"))
    published = [command.table for command in commands if isinstance(command, messages.PublishTable)]
    assert [table.version for table in published] == [8]
    assert state.holders(known.version_id) == (R0,)
    assert messages.UnloadAdapter(R0, VersionId("stray@1")) in commands


def test_a_late_answer_of_a_lost_replica_changes_nothing() -> None:
    state = cluster()
    state.handle(messages.AdapterRegistered(adapter("a")))
    state.handle(messages.ReplicaLost(R0, "killed"))
    before = state.table
    state.handle(messages.AdapterLoaded(R0, adapter("a").version_id))
    state.handle(messages.AdapterUnloaded(R0, adapter("a").version_id))
    assert state.table == before
    check_cluster(state)


class ClusterMachine(RuleBasedStateMachine):
    """Random registrations, losses, answers and epochs; invariants after each."""

    def __init__(self) -> None:
        super().__init__()
        self.names = [f"a{index}" for index in range(4)]
        self.state: ClusterState | None = None
        self.pending: list[messages.Command] = []

    @precondition(lambda self: self.state is None)
    @rule(
        policy_name=st.sampled_from(sorted(POLICIES)),
        slots=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        ranks=st.lists(st.sampled_from([8, 64, 128]), min_size=3, max_size=3),
    )
    def begin(self, policy_name: str, slots: list[int], ranks: list[int]) -> None:
        ids = [ReplicaId(f"replica-{index}") for index in range(len(slots))]
        self.specs = {
            key: spec(key, slots=count, max_rank=rank, pool_bytes=45)
            for key, count, rank in zip(ids, slots, ranks, strict=False)
        }
        self.state = ClusterState(replica_ids=ids, policy=policy(policy_name))

    def tell(self, event: messages.Event) -> None:
        assert self.state is not None
        before = self.state.table
        commands = self.state.handle(event)
        tables = [command.table for command in commands if isinstance(command, messages.PublishTable)]
        assert [table.version for table in tables] == [before.version + 1] * len(tables)
        lost_one = isinstance(event, messages.ReplicaLost)
        removed = {event.name} if isinstance(event, messages.AdapterRemoved) else set()
        if not lost_one:
            assert set(before.entries) - removed <= set(self.state.table.entries) | self.withdrawn(event)
        self.pending += commands

    def withdrawn(self, event: messages.Event) -> set[AdapterName]:
        if isinstance(event, messages.AdapterWithdrawn):
            return {AdapterName(event.version_id.partition("@")[0])}
        return set()

    @precondition(lambda self: self.state is not None)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.names))
        digest = data.draw(st.sampled_from("123")) * 64
        shape = int(digest[0])
        new = adapter(name, digest=digest, rank=(8, 64, 128)[shape - 1], size_bytes=5 * shape)
        self.tell(messages.AdapterRegistered(new))

    @precondition(lambda self: self.state is not None)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        self.tell(messages.AdapterRemoved(AdapterName(data.draw(st.sampled_from(self.names)))))

    @precondition(lambda self: self.state is not None and bool(self.state.active))
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        assert self.state is not None
        self.tell(messages.AdapterWithdrawn(data.draw(st.sampled_from(sorted(self.state.active.values())))))

    @precondition(lambda self: self.state is not None)
    @rule(data=st.data())
    def come_up(self, data: st.DataObject) -> None:
        assert self.state is not None
        down = [
            record.replica_id
            for record in self.state.replicas.values()
            if record.phase is not ReplicaPhase.READY
        ]
        if down:
            replica = data.draw(st.sampled_from(down))
            self.tell(messages.ReplicaReady(self.specs[replica], f"{replica}:1"))

    @precondition(lambda self: self.state is not None)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        assert self.state is not None
        replica = data.draw(st.sampled_from(sorted(self.specs)))
        if self.state.replicas[replica].phase is ReplicaPhase.READY:
            self.pending = [c for c in self.pending if getattr(c, "replica_id", None) != replica]
            self.tell(messages.ReplicaLost(replica, "killed"))

    @precondition(lambda self: bool(self.pending))
    @rule(data=st.data(), succeeds=st.booleans())
    def answer(self, data: st.DataObject, succeeds: bool) -> None:
        index = data.draw(st.integers(0, len(self.pending) - 1))
        command = self.pending.pop(index)
        match command:
            case messages.LoadAdapter(replica_id=replica, adapter=wanted):
                if succeeds:
                    self.tell(messages.AdapterLoaded(replica, wanted.version_id))
                else:
                    self.tell(messages.AdapterLoadFailed(replica, wanted.version_id, "refused"))
            case messages.UnloadAdapter(replica_id=replica, version_id=version):
                if succeeds:
                    self.tell(messages.AdapterUnloaded(replica, version))
            case _:
                pass

    @precondition(lambda self: self.state is not None)
    @rule()
    def epoch(self) -> None:
        self.tell(messages.EpochElapsed())

    @invariant()
    def holds(self) -> None:
        if self.state is not None:
            check_cluster(self.state)

    def teardown(self) -> None:
        """Answered in full, the cluster comes to rest with every active adapter served or refused."""
        if self.state is None:
            return
        state = self.state
        for record in list(state.replicas.values()):
            if record.phase is not ReplicaPhase.READY:
                self.pending += state.handle(
                    messages.ReplicaReady(self.specs[record.replica_id], f"{record.replica_id}:1")
                )
        self.pending += state.handle(messages.EpochElapsed())
        acknowledge(
            state, [c for c in self.pending if isinstance(c, messages.LoadAdapter | messages.UnloadAdapter)]
        )
        for version in state.active.values():
            assert state.is_served(version) or state.refusal(version) is not None
        for record in state.replicas.values():
            assert all(copy.phase is CopyPhase.HELD for copy in record.copies.values())


TestClusterMachine = ClusterMachine.TestCase
TestClusterMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_same_events_give_the_same_commands() -> None:
    events: list[messages.Event] = [
        messages.ReplicaReady(spec(R1), "b:1"),
        messages.ReplicaReady(spec(R0), "a:1"),
        messages.AdapterRegistered(adapter("b")),
        messages.AdapterRegistered(replace(adapter("a"), rank=64)),
        messages.EpochElapsed(),
    ]

    def run() -> list[list[messages.Command]]:
        state = ClusterState(replica_ids=(R0, R1), policy=policy("slora-random"), seed=3)
        return [state.handle(event) for event in events]

    assert run() == run()
