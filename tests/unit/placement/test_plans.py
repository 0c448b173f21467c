"""Plans as values: checked, mended, compared, written down; and the skew of a cluster."""

import json
from dataclasses import replace
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.cluster.invariants import check_placement
from placement.latency import LatencyModel, RankKernel
from placement.plans.diff import diff_of
from placement.plans.repair import repaired
from placement.plans.skew import skew_of, uses_of
from placement.plans.text import parse_plan, plan_text
from placement.plans.veto import veto
from placement.policies.base import Room
from placement.profile import EngineFacts, OperatingPoint, Profile
from placement.types import Holder, Placement, ReplicaId, ReplicaSpec, Snapshot, VersionId
from tests.support.cluster_kit import R0, R1, adapter, spec

R2 = ReplicaId("replica-2")
REPLICAS = (R0, R1, R2)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Snapshot, Placement]:
    """A snapshot, and a valid plan for some of its adapters."""
    adapters = tuple(
        adapter(f"a{index}", rank=draw(st.sampled_from([8, 64, 128])), size_bytes=draw(st.integers(1, 9)))
        for index in range(draw(st.integers(0, 5)))
    )
    replicas = tuple(
        spec(one, slots=draw(st.integers(1, 4)), max_rank=draw(st.sampled_from([8, 64, 128])), pool_bytes=20)
        for one in REPLICAS
    )
    rooms = Room.of(replicas)
    placed: dict[VersionId, tuple[Holder, ...]] = {}
    for one in adapters:
        chosen = [room for room in rooms.values() if room.fits(one) and draw(st.booleans())]
        for room in chosen:
            room.put(one)
        weights = [1.0, *(draw(st.sampled_from([0.0, 1.0, 3.0])) for _ in chosen)][: len(chosen)]
        if chosen:
            placed[one.version_id] = tuple(
                Holder(replica_id=room.spec.replica_id, share=weight / sum(weights), spill=weight == 0)
                for room, weight in zip(chosen, weights, strict=True)
            )
    plan = Placement(MappingProxyType(placed))
    demand = {one.version_id: float(draw(st.integers(0, 100))) for one in adapters}
    return Snapshot(adapters=adapters, replicas=replicas, demand_tokens_per_s=demand), plan


@given(clusters())
def test_a_plan_in_order_is_not_vetoed_and_mending_leaves_it_as_it_is(
    cluster: tuple[Snapshot, Placement],
) -> None:
    snapshot, plan = cluster
    snapshot = replace(snapshot, current=plan)
    assert veto(snapshot, plan) is None
    mended = repaired(snapshot, plan)
    assert {key: value for key, value in mended.holders.items() if key in plan.holders} == plan.holders


@given(clusters(), st.sets(st.sampled_from(REPLICAS)), st.integers(0, 4))
def test_what_is_mended_after_losses_may_be_adopted(
    cluster: tuple[Snapshot, Placement], lost: set[ReplicaId], num_removed: int
) -> None:
    snapshot, plan = cluster
    left = tuple(one for one in snapshot.replicas if one.replica_id not in lost)
    snapshot = replace(snapshot, replicas=left, adapters=snapshot.adapters[num_removed:], current=plan)
    mended = repaired(snapshot, plan)
    check_placement(snapshot, mended)
    assert veto(snapshot, mended) is None
    assert repaired(replace(snapshot, current=mended), mended) == mended
    rooms = Room.of(left)
    for one in snapshot.adapters:
        for holder in mended.holders.get(one.version_id, ()):
            rooms[holder.replica_id].put(one)
    unplaced = [one for one in snapshot.adapters if one.version_id not in mended.holders]
    assert not any(room.fits(one) for one in unplaced for room in rooms.values()), "no room is left unused"


def test_a_new_version_takes_the_places_of_the_one_before() -> None:
    old, new = adapter("a"), adapter("a", digest="1" * 64)
    plan = Placement({old.version_id: (Holder(replica_id=R1, share=1.0),)})
    snapshot = Snapshot(adapters=(new,), replicas=(spec(R0), spec(R1)))
    assert repaired(snapshot, plan).holders == {new.version_id: (Holder(replica_id=R1, share=1.0),)}


@pytest.mark.parametrize(
    ("holders", "reason"),
    [
        ({"b": ((R0, 1.0),)}, "which is not registered"),
        ({"a": ((R2, 1.0),)}, "replica-2, which is not ready"),
        ({"a": ((R1, 1.0),)}, "rank 64 on replica-1, which takes 8"),
        ({"a": ((R0, 0.5), (R0, 0.5))}, "placed twice"),
        ({"a": ((R0, 0.7),)}, "shares sum to 0.7"),
        ({"a": ((R0, float("nan")),)}, "negative or no number"),
        ({"a": ((R0, -1.0),)}, "negative or no number"),
        ({"a": ()}, "placed nowhere"),
        ({}, "it drops the last copy of a@"),
        ({"a": ((R0, 1.0),), "c": ((R0, 1.0),)}, "2 adapters on replica-0, which holds 1"),
    ],
)
def test_a_veto_says_what_is_wrong(
    holders: dict[str, tuple[tuple[ReplicaId, float], ...]], reason: str
) -> None:
    one = adapter("a", rank=64)
    snapshot = Snapshot(
        adapters=(one, adapter("c")),
        replicas=(spec(R0, slots=1), spec(R1, max_rank=8)),
        current=Placement({one.version_id: (Holder(replica_id=R0, share=1.0),)}),
    )
    plan = Placement(
        {
            adapter(name).version_id: tuple(Holder(replica_id=key, share=share) for key, share in pairs)
            for name, pairs in holders.items()
        }
    )
    assert reason in str(veto(snapshot, plan))


def test_a_veto_knows_the_bytes_and_the_ranks_that_a_plan_sets() -> None:
    one = adapter("a", rank=64, size_bytes=11)
    snapshot = Snapshot(adapters=(one,), replicas=(spec(R0, pool_bytes=10),))
    plan = Placement({one.version_id: (Holder(replica_id=R0, share=1.0),)})
    assert "11 bytes on replica-0, whose pool has 10" in str(veto(snapshot, plan))
    snapshot = replace(snapshot, replicas=(spec(R0),))
    assert "which takes 32" in str(veto(snapshot, replace(plan, max_lora_ranks={R0: 32})))
    assert "replica-1, which is not ready" in str(veto(snapshot, replace(plan, max_lora_ranks={R1: 64})))


@given(clusters(), st.dictionaries(st.sampled_from(REPLICAS), st.integers(1, 512)))
def test_a_plan_is_read_as_it_was_written(
    cluster: tuple[Snapshot, Placement], ranks: dict[ReplicaId, int]
) -> None:
    plan = replace(cluster[1], max_lora_ranks=MappingProxyType(ranks))
    assert parse_plan(plan_text(plan)) == plan


def test_a_plan_of_the_first_releases_is_read() -> None:
    assert parse_plan('{"a@1": {"replica-0": 1.0}}').holders == {
        VersionId("a@1"): (Holder(replica_id=R0, share=1.0),)
    }


@pytest.mark.parametrize(
    "tree",
    [
        [], {"plan": {}}, {"holders": []}, {"holders": {"a@1": ["replica-0"]}},
        {"holders": {"a@1": {"replica-0": "1"}}}, {"holders": {"a@1": {"replica-0": True}}},
        {"holders": {"a@1": {"replica-0": 1}}, "spill": {"a@1": ["replica-1"]}},
        {"holders": {"a@1": {"replica-0": 1}}, "spill": {"a@1": [["replica-0"]]}},
        {"holders": {"a@1": {"replica-0": 10**400}}}, {"holders": {}, "max_lora_ranks": {"replica-0": 8.5}},
    ],
)  # fmt: skip
def test_a_text_that_is_no_plan_is_a_value_error(tree: object) -> None:
    with pytest.raises(ValueError, match="not a plan"):
        parse_plan(json.dumps(tree))


@given(clusters(), clusters())
def test_a_diff_applied_to_the_plan_before_gives_the_one_after(
    one: tuple[Snapshot, Placement], other: tuple[Snapshot, Placement]
) -> None:
    snapshot, before = one
    after = repaired(snapshot, other[1])
    diff = diff_of(snapshot, after, before)
    copies = {(key, holder.replica_id) for key, row in before.holders.items() for holder in row}
    for change in diff.replicas:
        copies -= {(version, change.replica_id) for version in change.dropped}
        copies |= {(version, change.replica_id) for version in change.added}
    assert copies == {(key, holder.replica_id) for key, row in after.holders.items() for holder in row}
    sizes = {adapter.version_id: adapter.size_bytes for adapter in snapshot.adapters}
    added = [version for change in diff.replicas for version in change.added]
    assert diff.bytes_to_move == sum(sizes[version] for version in added)
    assert diff_of(snapshot, after, after).is_empty


def profile(kernel: RankKernel) -> Profile:
    """1000 tokens/s of rank 8, 500 of rank 128."""
    facts = EngineFacts(kind="emulated", model="m", kv_blocks=1)
    return Profile(
        name="p",
        source="made up",
        engine=facts,
        latency=LatencyModel(kernel=kernel),
        latency_basis="derived",
        operating_points=(
            OperatingPoint(rank=8, tokens_per_s=1000.0), OperatingPoint(rank=128, tokens_per_s=500.0)
        ),
    )  # fmt: skip


def mixed(kernel: RankKernel) -> tuple[Snapshot, Placement]:
    """Rank 8 on both replicas, rank 128 on the first; 100 tokens/s of each."""
    low, high = adapter("low", rank=8), adapter("high", rank=128)
    specs: tuple[ReplicaSpec, ...] = (spec(R0), spec(R1))
    snapshot = Snapshot(
        adapters=(low, high),
        replicas=specs,
        demand_tokens_per_s={low.version_id: 100.0, high.version_id: 100.0},
        profiles={"": profile(kernel)},
    )
    plan = Placement(
        {
            low.version_id: (Holder(replica_id=R0, share=0.5), Holder(replica_id=R1, share=0.5)),
            high.version_id: (Holder(replica_id=R0, share=1.0),),
        }
    )
    return snapshot, plan


def test_utilisation_and_skew_follow_from_what_ranks_cost_beside_each_other() -> None:
    snapshot, plan = mixed(RankKernel.PADDED_BATCH)
    uses = uses_of(snapshot, plan)
    assert (uses[R0].utilisation, uses[R1].utilisation) == pytest.approx((0.3, 0.05))
    assert (uses[R0].highest_rank, uses[R1].highest_rank) == (128, 8)
    assert uses[R0].operating_point_tokens_per_s == pytest.approx(500.0)
    skew = skew_of(snapshot, plan)
    assert skew.load == pytest.approx(0.3 / 0.175)
    # 50 of the 200 tokens cost twice what they would cost alone.
    assert skew.rank == pytest.approx(1.25)
    assert skew.total == pytest.approx(1.25 * 0.3 / 0.175)


def test_ranks_add_no_skew_where_each_costs_its_own_and_all_do_where_the_setting_counts() -> None:
    snapshot, plan = mixed(RankKernel.SUM)
    assert skew_of(snapshot, plan).rank == 1.0
    assert uses_of(snapshot, plan)[R0].utilisation == pytest.approx(0.25)
    snapshot, plan = mixed(RankKernel.PADDED_CONFIG)
    # All of the 100 tokens of rank 8 cost twice what they would with a setting of 8.
    assert skew_of(snapshot, plan).rank == pytest.approx(1.5)
    set_low = replace(plan, max_lora_ranks={R1: 8})
    assert skew_of(snapshot, set_low).rank == pytest.approx(1.25)
    assert uses_of(snapshot, set_low)[R1].utilisation == pytest.approx(0.05)


def test_without_demand_or_profile_there_is_no_skew_but_of_load() -> None:
    snapshot, plan = mixed(RankKernel.SUM)
    assert skew_of(replace(snapshot, demand_tokens_per_s={}), plan).total == 1.0
    flat = replace(snapshot, profiles={})
    assert skew_of(flat, plan).rank == 1.0
    assert not uses_of(flat, plan)[R0].is_measured
    assert uses_of(flat, plan)[R0].operating_point_tokens_per_s is None
