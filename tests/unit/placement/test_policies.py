"""What every placement policy promises, on random snapshots."""

import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.cluster.invariants import check_placement
from placement.latency import LatencyModel, RankKernel
from placement.policies import POLICIES, policy
from placement.policies.base import Room
from placement.policies.permutation import MAX_EXACT, permuted
from placement.profile import EngineFacts, OperatingPoint, Profile
from placement.types import (
    AdapterName,
    AdapterVersion,
    Holder,
    Placement,
    ReplicaId,
    ReplicaSpec,
    Snapshot,
    VersionId,
    version_id,
)

PROFILES = {
    kernel.value: Profile(
        name=kernel.value,
        source="a test",
        engine=EngineFacts(kind="test", model="m", kv_blocks=100),
        latency=LatencyModel(kernel=kernel),
        latency_basis="published",
        operating_points=(
            OperatingPoint(rank=8, tokens_per_s=100.0),
            OperatingPoint(rank=128, tokens_per_s=50.0),
        ),
    )
    for kernel in RankKernel
}


NAMES = sorted({type(one): name for name, one in sorted(POLICIES.items(), reverse=True)}.values())
"""One name of every policy: those that only route otherwise plan alike."""


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    adapters = tuple(
        AdapterVersion(
            version_id=version_id(AdapterName(f"a{index}"), f"{index:064x}"),
            name=AdapterName(f"a{index}"),
            sha256=f"{index:064x}",
            rank=draw(st.sampled_from([8, 16, 32, 64, 128])),
            size_bytes=draw(st.integers(1, 50)),
        )
        for index in range(draw(st.integers(0, 12)))
    )
    replicas = tuple(
        ReplicaSpec(
            replica_id=ReplicaId(f"r{index}"),
            max_lora_rank=draw(st.sampled_from([8, 64, 128])),
            pool_adapters=draw(st.integers(1, 12)),
            pool_bytes=draw(st.integers(10, 400)),
            profile=draw(st.sampled_from(["", *PROFILES])),
        )
        for index in range(draw(st.integers(0, 5)))
    )
    demand = {adapter.version_id: draw(st.floats(0, 100)) for adapter in adapters if draw(st.booleans())}
    return Snapshot(
        adapters=adapters,
        replicas=replicas,
        demand_tokens_per_s=demand,
        seed=draw(st.integers(0, 9)),
        profiles=PROFILES,
    )


@pytest.mark.parametrize("name", NAMES)
@given(snapshot=snapshots(), shuffle=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_a_plan_is_valid_repeatable_independent_of_order_and_stable(
    name: str, snapshot: Snapshot, shuffle: int
) -> None:
    plan = policy(name).plan(snapshot)
    check_placement(snapshot, plan)
    assert policy(name).plan(snapshot) == plan
    mixed = random.Random(shuffle)
    shuffled = replace(
        snapshot,
        adapters=tuple(mixed.sample(snapshot.adapters, len(snapshot.adapters))),
        replicas=tuple(mixed.sample(snapshot.replicas, len(snapshot.replicas))),
        demand_tokens_per_s=dict(
            mixed.sample(list(snapshot.demand_tokens_per_s.items()), len(snapshot.demand_tokens_per_s))
        ),
    )
    assert policy(name).plan(shuffled) == plan
    assert policy(name).plan(replace(snapshot, current=plan)) == plan, "an unchanged workload moves nothing"


@pytest.mark.parametrize("name", NAMES)
@given(snapshot=snapshots())
@settings(max_examples=60, deadline=None)
def test_whoever_is_left_out_fits_nowhere_beside_what_is_placed(name: str, snapshot: Snapshot) -> None:
    plan = policy(name).plan(snapshot)
    rooms = Room.of(snapshot.replicas)
    adapters = {adapter.version_id: adapter for adapter in snapshot.adapters}
    for version, holders in plan.holders.items():
        for holder in holders:
            rooms[holder.replica_id].put(adapters[version])
    for version in adapters.keys() - plan.holders.keys():
        assert not any(room.fits(adapters[version]) for room in rooms.values())


@pytest.mark.parametrize("name", NAMES)
@given(snapshot=snapshots(), count=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_of_equal_adapters_as_many_are_placed_as_there_are_places(
    name: str, snapshot: Snapshot, count: int
) -> None:
    equal = replace(
        snapshot,
        adapters=tuple(replace(adapter, rank=8, size_bytes=1) for adapter in snapshot.adapters),
        replicas=tuple(replace(spec, pool_adapters=min(count, 4)) for spec in snapshot.replicas),
    )
    places = sum(min(spec.pool_adapters, spec.pool_bytes) for spec in equal.replicas)
    assert len(policy(name).plan(equal).holders) == min(len(equal.adapters), places)


@pytest.mark.parametrize("name", NAMES)
@given(before=snapshots(), snapshot=snapshots())
@settings(max_examples=60, deadline=None)
def test_a_plan_is_valid_whatever_was_placed_before_under_other_limits(
    name: str, before: Snapshot, snapshot: Snapshot
) -> None:
    now = replace(snapshot, current=policy("slora-random").plan(replace(before, adapters=snapshot.adapters)))
    check_placement(now, policy(name).plan(now))


@pytest.mark.parametrize("name", NAMES)
@given(before=snapshots(), snapshot=snapshots())
@settings(max_examples=60, deadline=None)
def test_with_room_for_all_a_plan_from_any_placement_is_kept_while_nothing_changes(
    name: str, before: Snapshot, snapshot: Snapshot
) -> None:
    roomy = replace(
        snapshot,
        replicas=tuple(
            replace(spec, max_lora_rank=128, pool_adapters=20, pool_bytes=1000) for spec in snapshot.replicas
        ),
        current=policy("slora-random").plan(replace(before, adapters=snapshot.adapters)),
    )
    plan = policy(name).plan(roomy)
    check_placement(roomy, plan)
    assert len(plan.holders) == (len(roomy.adapters) if roomy.replicas else 0)
    assert _copies(policy(name).plan(replace(roomy, current=plan))) == _copies(plan)


def _copies(plan: Placement) -> dict[VersionId, frozenset[ReplicaId]]:
    return {version: plan.replicas_of(version) for version in plan.holders}


@given(snapshot=snapshots(), order=st.permutations(range(5)), other=snapshots())
@settings(max_examples=100, deadline=None)
def test_a_plan_is_permuted_back_to_what_is_there_and_never_moves_more_than_unpermuted(
    snapshot: Snapshot, order: list[int], other: Snapshot
) -> None:
    equal = replace(
        snapshot,
        replicas=tuple(
            replace(spec, max_lora_rank=128, pool_adapters=9, pool_bytes=400, profile="")
            for spec in snapshot.replicas
        ),
    )
    plan = policy("loraserve").plan(equal)
    ids = [spec.replica_id for spec in equal.replicas]
    names = dict(zip(ids, [ids[place] for place in order if place < len(ids)], strict=True))
    mixed = Placement(
        {
            version: tuple(
                sorted(
                    (replace(holder, replica_id=names[holder.replica_id]) for holder in holders),
                    key=lambda holder: holder.replica_id,
                )
            )
            for version, holders in plan.holders.items()
        }
    )
    assert permuted(plan, replace(equal, current=mixed)) == mixed
    assert policy("loraserve").plan(replace(equal, current=mixed)) == mixed
    there = replace(equal, current=policy("slora-random").plan(replace(other, replicas=equal.replicas)))
    assert _bytes_kept(permuted(plan, there), there) >= _bytes_kept(plan, there) * (1 - 1e-9)


def test_more_replicas_than_are_assigned_exactly_are_matched_by_what_they_hold() -> None:
    adapters, replicas = _adapters(2 * (MAX_EXACT + 6)), _replicas(MAX_EXACT + 6, slots=2)
    count = len(replicas)

    def dealt(shift: int, second: int) -> Placement:
        holders = {
            adapters[place].version_id: (
                Holder(replica_id=replicas[(place + shift) % count].replica_id, share=1.0),
            )
            for place in range(count)
        }
        for place in range(count):
            there = replicas[(place + second) % count].replica_id
            holders[adapters[count + place].version_id] = (Holder(replica_id=there, share=1.0),)
        return Placement(holders)

    snapshot = Snapshot(adapters=adapters, replicas=replicas, current=dealt(7, 500))
    # Each replica's first adapter leads to one replica, its second to another, so `count` can stay at best;
    # the largest overlap first keeps half of that at least.
    assert _bytes_kept(permuted(dealt(0, 0), snapshot), snapshot) >= count / 2
    moved = replace(snapshot, current=dealt(7, 7))
    assert permuted(dealt(0, 0), moved) == moved.current


def _bytes_kept(plan: Placement, snapshot: Snapshot) -> int:
    return sum(
        adapter.size_bytes
        * len(plan.replicas_of(adapter.version_id) & snapshot.current.replicas_of(adapter.version_id))
        for adapter in snapshot.adapters
    )


def _plain_least_loaded(snapshot: Snapshot) -> dict[str, frozenset[str]]:
    """`least-loaded` as one would write it down: every copy looks at every replica."""

    def put_one_more(adapter: AdapterVersion, rooms: list[Room]) -> bool:
        present = snapshot.current.replicas_of(adapter.version_id)
        fitting = [room for room in rooms if room.fits(adapter)]
        if fitting:
            min(
                fitting,
                key=lambda room: (
                    room.spec.replica_id not in present,
                    -room.free_adapters,
                    -room.free_bytes,
                    room.spec.replica_id,
                ),
            ).put(adapter)
        return bool(fitting)

    def place(order: list[AdapterVersion]) -> list[Room]:
        rooms = list(Room.of(snapshot.replicas).values())
        for adapter in order:
            put_one_more(adapter, rooms)
        return rooms

    def need(adapter: AdapterVersion) -> tuple[int, int, str]:
        homes = sum(spec.admits(adapter) for spec in snapshot.replicas)
        return homes, -adapter.size_bytes, adapter.version_id

    here = {spec.replica_id for spec in snapshot.replicas}
    by_need = sorted(snapshot.adapters, key=need)
    placed_first = sorted(
        by_need, key=lambda adapter: here.isdisjoint(snapshot.current.replicas_of(adapter.version_id))
    )
    rooms = max(place(placed_first), place(by_need), key=lambda made: sum(len(room.held) for room in made))
    demand = snapshot.demand_tokens_per_s
    by_demand = sorted(
        snapshot.adapters, key=lambda adapter: (-demand.get(adapter.version_id, 0.0), adapter.version_id)
    )
    while sum(put_one_more(adapter, rooms) for adapter in by_demand):
        pass
    holders: dict[str, set[str]] = {}
    for room in rooms:
        for version in room.held:
            holders.setdefault(version, set()).add(room.spec.replica_id)
    return {version: frozenset(replicas) for version, replicas in holders.items()}


@given(snapshot=snapshots(), other=snapshots())
@settings(max_examples=100, deadline=None)
def test_least_loaded_plans_as_if_it_looked_at_every_replica_for_every_copy(
    snapshot: Snapshot, other: Snapshot
) -> None:
    for current in (
        snapshot.current,
        policy("slora-random").plan(snapshot),
        policy("least-loaded").plan(other),
    ):
        now = replace(snapshot, current=current)
        plan = policy("least-loaded").plan(now)
        assert {version: plan.replicas_of(version) for version in plan.holders} == _plain_least_loaded(now)


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_replicas_with_ten_thousand_adapters_are_planned_in_seconds(name: str) -> None:
    begun_s = time.process_time()
    plan = policy(name).plan(Snapshot(adapters=_adapters(10_000), replicas=_replicas(1000, slots=40), seed=1))
    assert len(plan.holders) == 10_000
    assert time.process_time() - begun_s < 10, "each copy looks at every replica again"


def _adapters(count: int, rank: int = 8) -> tuple[AdapterVersion, ...]:
    return tuple(
        AdapterVersion(
            version_id=version_id(AdapterName(f"a{index}"), f"{index:064x}"),
            name=AdapterName(f"a{index}"),
            sha256=f"{index:064x}",
            rank=rank,
            size_bytes=1,
        )
        for index in range(count)
    )


def _replicas(count: int, slots: int) -> tuple[ReplicaSpec, ...]:
    return tuple(
        ReplicaSpec(
            replica_id=ReplicaId(f"r{index}"), max_lora_rank=128, pool_adapters=slots, pool_bytes=1000
        )
        for index in range(count)
    )


def test_least_loaded_puts_every_adapter_everywhere_when_it_fits() -> None:
    plan = policy("least-loaded").plan(Snapshot(adapters=_adapters(5), replicas=_replicas(3, slots=5)))
    assert all(len(holders) == 3 for holders in plan.holders.values())


@given(snapshot=snapshots())
@settings(max_examples=20, deadline=None)
def test_toppings_and_rank_backlog_have_every_adapter_where_least_loaded_has_it(snapshot: Snapshot) -> None:
    expected = policy("least-loaded").plan(snapshot)
    for name in ("toppings", "rank-backlog"):
        assert policy(name).plan(snapshot) == expected


def test_least_loaded_gives_everyone_one_copy_before_anyone_gets_two() -> None:
    plan = policy("least-loaded").plan(Snapshot(adapters=_adapters(6), replicas=_replicas(2, slots=4)))
    assert sorted(len(holders) for holders in plan.holders.values()) == [1, 1, 1, 1, 2, 2]


def test_slora_random_deals_one_copy_each_in_equal_chunks() -> None:
    plan = policy("slora-random").plan(Snapshot(adapters=_adapters(10), replicas=_replicas(4, slots=10)))
    counts = [sum(r.replica_id in plan.replicas_of(v) for v in plan.holders) for r in _replicas(4, 10)]
    assert all(len(holders) == 1 for holders in plan.holders.values())
    assert sorted(counts) == [2, 2, 3, 3]


def test_slora_random_depends_on_its_seed() -> None:
    plans = {
        str(policy("slora-random").plan(Snapshot(adapters=_adapters(10), replicas=_replicas(4, 10), seed=s)))
        for s in range(4)
    }
    assert len(plans) > 1


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match="known: dlora, least-loaded"):
        policy("best")
