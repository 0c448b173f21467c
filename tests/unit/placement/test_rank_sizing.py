"""The `max_lora_rank` of each replica: the best settings, whether they repay restarts, and in which order."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations_with_replacement

from hypothesis import given, settings
from hypothesis import strategies as st

from placement.latency import LatencyModel, RankKernel
from placement.plans.rank_sizing import RankPlan, RankSizingLimits, holds_all, next_restart, size_ranks
from placement.profile import EngineFacts, OperatingPoint, Profile
from placement.types import AdapterName, AdapterVersion, ReplicaId, ReplicaSpec, Snapshot, VersionId

STEPS = (8, 16, 32, 64, 128)
EAGER = RankSizingLimits(margin=0.0, min_gain=0.0, restart_s=0.0)
POINTS = {8: 4164.0, 16: 4000.0, 32: 3700.0, 64: 3100.0, 128: 2440.0}


def _profile(points: Mapping[int, float], kernel: RankKernel = RankKernel.PADDED_CONFIG) -> Profile:
    return Profile(
        name="kind",
        source="made up",
        engine=EngineFacts(kind="vllm", model="m", kv_blocks=1000),
        latency=LatencyModel(kernel=kernel),
        latency_basis="derived",
        operating_points=tuple(
            OperatingPoint(rank=rank, tokens_per_s=points[rank]) for rank in sorted(points)
        ),
    )


def _adapter(name: str, rank: int) -> AdapterVersion:
    return AdapterVersion(
        version_id=VersionId(name), name=AdapterName(name), sha256=name, rank=rank, size_bytes=rank
    )


def _spec(place: int, setting: int, *, adapters: int = 100) -> ReplicaSpec:
    return ReplicaSpec(
        replica_id=ReplicaId(f"replica-{place}"),
        max_lora_rank=setting,
        pool_adapters=adapters,
        pool_bytes=10**9,
        profile="kind",
    )


def _snapshot(
    demand: Mapping[int, float],
    ranks_now: list[int],
    *,
    adapters: int = 100,
    kernel: RankKernel | None = None,
) -> Snapshot:
    """One adapter of each rank, with this demand; one replica for each setting."""
    profile = _profile(POINTS, kernel or RankKernel.PADDED_CONFIG)
    versions = [_adapter(f"a{rank}", rank) for rank in demand]
    return Snapshot(
        adapters=tuple(versions),
        replicas=tuple(_spec(place, now, adapters=adapters) for place, now in enumerate(ranks_now)),
        demand_tokens_per_s={VersionId(f"a{rank}"): value for rank, value in demand.items()},
        profiles={"kind": profile},
        epoch_s=60.0,
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Up to five replicas, up to eight adapters, operating points that need not fall with rank."""
    points = {rank: draw(st.floats(1000, 5000)) for rank in STEPS}
    num = draw(st.integers(1, 5))
    pool = draw(st.integers(2, 9))
    versions = [
        _adapter(f"a{place}", draw(st.sampled_from(STEPS))) for place in range(draw(st.integers(1, 8)))
    ]
    return Snapshot(
        adapters=tuple(versions),
        replicas=tuple(_spec(place, draw(st.sampled_from(STEPS)), adapters=pool) for place in range(num)),
        demand_tokens_per_s={
            version.version_id: draw(st.one_of(st.just(0.0), st.floats(1, 5000))) for version in versions
        },
        profiles={"kind": _profile(points)},
    )


def _utilisation(snapshot: Snapshot, ranks: tuple[int, ...]) -> float:
    """The highest over all ranks of what is asked of it and above, over what serves it: once more, by
    hand."""
    profile, found = snapshot.profiles["kind"], 0.0
    for rank in {adapter.rank for adapter in snapshot.adapters}:
        asked = sum(
            snapshot.demand_tokens_per_s[adapter.version_id]
            for adapter in snapshot.adapters
            if adapter.rank >= rank
        )
        served = sum(profile.operating_point(setting) for setting in ranks if setting >= rank)
        found = max(found, asked / served if served else float("inf"))
    return found


def _set(snapshot: Snapshot, ranks: tuple[int, ...]) -> Snapshot:
    specs = [replace(spec, max_lora_rank=rank) for spec, rank in zip(snapshot.replicas, ranks, strict=True)]
    return replace(snapshot, replicas=tuple(specs))


@given(snapshots())
@settings(max_examples=60, deadline=None)
def test_no_settings_that_hold_everything_are_better(snapshot: Snapshot) -> None:
    found = size_ranks(snapshot, EAGER)
    best = min(
        (
            _utilisation(snapshot, ranks)
            for ranks in combinations_with_replacement(STEPS, len(snapshot.replicas))
            if holds_all(snapshot.adapters, _set(snapshot, ranks).replicas)
        ),
        default=None,
    )
    if best is None:
        assert not found.max_lora_ranks
        return
    assert found.planned_utilisation <= best * (1 + 1e-6) + 1e-9
    if found.max_lora_ranks:
        ranks = tuple(found.max_lora_ranks[spec.replica_id] for spec in snapshot.replicas)
        assert abs(_utilisation(snapshot, ranks) - found.planned_utilisation) <= 1e-9 + 1e-9 * best
        assert holds_all(snapshot.adapters, _set(snapshot, ranks).replicas)


@given(snapshots(), st.sampled_from([EAGER, RankSizingLimits()]))
@settings(max_examples=60, deadline=None)
def test_restarts_come_one_at_a_time_and_never_lose_what_is_held(
    snapshot: Snapshot, limits: RankSizingLimits
) -> None:
    """To the end: whatever could be held before can be held by the others during each restart, and after
    it."""
    plan = size_ranks(snapshot, limits)
    changed = sum(
        plan.max_lora_ranks.get(spec.replica_id, spec.max_lora_rank) != spec.max_lora_rank
        for spec in snapshot.replicas
    )
    for _ in range(changed + 1):
        chosen = next_restart(snapshot, plan.max_lora_ranks, limits=limits)
        if chosen is None:
            return
        others = [spec for spec in snapshot.replicas if spec.replica_id != chosen]
        assert next_restart(snapshot, plan.max_lora_ranks, restarting=frozenset({chosen})) is None
        held = [one for one in snapshot.adapters if any(spec.admits(one) for spec in snapshot.replicas)]
        assert holds_all(held, others)
        snapshot = replace(
            snapshot,
            replicas=tuple(
                replace(spec, max_lora_rank=plan.max_lora_ranks[chosen])
                if spec.replica_id == chosen
                else spec
                for spec in snapshot.replicas
            ),
        )
        assert all(any(spec.admits(one) for spec in snapshot.replicas) for one in held)
    raise AssertionError("more restarts than settings that change")


@given(snapshots(), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_snapshot_does_not_matter(snapshot: Snapshot, random: object) -> None:
    adapters, replicas = list(snapshot.adapters), list(snapshot.replicas)
    random.shuffle(adapters)  # type: ignore[attr-defined]
    random.shuffle(replicas)  # type: ignore[attr-defined]
    shuffled = replace(snapshot, adapters=tuple(adapters), replicas=tuple(replicas))
    assert size_ranks(shuffled, EAGER) == size_ranks(snapshot, EAGER)


def test_replicas_are_set_low_where_little_needs_a_high_setting() -> None:
    snapshot = _snapshot({8: 6000.0, 128: 1000.0}, [128, 128, 128, 128])
    plan = size_ranks(snapshot)
    assert sorted(plan.max_lora_ranks.values()) == [8, 8, 8, 128]
    assert round(plan.utilisation, 3) == round(7000 / (4 * 2440), 3)
    first = next_restart(snapshot, plan.max_lora_ranks)
    assert first is not None
    assert plan.max_lora_ranks[first] == 8
    # Once they are set so, nothing is to be done; and a little more of the one or the other changes nothing.
    settled = _set(snapshot, tuple(plan.max_lora_ranks[spec.replica_id] for spec in snapshot.replicas))
    assert size_ranks(settled).max_lora_ranks == {}
    shifted = replace(settled, demand_tokens_per_s={VersionId("a8"): 5900.0, VersionId("a128"): 1200.0})
    assert size_ranks(shifted).max_lora_ranks == {}


def test_a_change_that_has_begun_is_gone_on_with() -> None:
    """Two of three steps are done, and the last one alone would gain too little."""
    snapshot = _snapshot({8: 6000.0, 128: 1000.0}, [128, 8, 8, 128])
    limits = RankSizingLimits(min_gain=0.2)
    assert size_ranks(snapshot, limits).max_lora_ranks == {}
    begun = {ReplicaId(f"replica-{place}"): rank for place, rank in enumerate([128, 8, 8, 8])}
    assert size_ranks(snapshot, limits, begun=begun).max_lora_ranks == begun
    other = replace(snapshot, demand_tokens_per_s={VersionId("a8"): 100.0, VersionId("a128"): 6000.0})
    assert size_ranks(other, limits, begun=begun).max_lora_ranks != begun
    assert size_ranks(snapshot, replace(limits, highest=64), begun=begun).max_lora_ranks == {}


def test_nothing_restarts_when_the_gain_does_not_repay() -> None:
    snapshot = _snapshot({8: 6000.0, 128: 1000.0}, [128, 128, 128, 128])
    assert size_ranks(snapshot, RankSizingLimits(restart_s=3600.0)).max_lora_ranks == {}
    assert size_ranks(snapshot, RankSizingLimits(min_gain=0.9)).max_lora_ranks == {}
    assert size_ranks(replace(snapshot, demand_tokens_per_s={})).max_lora_ranks == {}
    for kernel in (RankKernel.SUM, RankKernel.PADDED_BATCH):
        other = _snapshot({8: 6000.0, 128: 1000.0}, [128, 128, 128, 128], kernel=kernel)
        assert size_ranks(other) == RankPlan(reason="no replica's cost follows from its max_lora_rank")


def test_an_adapter_that_nobody_admits_is_made_room_for_whatever_it_costs() -> None:
    snapshot = _snapshot({8: 0.0, 128: 0.0}, [8, 8, 8])
    plan = size_ranks(snapshot, RankSizingLimits(restart_s=3600.0))
    assert sorted(plan.max_lora_ranks.values()) == [8, 8, 128]
    chosen = next_restart(snapshot, plan.max_lora_ranks)
    assert chosen is not None
    assert plan.max_lora_ranks[chosen] == 128
    assert size_ranks(snapshot, RankSizingLimits(highest=64)).max_lora_ranks == {}


def test_who_holds_the_last_copies_stays() -> None:
    alone = _snapshot({8: 4000.0}, [128])
    assert sorted(size_ranks(alone, EAGER).max_lora_ranks.values()) == [8]
    assert next_restart(alone, {ReplicaId("replica-0"): 8}, limits=EAGER) is None
    # The other one is too small for what is held, or takes no such rank.
    small = replace(_snapshot({8: 4000.0, 16: 0.0}, [128, 128], adapters=1))
    assert next_restart(small, {ReplicaId("replica-0"): 8}, limits=EAGER) is None
    low = _snapshot({8: 4000.0, 128: 1.0}, [128, 8])
    assert next_restart(low, {ReplicaId("replica-0"): 64}, limits=EAGER) is None


def test_a_cluster_that_carries_its_load_is_not_overloaded_for_a_restart() -> None:
    busy = _snapshot({8: 4000.0, 128: 100.0}, [128, 128])
    wanted = {ReplicaId("replica-0"): 8}
    assert next_restart(busy, wanted) is None
    overloaded = replace(busy, demand_tokens_per_s={VersionId("a8"): 6000.0, VersionId("a128"): 100.0})
    assert next_restart(overloaded, wanted) == ReplicaId("replica-0")
    assert next_restart(overloaded, wanted, is_overloaded=False) is None, "it may be a peak"
    calm = replace(busy, demand_tokens_per_s={VersionId("a8"): 2000.0, VersionId("a128"): 100.0})
    assert next_restart(calm, wanted) == ReplicaId("replica-0")
    # The other one would be used a little above what it sustains.
    nearly = replace(busy, demand_tokens_per_s={VersionId("a8"): 2400.0, VersionId("a128"): 100.0})
    assert next_restart(nearly, wanted) is None
    assert next_restart(nearly, wanted, limits=RankSizingLimits(max_backlog_s=5.0)) is not None


def test_of_an_overload_only_what_is_late_counts_as_gain() -> None:
    carried = _snapshot({8: 4600.0, 128: 100.0}, [128, 128])
    assert sorted(size_ranks(carried).max_lora_ranks.values()) == [8, 128]
    over = _snapshot({8: 4900.0, 128: 100.0}, [128, 128])
    assert size_ranks(over).max_lora_ranks == {}
    far_over = _snapshot({8: 6000.0, 128: 100.0}, [128, 128])
    assert sorted(size_ranks(far_over).max_lora_ranks.values()) == [8, 128]


def test_every_rank_keeps_as_many_replicas_as_asked_for() -> None:
    snapshot = _snapshot({8: 6000.0, 128: 10.0}, [128, 128, 128, 128])
    plan = size_ranks(snapshot, replace(EAGER, min_holders=2))
    assert sorted(plan.max_lora_ranks.values()) == [8, 8, 128, 128]
    low = _snapshot({8: 6000.0}, [128, 128, 128, 128])
    assert sorted(size_ranks(low, EAGER).max_lora_ranks.values()) == [8, 8, 8, 8]
    assert sorted(size_ranks(low, replace(EAGER, kept=64)).max_lora_ranks.values()) == [8, 8, 8, 64]
    without = replace(snapshot, replicas=snapshot.replicas[:3])
    assert sorted(size_ranks(without, EAGER).max_lora_ranks.items()) == [
        ("replica-0", 128),
        ("replica-1", 8),
        ("replica-2", 8),
    ]
