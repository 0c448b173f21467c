"""The choice of a holder: only holders, reproducible, exclusions honoured, shares and load heeded."""

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.routing.chooser import (
    ROUTING_POLICIES,
    Chooser,
    Decision,
    HoldersFullError,
    LoadView,
    NoHolderError,
    ReplicaLoad,
    RouteRequest,
    UnknownAdapterError,
    active_peers,
    make_routing_policy,
)
from placement.table import RoutingTable, TableEntry, TableReplica
from placement.types import AdapterName, Holder, ReplicaId, VersionId

A = AdapterName("a")
IDLE = LoadView(loads={}, in_flight={})
POLICIES = sorted(ROUTING_POLICIES)


def make_table(shares: Mapping[str, float], others: tuple[str, ...] = ()) -> RoutingTable:
    names = [ReplicaId(name) for name in (*shares, *others)]
    return RoutingTable(
        version=7,
        base_model="base",
        replicas={
            name: TableReplica(replica_id=name, address="127.0.0.1:1", max_lora_rank=8) for name in names
        },
        entries={
            A: TableEntry(
                name=A,
                version_id=VersionId("a@1"),
                rank=8,
                holders=tuple(
                    Holder(replica_id=ReplicaId(name), share=share) for name, share in shares.items()
                ),
            )
        },
    )


def load(name: str, *, running: int = 0, waiting: int = 0, own: int = 0, routers: int = 1) -> ReplicaLoad:
    return ReplicaLoad(
        replica_id=ReplicaId(name),
        running=running,
        waiting=waiting,
        outstanding_tokens=0,
        kv_cache_usage=0.0,
        own_requests=own,
        routers=routers,
    )


def view(
    *loads: ReplicaLoad,
    in_flight: Mapping[str, int] | None = None,
    limit: int | None = None,
    leased: Mapping[str, int] | None = None,
) -> LoadView:
    return LoadView(
        loads={entry.replica_id: entry for entry in loads},
        in_flight={ReplicaId(name): number for name, number in (in_flight or {}).items()},
        max_waiting=limit,
        leased={ReplicaId(name): number for name, number in (leased or {}).items()},
        peers=active_peers(loads),
    )


def counts(policy: str, table: RoutingTable, seen: LoadView, draws: int = 2000) -> Counter[str]:
    chooser = Chooser(policy, seed=1)
    return Counter(str(chooser.choose(RouteRequest(adapter=A), table, seen).replica_id) for _ in range(draws))


replica_names = st.sampled_from([f"r{index}" for index in range(6)])
views = st.builds(
    lambda running, in_flight: view(
        *(load(name, running=number) for name, number in running.items()), in_flight=in_flight
    ),
    st.dictionaries(replica_names, st.integers(0, 50)),
    st.dictionaries(replica_names, st.integers(1, 50)),
)
share_maps = st.dictionaries(replica_names, st.floats(0.0, 1.0), min_size=1)


@given(st.sampled_from(POLICIES), share_maps, st.frozensets(replica_names), views, st.integers(0, 99))
def test_only_a_holder_that_is_not_excluded_is_chosen(
    policy: str, shares: dict[str, float], exclude: frozenset[str], seen: LoadView, seed: int
) -> None:
    table = make_table(shares, others=("r9",))
    chooser = Chooser(policy, seed)
    request = RouteRequest(adapter=A, exclude=frozenset(ReplicaId(name) for name in exclude))
    allowed = set(shares) - exclude
    if not allowed:
        with pytest.raises(NoHolderError):
            chooser.choose(request, table, seen)
        return
    decision = chooser.choose(request, table, seen)
    assert decision.replica_id in allowed
    assert decision.replica_id in decision.candidates
    assert set(decision.candidates) <= allowed
    with_share = {name for name in allowed if shares[name] > 0}
    assert decision.replica_id in (with_share or allowed)
    assert (decision.version_id, decision.table_version) == ("a@1", 7)


@given(st.sampled_from(POLICIES), share_maps, views, st.integers(0, 99))
def test_the_same_seed_and_requests_give_the_same_choices(
    policy: str, shares: dict[str, float], seen: LoadView, seed: int
) -> None:
    table = make_table(shares)

    def run() -> list[Decision]:
        chooser = Chooser(policy, seed)
        return [chooser.choose(RouteRequest(adapter=A), table, seen) for _ in range(10)]

    assert run() == run()


@given(st.sampled_from(POLICIES), views, st.integers(0, 99))
def test_every_replica_of_the_table_serves_the_base_model(policy: str, seen: LoadView, seed: int) -> None:
    table = make_table({"r0": 1.0}, others=("r1", "r2"))
    decision = Chooser(policy, seed).choose(RouteRequest(adapter=None), table, seen)
    assert set(decision.candidates) == {"r0", "r1", "r2"}
    assert decision.version_id is None


def test_a_later_table_replaces_the_base_models_holders() -> None:
    chooser = Chooser("round-robin", 0)
    request = RouteRequest(adapter=None)
    assert set(chooser.choose(request, make_table({"r0": 1.0}), IDLE).candidates) == {"r0"}
    assert set(chooser.choose(request, make_table({"r1": 1.0}), IDLE).candidates) == {"r1"}


def test_an_unknown_adapter_differs_from_one_without_holders() -> None:
    chooser = Chooser("least-outstanding", 0)
    with pytest.raises(UnknownAdapterError, match="nobody"):
        chooser.choose(RouteRequest(adapter=AdapterName("nobody")), make_table({"r0": 1.0}), IDLE)
    with pytest.raises(NoHolderError, match="no replica holds adapter 'a'"):
        chooser.choose(RouteRequest(adapter=A), make_table({}), IDLE)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_holder_with_a_full_queue_is_passed_over(policy: str) -> None:
    table = make_table({"r0": 0.5, "r1": 0.5})
    full = view(load("r0", waiting=4), load("r1", waiting=3), limit=4)
    assert counts(policy, table, full, draws=20) == {"r1": 20}
    with pytest.raises(HoldersFullError, match="4 requests waiting"):
        counts(policy, table, view(load("r0", waiting=4), load("r1", waiting=9), limit=4), draws=1)


def test_a_replica_of_unknown_load_is_not_full() -> None:
    table = make_table({"r0": 0.5, "r1": 0.5})
    assert counts("round-robin", table, view(load("r0", waiting=4), limit=4), draws=5) == {"r1": 5}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_copy_with_no_share_serves_only_when_nobody_else_can(policy: str) -> None:
    table = make_table({"r0": 0.0, "r1": 1.0})
    assert counts(policy, table, IDLE, draws=50) == {"r1": 50}
    decision = Chooser(policy, 0).choose(
        RouteRequest(adapter=A, exclude=frozenset({ReplicaId("r1")})), table, IDLE
    )
    assert decision.replica_id == "r0"
    assert decision.reason == "retry:only-holder"


def test_least_outstanding_adds_its_own_to_what_others_have() -> None:
    table = make_table({"r0": 0.5, "r1": 0.5})
    busy_by_others = view(load("r0", running=3), load("r1", running=1))
    assert set(counts("least-outstanding", table, busy_by_others)) == {"r1"}
    busy_by_us = view(load("r0"), load("r1"), in_flight={"r1": 2})
    assert set(counts("least-outstanding", table, busy_by_us)) == {"r0"}
    not_twice = view(load("r0", running=5, own=5), load("r1", running=6, own=1), in_flight={"r0": 4, "r1": 1})
    assert set(counts("least-outstanding", table, not_twice)) == {"r0"}


def test_least_outstanding_counts_what_it_sent_since_the_report_once_for_each_router() -> None:
    table = make_table({"r0": 0.5, "r1": 0.5})
    reports = {"r0": 20, "r1": 24}

    def seen(routers: int, sent: int) -> LoadView:
        loads = [load(name, running=count, own=5, routers=routers) for name, count in reports.items()]
        return view(*loads, in_flight={"r0": 5 + sent, "r1": 5})

    assert set(counts("least-outstanding", table, seen(1, 3))) == {"r0"}
    assert set(counts("least-outstanding", table, seen(4, 0))) == {"r0"}
    assert set(counts("least-outstanding", table, seen(4, 2))) == {"r1"}


def test_peers_count_as_far_as_they_are_active() -> None:
    alone = [load("r0", running=9, own=9), load("r1", running=50, own=1)]
    assert active_peers(alone) == 0
    unknown = [load("r0", routers=8), None]
    assert active_peers(unknown) == 7
    alike = [load("r0", running=80, own=10, routers=8)]
    assert active_peers(alike) == pytest.approx(7)
    idle = [load("r0", running=100, own=100, routers=8)]
    assert active_peers(idle) < 0.1


def test_a_request_picked_for_a_client_counts_until_the_replica_counts_it() -> None:
    table = make_table({"r0": 0.5, "r1": 0.5})
    reports = (load("r0", running=3, own=1), load("r1", running=4, own=1))
    in_flight = {"r0": 1, "r1": 1}
    assert set(counts("least-outstanding", table, view(*reports, in_flight=in_flight))) == {"r0"}
    leased = view(*reports, in_flight=in_flight, leased={"r0": 2})
    assert set(counts("least-outstanding", table, leased)) == {"r1"}
    assert set(counts("least-outstanding", table, view(leased={"r0": 1}))) == {"r1"}


def test_least_outstanding_is_not_drawn_to_a_silent_replica() -> None:
    table = make_table({"r0": 0.5, "r1": 0.5})
    seen = view(load("r0", running=9), in_flight={"r1": 1})
    assert set(counts("least-outstanding", table, seen)) == {"r0"}


def test_least_outstanding_fills_idle_holders_by_share() -> None:
    table = make_table({"r0": 0.75, "r1": 0.25})
    chooser = Chooser("least-outstanding", 0)
    in_flight: dict[ReplicaId, int] = {}
    for _ in range(400):
        chosen = chooser.choose(RouteRequest(adapter=A), table, LoadView(loads={}, in_flight=in_flight))
        in_flight[chosen.replica_id] = in_flight.get(chosen.replica_id, 0) + 1
    assert in_flight[ReplicaId("r0")] == pytest.approx(300, abs=3)


def test_ties_are_shared_out() -> None:
    drawn = counts("least-outstanding", make_table({"r0": 0.5, "r1": 0.5}), IDLE)
    assert min(drawn.values()) > 800


def test_weighted_share_draws_in_proportion_whatever_the_load() -> None:
    drawn = counts("weighted-share", make_table({"r0": 0.8, "r1": 0.2}), view(load("r0", running=99)))
    assert drawn["r0"] == pytest.approx(1600, abs=100)


def test_round_robin_turns_per_adapter() -> None:
    table = make_table({"r0": 0.5, "r1": 0.5})
    chooser = Chooser("round-robin", 0)
    by_adapter: dict[AdapterName | None, list[str]] = {A: [], None: []}
    for index in range(8):
        adapter = A if index % 2 else None
        by_adapter[adapter].append(chooser.choose(RouteRequest(adapter=adapter), table, IDLE).replica_id)
    assert by_adapter == {A: ["r0", "r1"] * 2, None: ["r0", "r1"] * 2}


def test_an_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"known: .*least-outstanding, .*weighted-share"):
        make_routing_policy("best")
