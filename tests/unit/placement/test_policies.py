"""What every placement policy promises, on random snapshots."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.invariants import check_placement
from placement.policies import POLICIES, policy
from placement.types import AdapterName, AdapterVersion, ReplicaId, ReplicaSpec, Snapshot, version_id


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
        )
        for index in range(draw(st.integers(0, 5)))
    )
    demand = {adapter.version_id: draw(st.floats(0, 100)) for adapter in adapters if draw(st.booleans())}
    return Snapshot(
        adapters=adapters, replicas=replicas, demand_tokens_per_s=demand, seed=draw(st.integers(0, 9))
    )


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(snapshot=snapshots(), shuffle=st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_a_plan_is_valid_repeatable_independent_of_order_and_stable(
    name: str, snapshot: Snapshot, shuffle: int
) -> None:
    plan = policy(name).plan(snapshot)
    check_placement(snapshot, plan)
    assert policy(name).plan(snapshot) == plan
    mixed = random.Random(shuffle)
    shuffled = Snapshot(
        adapters=tuple(mixed.sample(snapshot.adapters, len(snapshot.adapters))),
        replicas=tuple(mixed.sample(snapshot.replicas, len(snapshot.replicas))),
        demand_tokens_per_s=snapshot.demand_tokens_per_s,
        seed=snapshot.seed,
    )
    assert policy(name).plan(shuffled) == plan
    unchanged = Snapshot(
        adapters=snapshot.adapters,
        replicas=snapshot.replicas,
        current=plan,
        demand_tokens_per_s=snapshot.demand_tokens_per_s,
        seed=snapshot.seed,
    )
    assert policy(name).plan(unchanged) == plan, "an unchanged workload moves nothing"


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
    with pytest.raises(KeyError, match="least-loaded, slora-random"):
        policy("best")
