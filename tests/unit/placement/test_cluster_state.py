"""The cluster's state machine: what each event asks for, one rule per test."""

from dataclasses import replace

from placement.cluster import messages
from placement.cluster.invariants import check_cluster
from placement.cluster.records import ReplicaPhase
from placement.cluster.state import ClusterState
from placement.policies import policy
from placement.types import AdapterName, VersionId
from tests.support.cluster_kit import R0, R1, acknowledge, adapter, cluster, spec


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


def test_a_refused_version_that_comes_again_is_tried_again() -> None:
    """What was in its way may be gone."""
    state, version = cluster(), adapter("a")
    for _ in range(2):
        commands = state.handle(messages.AdapterRegistered(version))
        loading = [one.replica_id for one in commands if isinstance(one, messages.LoadAdapter)]
        assert loading == [R0, R1]
        state.handle(messages.AdapterLoadFailed(R0, version.version_id, "the disk hung"))
        state.handle(messages.AdapterWithdrawn(version.version_id))
        state.handle(messages.AdapterLoadFailed(R1, version.version_id, "the disk hung"))
        assert not any(record.refused for record in state.replicas.values())


def test_an_adapter_that_fits_nowhere_is_refused_at_once() -> None:
    state = cluster(slots=1)
    acknowledge(state, state.handle(messages.AdapterRegistered(adapter("a"))))
    acknowledge(state, state.handle(messages.AdapterRegistered(adapter("b"))))
    third = adapter("c")
    acknowledge(state, state.handle(messages.AdapterRegistered(third)))
    assert "no replica has room" in (state.refusal(third.version_id) or "")
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


def test_nothing_is_loaded_beside_a_copy_of_unknown_size_before_it_has_gone() -> None:
    first, last, new = VersionId("stray@1"), VersionId("stray@2"), adapter("a")
    state = ClusterState(replica_ids=(R0,), policy=policy("least-loaded"), adapters=[new], recovering=True)
    commands = state.handle(messages.ReplicaReady(spec(R0), "a:1", frozenset({first, last})))
    assert all(messages.UnloadAdapter(R0, stray) in commands for stray in (first, last))
    commands += state.handle(messages.AdapterUnloaded(R0, first))
    assert not any(isinstance(command, messages.LoadAdapter) for command in commands)
    assert messages.LoadAdapter(R0, new) in state.handle(messages.AdapterUnloaded(R0, last))


def test_a_late_answer_of_a_lost_replica_changes_nothing() -> None:
    state = cluster()
    state.handle(messages.AdapterRegistered(adapter("a")))
    state.handle(messages.ReplicaLost(R0, "killed"))
    before = state.table
    state.handle(messages.AdapterLoaded(R0, adapter("a").version_id))
    state.handle(messages.AdapterUnloaded(R0, adapter("a").version_id))
    assert state.table == before
    check_cluster(state)


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
