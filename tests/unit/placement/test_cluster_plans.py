"""Plans in the cluster's state machine: checked, exchanged over full replicas, frozen, rolled back."""

from types import MappingProxyType

import pytest

from placement.cluster import messages
from placement.cluster.records import CopyPhase
from placement.cluster.state import ClusterState
from placement.plans.book import MAX_EARLIER, EarlierPlan
from placement.policies import policy
from placement.types import AdapterVersion, Holder, Placement, ReplicaId, Snapshot, VersionId
from tests.support.cluster_kit import R0, R1, acknowledge, adapter, spec

R2 = ReplicaId("replica-2")
A, B = adapter("a"), adapter("b")


class Given:
    """A policy that plans what the test says, however bad."""

    name = "given"

    def __init__(self) -> None:
        self.plan_made = Placement()

    def plan(self, snapshot: Snapshot) -> Placement:
        """What the test said."""
        return self.plan_made


def placed(**holders: dict[ReplicaId, float]) -> Placement:
    versions = {"a": A.version_id, "b": B.version_id}
    return Placement(
        MappingProxyType(
            {
                versions[name]: tuple(
                    Holder(replica_id=key, share=share, spill=share == 0) for key, share in shares.items()
                )
                for name, shares in holders.items()
            }
        )
    )


def begun(slots: dict[ReplicaId, int], plan: Placement, *adapters: AdapterVersion) -> ClusterState:
    """A cluster at rest that has this plan."""
    given = Given()
    given.plan_made = plan
    state = ClusterState(replica_ids=slots, policy=given, base_model="m")
    for replica, count in slots.items():
        state.handle(messages.ReplicaReady(spec(replica, slots=count), f"127.0.0.1:{replica[-1]}"))
    for one in adapters:
        given.plan_made = Placement(
            MappingProxyType({key: value for key, value in plan.holders.items() if key in _known(state, one)})
        )
        acknowledge(state, state.handle(messages.AdapterRegistered(one)))
    assert state.plan == plan
    return state


def _known(state: ClusterState, one: AdapterVersion) -> set[VersionId]:
    return {*state.adapters, one.version_id}


def replan(state: ClusterState, plan: Placement) -> list[messages.Command]:
    """An epoch at which the policy makes this plan; answered in full."""
    assert isinstance(state.policy, Given)
    state.policy.plan_made = plan
    return acknowledge(state, state.handle(messages.EpochElapsed()))


def held(state: ClusterState) -> dict[ReplicaId, set[VersionId]]:
    return {
        key: {version for version, copy in record.copies.items() if copy.phase is CopyPhase.HELD}
        for key, record in state.replicas.items()
    }


def shares(state: ClusterState, one: AdapterVersion) -> dict[ReplicaId, float]:
    return {holder.replica_id: holder.share for holder in state.table.entries[one.name].holders}


def test_full_replicas_exchange_their_only_copies_over_a_third_place() -> None:
    state = begun({R0: 1, R1: 1, R2: 1}, placed(a={R0: 1.0}, b={R1: 1.0}), A, B)
    commands = replan(state, placed(a={R1: 1.0}, b={R0: 1.0}))
    assert held(state) == {R0: {B.version_id}, R1: {A.version_id}, R2: set()}
    tables = [command.table for command in commands if isinstance(command, messages.PublishTable)]
    for table in tables:
        assert all(entry.holders for entry in table.entries.values()), "nothing is unserved meanwhile"
    loads = [command for command in commands if isinstance(command, messages.LoadAdapter)]
    assert len(loads) == 3, "one copy more than is exchanged"
    assert state.book.problem is None


def test_an_exchange_without_a_third_place_is_not_done_and_said() -> None:
    before = placed(a={R0: 1.0}, b={R1: 1.0})
    state = begun({R0: 1, R1: 1}, before, A, B)
    commands = replan(state, placed(a={R1: 1.0}, b={R0: 1.0}))
    assert held(state) == {R0: {A.version_id}, R1: {B.version_id}}
    assert state.plan == before
    assert state.book.problem is not None
    assert not any(isinstance(command, messages.LoadAdapter) for command in commands)
    replan(state, before)
    assert state.book.problem is None


def test_new_weights_in_a_full_cluster_take_the_place_of_a_copy_that_is_not_the_only_one() -> None:
    state = begun({R0: 1, R1: 1, R2: 1}, placed(a={R0: 1.0}, b={R1: 0.5, R2: 0.5}), A, B)
    state.handle(messages.FreezeRequested(True))
    newer = adapter("a", digest="1" * 64)
    commands = acknowledge(state, state.handle(messages.AdapterRegistered(newer)))
    assert state.is_served(newer.version_id)
    assert held(state)[R2] == {B.version_id} or held(state)[R1] == {B.version_id}
    tables = [command.table for command in commands if isinstance(command, messages.PublishTable)]
    assert all(entry.holders for table in tables for entry in table.entries.values())
    acknowledge(state, state.handle(messages.EpochElapsed()))
    assert held(state) == {R0: {newer.version_id}, R1: {B.version_id}, R2: {B.version_id}}


def test_a_share_is_lent_to_the_holder_before_until_the_new_one_has_acknowledged() -> None:
    state = begun({R0: 2, R1: 2, R2: 2}, placed(a={R0: 0.5, R1: 0.5}), A)
    assert isinstance(state.policy, Given)
    state.policy.plan_made = placed(a={R0: 0.5, R2: 0.5})
    commands = state.handle(messages.EpochElapsed())
    assert shares(state, A) == {R0: 0.5, R1: 0.5}, "nobody is sent where it is not loaded"
    assert commands == [
        *(command for command in commands if isinstance(command, messages.SavePlan | messages.KeepPlan)),
        messages.LoadAdapter(R2, A),
    ]
    commands = state.handle(messages.AdapterLoaded(R2, A.version_id))
    assert shares(state, A) == {R0: 0.5, R2: 0.5}
    assert commands[-1] == messages.UnloadAdapter(R1, A.version_id)


def test_spill_holders_are_in_the_table_without_a_share() -> None:
    state = begun({R0: 1, R1: 1}, placed(a={R0: 1.0, R1: 0.0}), A)
    entry = state.table.entries[A.name]
    assert [(one.replica_id, one.share, one.spill) for one in entry.holders] == [
        (R0, 1.0, False),
        (R1, 0.0, True),
    ]


def test_a_plan_that_may_not_be_is_refused_and_the_one_before_kept() -> None:
    before = placed(a={R0: 1.0}, b={R0: 1.0})
    state = begun({R0: 2, R1: 1}, before, A, B)
    for bad, reason in (
        (placed(a={R0: 1.0}), "last copy of b"),
        (placed(a={R0: 1.0}, b={R2: 1.0}), "replica-2, which is not ready"),
        (placed(a={R1: 1.0}, b={R1: 1.0}), "2 adapters on replica-1"),
        (placed(a={R0: 0.5}, b={R0: 1.0}), "shares sum to 0.5"),
    ):
        replan(state, bad)
        assert state.plan == before
        assert reason in str(state.book.problem)
        assert reason in str(state.plan_problem(bad))
        assert state.handle(messages.PlanGiven(bad, True)) == []
        assert state.book.frozen is None
    replan(state, before)
    assert state.book.problem is None


@pytest.mark.parametrize("error", [TypeError("no"), AssertionError(), RuntimeError("deep"), ValueError("no")])
def test_a_policy_that_fails_leaves_the_plan_before_in_force(error: Exception) -> None:
    class Failing(Given):
        def plan(self, snapshot: Snapshot) -> Placement:
            raise error

    before = placed(a={R0: 1.0}, b={R1: 1.0})
    state = begun({R0: 2, R1: 2}, before, A, B)
    state.policy = Failing()
    acknowledge(state, state.handle(messages.EpochElapsed()))
    assert state.plan == before
    assert f"it failed: {type(error).__name__}" in str(state.book.problem)
    acknowledge(state, state.handle(messages.ReplicaLost(R1, "killed")))
    assert held(state)[R0] == {A.version_id, B.version_id}


def test_a_refused_plan_leaves_no_adapter_on_a_lost_replica() -> None:
    state = begun({R0: 2, R1: 2}, placed(a={R0: 1.0}, b={R1: 1.0}), A, B)
    acknowledge(state, state.handle(messages.ReplicaLost(R1, "killed")))
    assert "replica-1, which is not ready" in str(state.book.problem)
    assert held(state)[R0] == {A.version_id, B.version_id}
    assert state.plan == placed(a={R0: 1.0}, b={R0: 1.0})


def test_a_frozen_plan_stays_over_epochs_and_losses_and_takes_new_adapters() -> None:
    frozen = placed(a={R0: 1.0})
    state = begun({R0: 2, R1: 2}, frozen, A)
    state.handle(messages.FreezeRequested(True))
    replan(state, placed(a={R1: 1.0}))
    assert state.plan == frozen
    acknowledge(state, state.handle(messages.AdapterRegistered(B)))
    assert shares(state, A) == {R0: 1.0}
    assert state.is_served(B.version_id)
    acknowledge(state, state.handle(messages.ReplicaLost(R0, "killed")))
    assert shares(state, A) == {R1: 1.0}
    acknowledge(state, state.handle(messages.ReplicaReady(spec(R0), "127.0.0.1:0")))
    assert shares(state, A) == {R0: 1.0}, "back where it was frozen"
    assert isinstance(state.policy, Given)
    state.policy.plan_made = placed(a={R1: 1.0}, b={R1: 1.0})
    acknowledge(state, state.handle(messages.FreezeRequested(False)))
    assert shares(state, A) == {R1: 1.0}


def test_a_rollback_goes_back_plan_by_plan_and_stays_there() -> None:
    plans = [placed(a={one: 1.0}) for one in (R0, R1, R2)]
    state = begun({R0: 1, R1: 1, R2: 1}, plans[0], A)
    for plan in plans[1:]:
        replan(state, plan)
    assert [one.ended_by for one in state.book.earlier] == ["an epoch", "an epoch"]
    for plan in reversed(plans[:-1]):
        acknowledge(state, state.handle(messages.RollbackRequested()))
        assert state.plan == plan
        replan(state, plans[2])
        assert state.plan == plan, "frozen"
    assert state.handle(messages.RollbackRequested()) == []


def test_a_plan_that_is_not_to_stay_changes_nothing_while_another_is_frozen() -> None:
    frozen = placed(a={R0: 1.0})
    state = begun({R0: 1, R1: 1}, frozen, A)
    state.handle(messages.FreezeRequested(True))
    for _ in range(3):
        assert state.handle(messages.PlanGiven(placed(a={R0: 0.5, R1: 0.5}), False)) == []
    assert state.plan == frozen
    assert state.book.earlier == [], "there is nothing to go back to"


def test_an_exchange_that_is_never_done_leaves_the_plans_before_it_to_go_back_to() -> None:
    before = placed(a={R0: 1.0}, b={R1: 1.0})
    state = begun({R0: 1, R1: 1}, before, A, B)
    first = [EarlierPlan(number=one, plan=placed(a={R0: 1.0}), ended_by="") for one in range(MAX_EARLIER)]
    state.book.earlier = list(first)
    kept = {one.number: one for one in first}
    for _ in range(2 * MAX_EARLIER):
        for command in replan(state, placed(a={R1: 1.0}, b={R0: 1.0})):
            match command:
                case messages.KeepPlan(number=number, plan=None):
                    del kept[number]
                case messages.KeepPlan(number=number, plan=plan, ended_by=why):
                    assert plan is not None
                    kept[number] = EarlierPlan(number=number, plan=plan, ended_by=why)
        assert state.plan == before
    assert state.book.earlier == first
    assert list(kept.values()) == first, "nor does the store keep more"


def test_the_plans_kept_are_bounded() -> None:
    state = begun({R0: 1, R1: 1}, placed(a={R0: 1.0}), A)
    for index in range(2 * MAX_EARLIER):
        replan(state, placed(a={(R1, R0)[index % 2]: 1.0}))
    assert len(state.book.earlier) == MAX_EARLIER


def test_adapters_that_are_registered_together_are_planned_for_once() -> None:
    class Counting(Given):
        num_plans = 0

        def plan(self, snapshot: Snapshot) -> Placement:
            self.num_plans += 1
            return policy("least-loaded").plan(snapshot)

    counting = Counting()
    state = ClusterState(replica_ids=(R0, R1), policy=counting, base_model="m")
    for replica in (R0, R1):
        state.handle(messages.ReplicaReady(spec(replica, slots=9), f"127.0.0.1:{replica[-1]}"))
    before = counting.num_plans
    some = [adapter(f"a{index}") for index in range(9)]
    commands = state.handle_many([messages.AdapterRegistered(one) for one in some])
    assert counting.num_plans == before + 1
    assert [one for one in commands if isinstance(one, messages.SaveAdapter)] == [
        messages.SaveAdapter(one) for one in some
    ]
    acknowledge(state, commands)
    assert all(state.holders(one.version_id) == (R0, R1) for one in some)


def move(state: ClusterState, plan: Placement) -> list[messages.Command]:
    """What a migration adds to the plan."""
    return acknowledge(state, state.handle(messages.PlanGiven(plan, frozen=False, is_reactive=True)))


def ends(state: ClusterState) -> list[tuple[Placement, str]]:
    return [(one.plan, one.ended_by) for one in state.book.earlier]


def test_a_rollback_passes_over_what_migrations_added() -> None:
    only, other, both, all_three = (
        placed(a=shares) for shares in ({R0: 1.0}, {R1: 1.0}, {R0: 0.5, R1: 0.5}, {R0: 0.5, R1: 0.5, R2: 0.0})
    )
    state = begun({R0: 1, R1: 1, R2: 1}, only, A)
    for _ in range(2 * MAX_EARLIER):
        move(state, both)
        move(state, all_three)
    assert ends(state) == [(only, "requests were moved")]
    replan(state, other)
    assert ends(state) == [(only, "an epoch")]
    move(state, both)
    assert ends(state) == [(only, "an epoch"), (other, "requests were moved")]
    for plan in (other, only):
        acknowledge(state, state.handle(messages.RollbackRequested()))
        assert state.plan == plan
    assert state.book.earlier == []


def test_a_decision_that_takes_back_what_migrations_added_leaves_nothing_to_go_back_to() -> None:
    only = placed(a={R0: 1.0})
    state = begun({R0: 1, R1: 1}, only, A)
    move(state, placed(a={R0: 0.5, R1: 0.5}))
    replan(state, only)
    assert state.book.earlier == []


def test_what_migrations_added_is_kept_once_it_is_decided_on() -> None:
    only, both, other = (placed(a=shares) for shares in ({R0: 1.0}, {R0: 0.5, R1: 0.5}, {R1: 1.0}))
    state = begun({R0: 1, R1: 1}, only, A)
    move(state, both)
    state.handle(messages.FreezeRequested(True))
    assert ends(state) == [(only, "it was frozen")]
    assert isinstance(state.policy, Given)
    state.policy.plan_made = other
    acknowledge(state, state.handle(messages.FreezeRequested(False)))
    assert ends(state) == [(only, "it was frozen"), (both, "it was unfrozen")]


def test_loads_at_a_time_are_bounded_and_what_nobody_holds_comes_first() -> None:
    state = ClusterState(replica_ids=(R0, R1), policy=policy("least-loaded"), max_loads=2)
    some = [adapter(f"a{index}") for index in range(6)]
    state.handle(messages.ReplicaReady(spec(R0, slots=9), "127.0.0.1:0"))
    state.handle(messages.ReplicaGivenUp(R1, "no memory"))
    for one in some[:5]:
        acknowledge(state, state.handle(messages.AdapterRegistered(one)))
    state.handle(messages.UndrainRequested(R1))
    commands = state.handle(messages.ReplicaReady(spec(R1, slots=9), "127.0.0.1:1"))
    assert sum(isinstance(command, messages.LoadAdapter) for command in commands) == 2
    state.handle(messages.AdapterRegistered(some[5]))
    commands = state.handle(messages.AdapterLoaded(R1, some[0].version_id))
    assert messages.LoadAdapter(R1, some[5]) in commands
    acknowledge(state, [messages.LoadAdapter(R1, some[1]), messages.LoadAdapter(R1, some[5])])
    assert len(held(state)[R1]) == 6
