"""What operators want of adapters, in the snapshots that plans are made from."""

import pytest

from placement.cluster import messages
from placement.cluster.records import DrainOrder
from placement.cluster.state import ClusterState
from placement.policies import policy
from placement.profile import Slo
from placement.types import AdapterName, AdapterTerms, Placement, Snapshot, VersionId
from tests.support.cluster_kit import R0, R1, acknowledge, adapter, cluster

A, B = AdapterName("a"), AdapterName("b")
TIGHT = AdapterTerms(weight=3.0, slo=Slo(ttft_ms=200.0, tbt_ms=50.0))


def snapshot_of(state: ClusterState) -> tuple[dict[VersionId, float], dict[VersionId, Slo]]:
    snapshot = state.snapshot()
    return dict(snapshot.weights), dict(snapshot.slos)


def test_terms_belong_to_the_name_and_end_with_it() -> None:
    state = cluster()
    for name in "ab":
        acknowledge(state, state.handle(messages.AdapterRegistered(adapter(name))))
    assert snapshot_of(state) == ({}, {})
    state.handle(messages.AdapterTermsChanged(A, TIGHT))
    state.handle(messages.AdapterTermsChanged(AdapterName("nobody"), TIGHT))
    first = adapter("a").version_id
    assert snapshot_of(state) == ({first: 3.0}, {first: TIGHT.slo})
    newer = adapter("a", digest="2" * 64)
    acknowledge(state, state.handle(messages.AdapterRegistered(newer)))
    assert snapshot_of(state) == ({newer.version_id: 3.0}, {newer.version_id: TIGHT.slo})
    state.handle(messages.AdapterTermsChanged(A, AdapterTerms(weight=2.0)))
    assert snapshot_of(state) == ({newer.version_id: 2.0}, {})
    state.handle(messages.AdapterRemoved(A))
    acknowledge(state, state.handle(messages.AdapterRegistered(adapter("a"))))
    assert snapshot_of(state) == ({}, {})
    acknowledge(state, state.handle(messages.AdapterRegistered(adapter("c"))))
    state.handle(messages.AdapterTermsChanged(AdapterName("c"), TIGHT))
    state.handle(messages.AdapterWithdrawn(adapter("c").version_id))
    assert snapshot_of(state) == ({}, {})


def test_terms_come_back_with_the_adapters_that_are_still_there() -> None:
    state = ClusterState(
        replica_ids=(R0,),
        policy=policy("optimal"),
        adapters=[adapter("a")],
        terms={A: TIGHT, B: AdapterTerms(weight=9.0)},
    )
    version = adapter("a").version_id
    assert snapshot_of(state) == ({version: 3.0}, {version: TIGHT.slo})


class Looking:
    """A policy that keeps what it was shown."""

    name = "looking"

    def __init__(self) -> None:
        self.seen: list[Snapshot] = []

    def plan(self, snapshot: Snapshot) -> Placement:
        """What `optimal` makes of it."""
        self.seen.append(snapshot)
        return policy("optimal").plan(snapshot)


def test_a_policy_plans_anew_with_changed_terms_and_never_for_a_replica_that_is_to_leave() -> None:
    state = cluster()
    acknowledge(state, state.handle(messages.AdapterRegistered(adapter("a"))))
    state.policy = looking = Looking()
    state.handle(messages.AdapterTermsChanged(A, TIGHT))
    assert looking.seen[-1].weights == {adapter("a").version_id: 3.0}
    state.handle(messages.DrainRequested(R0, DrainOrder(deadline_s=5.0)))
    assert [spec.replica_id for spec in looking.seen[-1].replicas] == [R1]
    assert R0 not in state.plan.replicas_of(adapter("a").version_id)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e7])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="expected a number above 0, at most 1e"):
        AdapterTerms(weight=weight)
