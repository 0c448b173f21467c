"""`loraserve` against numbers worked out by hand, and what it does where the paper is silent."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from placement.cluster.invariants import check_placement
from placement.latency import LatencyModel
from placement.policies import policy
from placement.policies.loraserve import packed
from placement.policies.loraserve_packing import budgets
from placement.profile import EngineFacts, OperatingPoint, Profile
from placement.types import (
    AdapterName,
    AdapterVersion,
    Holder,
    Placement,
    ReplicaId,
    ReplicaSpec,
    Snapshot,
    version_id,
)

TOKENS_PER_S = {8: 4000.0, 32: 2000.0, 64: 1600.0, 128: 1000.0}
PROFILE = Profile(
    name="p",
    source="a test",
    engine=EngineFacts(kind="s-lora", model="m", kv_blocks=100),
    latency=LatencyModel(),
    latency_basis="published",
    operating_points=tuple(OperatingPoint(rank=r, tokens_per_s=value) for r, value in TOKENS_PER_S.items()),
)
WORKED = {"a1": 2400.0, "a2": 1600.0, "a3": 400.0, "b1": 1200.0, "b2": 600.0, "c1": 160.0, "d1": 700.0}
WORKED["d2"] = 400.0
RANKS = {"a": 8, "b": 32, "c": 64, "d": 128}

Shares = dict[str, dict[str, float]]


def adapter(name: str, size_bytes: int | None = None) -> AdapterVersion:
    rank = RANKS[name[0]]
    return AdapterVersion(
        version_id=version_id(AdapterName(name), f"{name}-weights-----------"),
        name=AdapterName(name),
        sha256=name,
        rank=rank,
        size_bytes=rank if size_bytes is None else size_bytes,
    )


def replicas(count: int, slots: int = 100, pool_bytes: int = 10_000) -> tuple[ReplicaSpec, ...]:
    return tuple(
        ReplicaSpec(
            replica_id=ReplicaId(f"r{index}"),
            max_lora_rank=128,
            pool_adapters=slots,
            pool_bytes=pool_bytes,
            profile="p",
        )
        for index in range(1, count + 1)
    )


def snapshot(
    demand: Mapping[str, float], specs: tuple[ReplicaSpec, ...], current: Placement | None = None
) -> Snapshot:
    adapters = tuple(adapter(name) for name in demand)
    return Snapshot(
        adapters=adapters,
        replicas=specs,
        current=current or Placement(),
        demand_tokens_per_s={one.version_id: demand[one.name] for one in adapters},
        profiles={"p": PROFILE},
    )


def planned(given: Snapshot) -> Shares:
    """The shares by adapter name and replica, once the placement has been checked."""
    plan = policy("loraserve").plan(given)
    check_placement(given, plan)
    names = {one.version_id: one.name for one in given.adapters}
    return {
        names[version]: {holder.replica_id: holder.share for holder in holders}
        for version, holders in plan.holders.items()
    }


def held(**holders: str) -> Placement:
    """A placement by replica: what it holds, separated by spaces."""
    versions = {name: adapter(name).version_id for names in holders.values() for name in names.split()}
    return Placement(
        {
            version: tuple(
                Holder(replica_id=ReplicaId(replica), share=1.0)
                for replica, names in holders.items()
                if name in names.split()
            )
            for name, version in versions.items()
        }
    )


def test_the_worked_example_step_by_step() -> None:
    """Four replicas, operating points 4000, 2000, 1600 and 1000 tokens/s for ranks 8, 32, 64 and 128.

    Utilisations: rank 8: a1 2400/4000 = 0.6, a2 0.4, a3 0.1: 1.1. Rank 32: b1 1200/2000 = 0.6, b2 0.3: 0.9.
    Rank 64: c1 160/1600 = 0.1. Rank 128: d1 700/1000 = 0.7, d2 0.4: 1.1. Sum 3.2, target 3.2/4 = 0.8.

    ROUND: 1.1/0.8 = 1.375, 0.9/0.8 = 1.125, 0.125 and 1.375. The whole parts are 1, 1, 0, 1; the one replica
    left goes to the larger remainder, 0.375, of rank 8 and of rank 128 alike: to the higher rank. 1, 1, 0, 2.

    FRACTIONALBINPACKING. First replica, rank 8: a1 0.6, then 0.2 of a2; 0.2 of a2 and all of a3 are left
    over. Second, rank 32: b1 0.6, 0.2 of b2; 0.1 of b2 is left over. Third and fourth, rank 128: d1 0.7 and
    0.1 of d2 (a quarter), then 0.3 of d2. c1 has no replica and is left over.

    ALLOCATEHIGHESTMAXRANK: 0.2 + 0.1 + 0.1 + 0.1 = 0.5 is left over, and 0.5 is free, all on the fourth,
    whose highest rank of 128 nothing raises. So a2, b2, a3 and c1 go there, in the order of their tokens/s.
    """
    one, two, three, four = packed(snapshot(WORKED, replicas(4)))
    expected = [
        {"a1": 2400.0, "a2": 800.0},
        {"b1": 1200.0, "b2": 400.0},
        {"d1": 700.0, "d2": 100.0},
        {"d2": 300.0, "a2": 800.0, "b2": 200.0, "a3": 400.0, "c1": 160.0},
    ]
    for part, wanted in zip((one, two, three, four), expected, strict=True):
        by_version = {adapter(name).version_id: tokens for name, tokens in wanted.items()}
        assert part.tokens_per_s == pytest.approx(by_version)
        assert list(part.tokens_per_s) == list(by_version), "placed in this order"
        assert part.util == pytest.approx(0.8)
    assert [part.max_rank for part in (one, two, three, four)] == [8, 32, 128, 128]


def test_the_worked_example_is_permuted_to_what_replicas_hold_and_split_by_shares() -> None:
    """PERMUTEASSIGNMENT of the example above, sizes being ranks.

    r1 holds d1 and d2, r2 a1 and a2, r3 b1 and b2, r4 d2 and c1. The first part {a1, a2} has 16 in common
    with r2; the second {b1, b2} 64 with r3; the third {d1, d2} 256 with r1 and 128 with r4; the fourth {d2,
    a2, b2, a3, c1} 192 with r4, 128 with r1, 8 with r2, 32 with r3. Third to r1 and fourth to r4 keep 448,
    the other way round 256. Shares: a2 0.2 and 0.2 of 0.4, b2 0.2 and 0.1 of 0.3, d2 0.1 and 0.3 of 0.4.
    """
    current = held(r1="d1 d2", r2="a1 a2", r3="b1 b2", r4="d2 c1")
    given = snapshot(WORKED, replicas(4), current)
    shares = planned(given)
    assert shares == {
        "a1": {"r2": 1.0},
        "a2": {"r2": pytest.approx(1 / 2), "r4": pytest.approx(1 / 2)},
        "a3": {"r4": 1.0},
        "b1": {"r3": 1.0},
        "b2": {"r3": pytest.approx(2 / 3), "r4": pytest.approx(1 / 3)},
        "c1": {"r4": 1.0},
        "d1": {"r1": 1.0},
        "d2": {"r1": pytest.approx(1 / 4), "r4": pytest.approx(3 / 4)},
    }


def test_a_budget_is_the_quota_s_whole_part_and_the_largest_remainders() -> None:
    assert budgets({8: 1.1, 32: 0.9, 64: 0.1, 128: 1.1}, 4) == {8: 1, 32: 1, 64: 0, 128: 2}
    assert budgets({8: 0.5, 16: 0.3, 32: 0.2}, 1) == {8: 1, 16: 0, 32: 0}
    assert budgets({8: 1.0, 128: 3.0}, 8) == {8: 2, 128: 6}


def test_twice_the_demand_is_planned_alike_when_it_overloads_every_replica() -> None:
    """The target of the worked example doubled is 1.6, above what a replica sustains."""
    double = {name: 2 * tokens for name, tokens in WORKED.items()}
    assert planned(snapshot(double, replicas(4))) == {
        name: pytest.approx(shares) for name, shares in planned(snapshot(WORKED, replicas(4))).items()
    }


def test_a_rank_without_a_replica_raises_the_highest_rank_of_one_alone() -> None:
    """Quotas 1.8 and 0.2: rank 8 gets both replicas and fills the first to 0.95. The space that is left is
    on the second, and the first adapter of rank 128 makes it the place for the other."""
    demand = {"a1": 4000.0, "a2": 2840.0, "d1": 95.0, "d2": 94.0}
    shares = planned(snapshot(demand, replicas(2)))
    assert set(shares["d1"]) == set(shares["d2"])
    assert len(shares["d1"]) == 1


def test_before_any_demand_is_known_adapters_are_dealt_by_rank_in_equal_chunks() -> None:
    names = [f"{letter}{digit}" for letter in "dcba" for digit in (1, 2)]
    shares = planned(snapshot(dict.fromkeys(names, 0.0), replicas(3)))
    by_replica = {
        replica: sorted(name for name in shares if replica in shares[name]) for replica in ("r1", "r2", "r3")
    }
    assert by_replica == {"r1": ["a1", "a2", "b1"], "r2": ["b2", "c1", "c2"], "r3": ["d1", "d2"]}


def test_an_adapter_without_demand_gets_a_place_among_its_own_rank() -> None:
    quiet = {f"{letter}{digit}": 0.0 for letter in "abd" for digit in range(3, 9)}
    given = snapshot({**WORKED, **quiet}, replicas(4))
    assert planned(given).keys() == WORKED.keys() | quiet.keys()
    for part in packed(given):
        ranks = {one.rank for one in given.adapters if one.version_id in part.tokens_per_s}
        assert part.max_rank == max(ranks)
    assert packed(given)[0].max_rank == 8, "nothing of no demand raises the first replica's highest rank"


def test_one_replica_holds_everything_with_one_share_each() -> None:
    assert planned(snapshot(WORKED, replicas(1))) == {name: {"r1": 1.0} for name in WORKED}


def test_with_more_ranks_than_replicas_every_adapter_has_a_place() -> None:
    shares = planned(snapshot(WORKED, replicas(2)))
    assert shares.keys() == WORKED.keys()
    assert {replica for one in shares.values() for replica in one} == {"r1", "r2"}


def test_an_adapter_larger_than_any_pool_is_left_out_and_takes_no_room() -> None:
    given = snapshot(WORKED, replicas(4))
    huge = replace(adapter("d3"), size_bytes=10_001)
    without = packed(given)
    with_it = packed(replace(given, adapters=(*given.adapters, huge)))
    assert [set(part.tokens_per_s) for part in with_it] == [set(part.tokens_per_s) for part in without]


def test_what_its_own_rank_s_replica_has_no_memory_for_goes_to_another() -> None:
    """Rank 8 has the first replica of three for 0.6 of utilisation, which would do for all three of its
    adapters; it has room for two."""
    specs = replicas(3, slots=2)
    demand = {"a1": 1000.0, "a2": 900.0, "a3": 500.0, "b1": 1200.0, "d1": 600.0}
    given = snapshot(demand, specs)
    assert sorted(len(part.tokens_per_s) for part in packed(given)) == [1, 2, 2]
    shares = planned(given)
    assert shares.keys() == demand.keys()
    assert shares["a1"] == shares["a2"] != shares["a3"]


def test_no_adapter_goes_without_a_copy_while_another_has_two() -> None:
    """Three equal adapters for two replicas are 1.5 each: the second is split, and takes a second place that
    the fourth, without demand, needs."""
    demand = {"a1": 3000.0, "a2": 3000.0, "a3": 3000.0, "a4": 0.0}
    shares = planned(snapshot(demand, replicas(2, slots=2)))
    assert shares.keys() == demand.keys()
    assert all(math.isclose(sum(one.values()), 1.0) for one in shares.values())


def test_ranks_take_the_replicas_that_admit_them() -> None:
    """Only r1 admits rank 128, though ranks ascend and replicas come in the order of their ids."""
    high, low = replicas(2)
    specs = (high, replace(low, max_lora_rank=32))
    shares = planned(snapshot({"a1": 2000.0, "a2": 1000.0, "d1": 700.0, "d2": 50.0}, specs))
    assert set(shares["d1"]) == set(shares["d2"]) == {"r1"}
    assert set(shares["a1"]) == {"r2"}


def test_a_slower_replica_gets_fewer_tokens_for_the_same_utilisation() -> None:
    slow = replace(
        PROFILE,
        name="slow",
        operating_points=tuple(
            OperatingPoint(rank=rank, tokens_per_s=value / 2) for rank, value in TOKENS_PER_S.items()
        ),
    )
    first, second = replicas(2)
    given = snapshot({"a1": 3000.0}, (first, replace(second, profile="slow")))
    given = replace(given, profiles={"p": PROFILE, "slow": slow})
    parts = packed(given)
    assert {part.room.spec.replica_id: part.util for part in parts} == pytest.approx({"r1": 0.5, "r2": 0.5})
    assert planned(given)["a1"] == pytest.approx({"r1": 2 / 3, "r2": 1 / 3})
