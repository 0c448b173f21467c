"""Copies that a migration adds to a plan: only where there is room, with shares that still sum to one."""

from types import MappingProxyType

from hypothesis import given
from hypothesis import strategies as st

from placement.cluster.invariants import check_placement
from placement.migration.view import with_copies
from placement.policies import policy
from placement.types import Placement, ReplicaId, Snapshot, VersionId
from tests.support.cluster_kit import adapter, spec

IDS = tuple(ReplicaId(f"replica-{place}") for place in range(3))


@given(
    slots=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    ranks=st.lists(st.sampled_from([8, 64]), min_size=1, max_size=4),
    copies=st.lists(st.tuples(st.sampled_from(IDS), st.integers(0, 5)), max_size=6),
)
def test_added_copies_respect_every_pool_and_come_in_any_order(
    slots: list[int], ranks: list[int], copies: list[tuple[ReplicaId, int]]
) -> None:
    adapters = tuple(adapter(f"a{place}", rank=rank) for place, rank in enumerate(ranks))
    specs = [
        spec(key, slots=count, max_rank=64 if key != IDS[2] else 8)
        for key, count in zip(IDS, slots, strict=True)
    ]
    snapshot = Snapshot(adapters=adapters, replicas=tuple(specs))
    plan = policy("slora-random").plan(snapshot)
    known = [one.version_id for one in adapters]
    wanted = [(key, known[place] if place < len(known) else VersionId("gone")) for key, place in copies]
    found = with_copies(plan, wanted, snapshot)
    check_placement(snapshot, found)
    assert found == with_copies(plan, reversed(wanted), snapshot)
    for version, holders in plan.holders.items():
        assert {holder.replica_id for holder in holders} <= found.replicas_of(version)
    assert with_copies(Placement(MappingProxyType({})), wanted, snapshot).holders == {}
