"""Draining replicas: copy first, then leave the table, then end; and what is refused."""

import pytest

from placement.cluster import messages
from placement.cluster.invariants import check_cluster
from placement.cluster.records import DrainOrder, ReplicaPhase
from placement.cluster.state import ClusterState
from placement.policies import policy
from placement.routing.chooser import Chooser, LoadView, RouteRequest
from placement.types import ReplicaId
from tests.support.cluster_kit import R0, R1, acknowledge, adapter, cluster, spec

R2 = ReplicaId("replica-2")
ORDER = DrainOrder(deadline_s=5.0)
FORCED = DrainOrder(deadline_s=5.0, force=True)


def alone_on_r0(*, slots: int = 4) -> ClusterState:
    """Two replicas, adapter `a` on the first one only."""
    state = ClusterState(replica_ids=(R0, R1), policy=policy("least-loaded"), base_model="m")
    state.handle(messages.ReplicaReady(spec(R0, slots=slots), "h:0"))
    state.handle(messages.ReplicaGivenUp(R1, "no memory"))
    acknowledge(state, state.handle(messages.AdapterRegistered(adapter("a"))))
    state.handle(messages.UndrainRequested(R1))
    for command in state.handle(messages.ReplicaReady(spec(R1, slots=slots), "h:1")):
        if isinstance(command, messages.LoadAdapter):
            state.handle(messages.AdapterLoadFailed(R1, command.adapter.version_id, "not now"))
    assert state.holders(adapter("a").version_id) == (R0,)
    return state


def test_a_drain_waits_for_the_last_copy_then_the_table_then_the_work() -> None:
    state = alone_on_r0()
    version = adapter("a").version_id
    assert state.drain_problem([R0]) is None
    commands = state.handle(messages.DrainRequested(R0, ORDER))
    assert commands[0] == messages.SaveDrain(R0, ORDER)
    assert not any(isinstance(command, messages.DrainReplica) for command in commands)
    assert state.table.replicas[R0].draining, "it serves what nobody else holds"
    assert state.drain_waits_for(R0) == (version,)
    commands = state.handle(messages.EpochElapsed())
    assert messages.LoadAdapter(R1, adapter("a")) in commands
    commands = state.handle(messages.AdapterLoaded(R1, version))
    kinds = [type(command) for command in commands]
    assert kinds.index(messages.PublishTable) < kinds.index(messages.DrainReplica)
    assert list(state.table.replicas) == [R1]
    assert state.drain_waits_for(R0) == ()
    sooner = DrainOrder(deadline_s=1.0)
    commands = state.handle(messages.DrainRequested(R0, sooner))
    assert commands == [messages.SaveDrain(R0, sooner), messages.DrainReplica(R0, 1.0)], "it is told"
    commands = state.handle(messages.ReplicaDrained(R0))
    done = DrainOrder(deadline_s=1.0, done=True)
    assert commands == [messages.SaveDrain(R0, done), messages.StopReplica(R0)]
    assert state.handle(messages.ReplicaLost(R0, "it was stopped")) == []
    assert state.replicas[R0].phase is ReplicaPhase.DRAINED
    check_cluster(state)


def test_a_drain_that_would_lose_an_adapter_or_every_replica_is_a_problem() -> None:
    state = cluster(slots=1)
    acknowledge(state, state.handle(messages.AdapterRegistered(adapter("a"))))
    acknowledge(state, state.handle(messages.AdapterRegistered(adapter("b"))))
    assert state.drain_problem([R0]) in {f"no other replica has room for {name}" for name in "ab"}
    assert state.drain_problem([R0, R1]) == "no replica would be left that is ready"


def test_a_forced_drain_gives_up_what_has_no_other_home() -> None:
    state = cluster(slots=1)
    for name in ("a", "b"):
        acknowledge(state, state.handle(messages.AdapterRegistered(adapter(name))))
    kept = next(name for name in "ab" if state.holders(adapter(name).version_id) == (R1,))
    commands = state.handle(messages.DrainRequested(R0, FORCED))
    assert messages.DrainReplica(R0, 5.0) in commands
    assert [name for name, entry in state.table.entries.items() if entry.holders] == [kept]
    assert len(state.table.entries) == 2, "the other name stays registered: its requests wait"


def test_a_forced_drain_gives_up_nothing_that_a_full_replica_serves() -> None:
    state = cluster(slots=3)
    for name in ("a", "b"):
        acknowledge(state, state.handle(messages.AdapterRegistered(adapter(name))))
    c = adapter("c").version_id
    state.handle(messages.AdapterRegistered(adapter("c")))
    state.handle(messages.AdapterLoaded(R1, c))
    state.handle(messages.AdapterLoadFailed(R0, c, "not now"))
    state.handle(messages.EpochElapsed())  # replica-0 is asked for it again, and full from now on
    state.handle(messages.DrainRequested(R1, FORCED))
    state.handle(messages.AdapterRegistered(adapter("a", digest="1" * 64)))
    served = {name: [one.replica_id for one in entry.holders] for name, entry in state.table.entries.items()}
    assert served == {"a": [R0], "b": [R0], "c": [R1]}, "the draining replica's copy of a counts no more"
    check_cluster(state)


def test_a_replica_that_dies_while_draining_is_not_started_again() -> None:
    state = cluster()
    acknowledge(state, state.handle(messages.AdapterRegistered(adapter("a"))))
    state.handle(messages.DrainRequested(R0, ORDER))
    commands = state.handle(messages.ReplicaLost(R0, "killed"))
    assert not any(isinstance(command, messages.StartReplica) for command in commands)
    assert state.replicas[R0].phase is ReplicaPhase.DRAINED


def test_a_replica_that_dies_with_a_last_copy_has_drained_once_another_holds_it() -> None:
    state = alone_on_r0()
    state.handle(messages.DrainRequested(R0, ORDER))
    state.handle(messages.EpochElapsed())
    state.handle(messages.ReplicaLost(R0, "killed"))
    assert state.replicas[R0].phase is ReplicaPhase.DRAINING
    assert state.drain_waits_for(R0) == (adapter("a").version_id,)
    state.handle(messages.AdapterLoaded(R1, adapter("a").version_id))
    assert state.replicas[R0].phase is ReplicaPhase.DRAINED


def test_undrain_serves_on_before_it_has_left_and_starts_it_again_after() -> None:
    state = alone_on_r0()
    state.handle(messages.DrainRequested(R0, ORDER))
    commands = state.handle(messages.UndrainRequested(R0))
    assert commands[0] == messages.SaveDrain(R0, None)
    assert state.replicas[R0].phase is ReplicaPhase.READY
    assert not state.table.replicas[R0].draining
    state.handle(messages.EpochElapsed())
    state.handle(messages.AdapterLoaded(R1, adapter("a").version_id))
    state.handle(messages.DrainRequested(R0, ORDER))
    assert state.replicas[R0].leaving
    assert state.handle(messages.UndrainRequested(R0)) == [messages.SaveDrain(R0, None)]
    commands = state.handle(messages.ReplicaDrained(R0))
    assert commands == [messages.StopReplica(R0), messages.StartReplica(R0, 0)]


@pytest.mark.parametrize("phase", [ReplicaPhase.STARTING, ReplicaPhase.FAILED])
def test_a_replica_without_a_process_has_drained_at_once(phase: ReplicaPhase) -> None:
    state = cluster()
    lost = {ReplicaPhase.STARTING: 1, ReplicaPhase.FAILED: 4}[phase]
    for _ in range(lost):
        state.handle(messages.ReplicaReady(spec(R0), "h:0"))
        state.handle(messages.ReplicaLost(R0, "killed"))
    assert state.replicas[R0].phase is phase
    commands = state.handle(messages.DrainRequested(R0, ORDER))
    assert messages.StopReplica(R0) in commands
    assert state.handle(messages.ReplicaReady(spec(R0), "h:0")) == [messages.StopReplica(R0)]
    assert state.replicas[R0].phase is ReplicaPhase.DRAINED


def test_a_replica_found_draining_that_nobody_drains_any_more_is_started_again() -> None:
    state = ClusterState(replica_ids=(R0, R1), policy=policy("least-loaded"), recovering=True)
    state.handle(messages.ReplicaReady(spec(R1), "h:1"))
    commands = state.handle(messages.ReplicaReady(spec(R0), "h:0", draining=True))
    assert any(isinstance(command, messages.DrainReplica) for command in commands)
    assert list(state.table.replicas) == [R1]
    assert messages.StartReplica(R0, 0) in state.handle(messages.ReplicaDrained(R0))


def test_a_replica_found_draining_keeps_the_deadline_of_its_order() -> None:
    state = ClusterState(
        replica_ids=(R0, R1), policy=policy("least-loaded"), drains={R0: ORDER}, recovering=True
    )
    state.handle(messages.ReplicaReady(spec(R1), "h:1"))
    commands = state.handle(messages.ReplicaReady(spec(R0), "h:0", draining=True))
    assert [command for command in commands if isinstance(command, messages.DrainReplica)] == [
        messages.DrainReplica(R0, 5.0)
    ]


def test_what_an_earlier_controller_asked_for_is_asked_for_again() -> None:
    loading, stray = adapter("a"), adapter("gone")
    state = ClusterState(
        replica_ids=(R0,), policy=policy("least-loaded"), adapters=[loading], recovering=True
    )
    commands = state.handle(
        messages.ReplicaReady(
            spec(R0),
            "h:0",
            loading=frozenset({loading.version_id, stray.version_id}),
        )
    )
    assert messages.LoadAdapter(R0, loading) in commands
    assert messages.UnloadAdapter(R0, stray.version_id) in commands
    state.handle(messages.AdapterLoaded(R0, loading.version_id))
    assert state.is_served(loading.version_id)


def test_requests_for_the_base_model_keep_away_from_a_draining_replica() -> None:
    state = alone_on_r0()
    state.handle(messages.DrainRequested(R0, ORDER))
    chooser, view = Chooser("least-outstanding", 1), LoadView(loads={}, in_flight={R1: 50})
    chosen = {chooser.choose(RouteRequest(adapter=None), state.table, view).replica_id for _ in range(20)}
    assert chosen == {R1}
    tried = RouteRequest(adapter=None, exclude=frozenset({R1}))
    assert chooser.choose(tried, state.table, view).replica_id == R0
