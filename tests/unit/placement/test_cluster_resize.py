"""Restarting replicas to the `max_lora_rank` that is planned: drained, one at a time, taken back in time."""

import pytest

from placement.cluster import messages
from placement.cluster.invariants import check_cluster
from placement.cluster.records import DrainOrder, ReplicaPhase
from placement.cluster.resize import MAX_WAITING_EPOCHS, OVERLOADED_EPOCHS, Resizer
from placement.cluster.state import ClusterState
from placement.latency import LatencyModel, RankKernel
from placement.plans.rank_sizing import RankSizingLimits
from placement.policies import policy
from placement.profile import EngineFacts, OperatingPoint, Profile
from placement.types import ReplicaId
from tests.support.cluster_kit import R0, R1, acknowledge, adapter, spec

R2 = ReplicaId("replica-2")
LOW, HIGH = adapter("low", rank=8), adapter("high", rank=128)
PROFILE = Profile(
    name="kind",
    source="made up",
    engine=EngineFacts(kind="vllm", model="m", kv_blocks=1000),
    latency=LatencyModel(kernel=RankKernel.PADDED_CONFIG),
    latency_basis="derived",
    operating_points=(
        OperatingPoint(rank=8, tokens_per_s=4000.0),
        OperatingPoint(rank=128, tokens_per_s=2000.0),
    ),
)
MOSTLY_LOW = messages.EpochElapsed({LOW.version_id: 1200.0, HIGH.version_id: 100.0})


MOSTLY_HIGH = messages.EpochElapsed({LOW.version_id: 100.0, HIGH.version_id: 2000.0})


def _mixed(
    *, replicas: tuple[ReplicaId, ...] = (R0, R1), slots: int = 4, restart_s: float = 5.0
) -> ClusterState:
    """All set to 128, with both adapters on each."""
    state = ClusterState(
        replica_ids=replicas,
        policy=policy("least-loaded"),
        profiles={"": PROFILE},
        resizer=Resizer(RankSizingLimits(restart_s=restart_s), deadline_s=7.0),
    )
    for replica in replicas:
        state.handle(messages.ReplicaReady(spec(replica, slots=slots), f"h:{replica[-1]}"))
    for one in (LOW, HIGH):
        acknowledge(state, state.handle(messages.AdapterRegistered(one)))
    return state


def _leaves(state: ClusterState) -> ReplicaId:
    """The replica that an epoch of mostly low ranks has leave."""
    acknowledge(state, state.handle(MOSTLY_LOW))
    (leaving,) = [record.replica_id for record in state.replicas.values() if record.leaving]
    return leaving


def _up(state: ClusterState, replica: ReplicaId) -> list[messages.Command]:
    """The replica starts, with the setting it is to have."""
    setting = state.replicas[replica].max_lora_rank or 128
    return acknowledge(state, state.handle(messages.ReplicaReady(spec(replica, max_rank=setting), "h:9")))


def test_a_replica_leaves_the_table_is_remembered_drained_and_started_with_its_setting() -> None:
    state = _mixed()
    commands = acknowledge(state, state.handle(MOSTLY_LOW))
    wanted = state.resizer.sizing.max_lora_ranks
    assert sorted(wanted.values()) == [8, 128]
    assert state.resizer.sizing.utilisation > state.resizer.sizing.planned_utilisation
    (leaving,) = [replica for replica in (R0, R1) if wanted[replica] == 8]
    kinds = [type(command) for command in commands]
    assert kinds.index(messages.PublishTable) < kinds.index(messages.SaveMaxLoraRank)
    assert kinds.index(messages.SaveMaxLoraRank) + 1 == kinds.index(messages.DrainReplica)
    assert messages.SaveMaxLoraRank(leaving, 8) in commands
    assert messages.DrainReplica(leaving, 7.0) in commands
    assert leaving not in state.table.replicas
    assert all(entry.holders for entry in state.table.entries.values())
    assert state.handle(messages.ReplicaDrained(leaving)) == [
        messages.StopReplica(leaving),
        messages.StartReplica(leaving, 0),
    ]
    _up(state, leaving)
    assert state.table.replicas[leaving].max_lora_rank == 8
    assert state.holders(LOW.version_id) == (R0, R1)
    assert leaving not in state.holders(HIGH.version_id)
    assert not any(
        isinstance(one, messages.DrainReplica) for one in acknowledge(state, state.handle(MOSTLY_LOW))
    )
    check_cluster(state)


def test_one_is_away_at_a_time() -> None:
    state = _mixed(replicas=(R0, R1, R2))
    first = _leaves(state)
    wanted = state.resizer.sizing.max_lora_ranks
    assert sorted(wanted.values()) == [8, 8, 128]
    acknowledge(state, state.handle(MOSTLY_LOW))
    state.handle(messages.ReplicaDrained(first))
    acknowledge(state, state.handle(MOSTLY_LOW))
    assert [one for one in state.replicas.values() if one.phase is ReplicaPhase.DRAINING] == []
    _up(state, first)
    second = _leaves(state)
    assert second != first
    state.handle(messages.ReplicaDrained(second))
    _up(state, second)
    ranks = sorted(record.spec.max_lora_rank for record in state.replicas.values() if record.spec is not None)
    assert ranks == [8, 8, 128]


def test_a_plan_places_nothing_where_a_lower_setting_is_wanted() -> None:
    state = _mixed(replicas=(R0, R1, R2))
    _leaves(state)
    waiting = [key for key, rank in state.resizer.sizing.max_lora_ranks.items() if rank == 8]
    for replica in waiting:
        assert replica not in state.plan.replicas_of(HIGH.version_id)
    assert {state.plan.max_lora_ranks[key] for key in waiting if key in state.plan.max_lora_ranks} == {8}


def test_a_replica_that_does_not_come_up_with_its_setting_gets_the_one_before() -> None:
    state = _mixed()
    leaving = _leaves(state)
    state.handle(messages.ReplicaDrained(leaving))
    commands = state.handle(messages.ReplicaLost(leaving, "no memory"))
    assert messages.SaveMaxLoraRank(leaving, None) in commands
    assert messages.StartReplica(leaving, 1) in commands
    _up(state, leaving)
    assert state.table.replicas[leaving].max_lora_rank == 128
    acknowledge(state, state.handle(MOSTLY_LOW))
    assert not any(record.resize or record.leaving for record in state.replicas.values()), "not tried again"


def test_one_that_dies_while_it_leaves_comes_back_with_the_new_setting() -> None:
    state = _mixed()
    leaving = _leaves(state)
    commands = state.handle(messages.ReplicaLost(leaving, "killed"))
    assert messages.StartReplica(leaving, 1) in commands
    _up(state, leaving)
    assert state.table.replicas[leaving].max_lora_rank == 8
    assert state.replicas[leaving].resize is None


@pytest.mark.parametrize("other_dies", [True, False])
def test_a_restart_is_taken_back_while_others_cannot_do_without_the_replica(other_dies: bool) -> None:
    """What it alone holds is not loaded elsewhere yet; the other one dies meanwhile, or never loads it."""
    state = _mixed()
    acknowledge(state, state.handle(messages.AdapterRemoved(LOW.name)))
    state.handle(messages.AdapterRegistered(LOW))
    state.handle(messages.AdapterLoaded(R1, LOW.version_id))
    state.handle(messages.AdapterLoadFailed(R0, LOW.version_id, "not now"))
    state.handle(MOSTLY_LOW)
    resized = state.replicas[R1]
    assert resized.resize is not None
    assert not resized.leaving
    assert state.drain_waits_for(R1) == (LOW.version_id,)
    if other_dies:
        state.handle(messages.ReplicaLost(R0, "killed"))
    for _ in range(0 if other_dies else MAX_WAITING_EPOCHS):
        assert state.replicas[R1].phase is ReplicaPhase.DRAINING
        state.handle(messages.AdapterLoadFailed(R0, LOW.version_id, "not now"))
        state.handle(MOSTLY_LOW)
    assert resized.resize is None
    assert resized.max_lora_rank is None
    assert state.replicas[R1].phase is ReplicaPhase.READY
    assert R1 in state.holders(LOW.version_id)
    check_cluster(state)


def test_an_operators_drain_goes_before_and_a_frozen_plan_keeps_settings() -> None:
    state = _mixed()
    leaving = _leaves(state)
    order = DrainOrder(deadline_s=1.0)
    state.handle(messages.DrainRequested(leaving, order))
    assert state.replicas[leaving].resize is None
    state.handle(messages.ReplicaDrained(leaving))
    assert state.replicas[leaving].phase is ReplicaPhase.DRAINED
    frozen = _mixed()
    frozen.handle(messages.FreezeRequested(True))
    acknowledge(frozen, frozen.handle(MOSTLY_LOW))
    assert all(record.phase is ReplicaPhase.READY for record in frozen.replicas.values())


def test_what_is_remembered_is_what_a_new_controllers_replicas_start_with() -> None:
    state = ClusterState(
        replica_ids=(R0, R1), policy=policy("least-loaded"), max_lora_ranks={R1: 8, ReplicaId("gone"): 8}
    )
    assert [record.max_lora_rank for record in state.replicas.values()] == [None, 8]


def test_settings_stand_until_the_replica_that_restarts_is_back() -> None:
    state = _mixed(replicas=(R0, R1, R2))
    first = _leaves(state)
    wanted = state.resizer.sizing.max_lora_ranks
    for event in (MOSTLY_HIGH, messages.ReplicaDrained(first), MOSTLY_HIGH):
        acknowledge(state, state.handle(event))
        assert state.resizer.sizing.max_lora_ranks == wanted
    _up(state, first)
    acknowledge(state, state.handle(MOSTLY_HIGH))
    assert state.resizer.sizing.max_lora_ranks != wanted


def _restarted(state: ClusterState, event: messages.Event) -> list[ReplicaId]:
    """An epoch, and the restart that it begins, if it does, to its end."""
    acknowledge(state, state.handle(event))
    leaving = [record.replica_id for record in state.replicas.values() if record.leaving]
    for replica in leaving:
        state.handle(messages.ReplicaDrained(replica))
        _up(state, replica)
    assert all(record.phase is ReplicaPhase.READY for record in state.replicas.values())
    return leaving


def test_a_replica_restarts_again_only_when_it_has_repaid_the_last_restart() -> None:
    state = _mixed(replicas=(R0, R1, R2), restart_s=60.0)
    horizon = RankSizingLimits().horizon_epochs
    restarts = [_restarted(state, (MOSTLY_LOW, MOSTLY_HIGH)[place % 2]) for place in range(horizon)]
    each = [replica for restarted in restarts for replica in restarted]
    assert 1 <= len(each) == len(set(each)), f"{restarts}"
    # A change that lasts is followed in the end.
    later = [one for _ in range(2 * horizon) for one in _restarted(state, MOSTLY_HIGH)]
    assert len(later) == len(set(later))
    assert later
    check_cluster(state)


def test_others_are_overloaded_for_a_setting_only_where_all_have_been_for_some_epochs() -> None:
    state = _mixed()
    too_much = messages.EpochElapsed({LOW.version_id: 6000.0, HIGH.version_id: 100.0})
    carried = messages.EpochElapsed({LOW.version_id: 3500.0, HIGH.version_id: 100.0})
    peaks = [too_much] * (OVERLOADED_EPOCHS - 1)
    assert not any(_restarted(state, event) for event in [*peaks, carried, *peaks])
    assert len(_restarted(state, too_much)) == 1


def test_a_rank_that_no_replica_takes_waits_for_no_repayment() -> None:
    state = _mixed(replicas=(R0, R1, R2), restart_s=60.0)
    acknowledge(state, state.handle(messages.AdapterRemoved(HIGH.name)))
    only_low = messages.EpochElapsed({LOW.version_id: 1200.0})
    assert len([one for _ in range(3) for one in _restarted(state, only_low)]) == 3
    acknowledge(state, state.handle(messages.AdapterRegistered(HIGH)))
    assert state.refusal(HIGH.version_id) is not None
    (back,) = _restarted(state, only_low)
    acknowledge(state, [])
    assert state.holders(HIGH.version_id) == (back,)
