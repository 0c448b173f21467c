"""The published routing rules, on numbers worked out by hand."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest

from placement.latency import LatencyModel, RankKernel
from placement.profile import OperatingPoint
from placement.routing.chooser import (
    Chooser,
    LoadView,
    OwnRequests,
    RankLoad,
    ReplicaLoad,
    RouteRequest,
    make_routing_policy,
)
from placement.routing.replica_cost import ReplicaCost
from placement.routing.stock import RankStock, Stock
from placement.table import RoutingTable, TableEntry, TableReplica
from placement.types import AdapterName, Holder, ReplicaId, VersionId

COST = ReplicaCost(
    latency=LatencyModel(
        kernel=RankKernel.PADDED_BATCH,
        max_lora_rank=128,
        base_ms=10.0,
        prefill_token_ms=0.1,
        decode_rank_ms=0.01,
        prefill_rank_ms=0.001,
    ),
    max_num_seqs=4,
    operating_points=(
        OperatingPoint(rank=8, tokens_per_s=400.0),
        OperatingPoint(rank=128, tokens_per_s=100.0),
    ),
)
Loads = Mapping[str, tuple[RankLoad, ...]]


def table(rank: int, costs: dict[str, ReplicaCost]) -> RoutingTable:
    replicas = {
        ReplicaId(name): TableReplica(
            replica_id=ReplicaId(name), address="127.0.0.1:1", max_lora_rank=128, cost=cost
        )
        for name, cost in costs.items()
    }
    holders = tuple(Holder(replica_id=name, share=1.0 / len(replicas)) for name in replicas)
    entry = TableEntry(name=AdapterName("a"), version_id=VersionId("a@1"), rank=rank, holders=holders)
    return RoutingTable(version=1, replicas=replicas, entries={entry.name: entry})


def report(name: str, ranks: tuple[RankLoad, ...], output_tokens: float = 100.0) -> ReplicaLoad:
    return ReplicaLoad(
        replica_id=ReplicaId(name),
        running=sum(one.running for one in ranks),
        waiting=sum(one.waiting for one in ranks),
        outstanding_tokens=0,
        kv_cache_usage=0.0,
        output_tokens=output_tokens,
        ranks=ranks,
    )


def chosen(
    policy: str,
    rank: int,
    loads: Loads,
    own: dict[str, OwnRequests] | None = None,
    costs: dict[str, ReplicaCost] | None = None,
) -> set[str]:
    """Where fifty requests of 100 prompt tokens for an adapter of this rank go, all seeing the same."""
    seen = LoadView(
        loads={ReplicaId(name): report(name, ranks) for name, ranks in loads.items()},
        in_flight={},
        own={ReplicaId(name): one for name, one in (own or {}).items()},
    )
    chooser = Chooser(policy, seed=1)
    request = RouteRequest(adapter=AdapterName("a"), prompt_tokens=100)
    where = table(rank, costs or dict.fromkeys(loads, COST))
    return {str(chooser.choose(request, where, seen).replica_id) for _ in range(50)}


def test_toppings_weighs_what_a_request_adds_by_those_whom_it_slows_down() -> None:
    """A request of rank 128 and 100 prompt tokens. low: two of rank 8 decode. Prompts: 0 before, then 10 +
    100 * 0.1 + 128 * 100 * 0.001 = 32.8 ms; over 100 output tokens 0.328. A decoding step: 10 + 2 * 8 * 0.01
    = 10.16 before, 10 + 3 * 128 * 0.01 = 13.84 after. (0.328 + 3.68) * 2 = 8.016.
    high: four of rank 128 decode: the same prompts, 15.12 before and 16.4 after: (0.328 + 1.28) * 4 = 6.432.
    With five there it would be 8.04.
    """
    low = (RankLoad(8, 2, 0, 0),)
    assert chosen("toppings", 128, {"low": low, "high": (RankLoad(128, 4, 0, 0),)}) == {"high"}
    assert chosen("toppings", 128, {"low": low, "high": (RankLoad(128, 5, 0, 0),)}) == {"low"}


def test_toppings_avoids_where_the_gap_between_tokens_would_break_the_slo() -> None:
    """As above, 13.84 ms per token on `low` and 16.4 on `high`."""
    loads = {"low": (RankLoad(8, 2, 0, 0),), "high": (RankLoad(128, 4, 0, 0),)}
    for slo_ms, expected in ((20.0, "high"), (15.0, "low"), (5.0, "high")):
        costs = dict.fromkeys(loads, replace(COST, tbt_slo_ms=slo_ms))
        assert chosen("toppings", 128, loads, costs=costs) == {expected}


def test_what_rank_costs_toppings_is_the_kernel_s_to_say() -> None:
    """By the sum of ranks `low` gives (0.328 + 1.28) * 2 = 3.216 against 6.432."""
    loads = {"low": (RankLoad(8, 2, 0, 0),), "high": (RankLoad(128, 4, 0, 0),)}
    costs = dict.fromkeys(loads, replace(COST, latency=replace(COST.latency, kernel=RankKernel.SUM)))
    assert chosen("toppings", 128, loads, costs=costs) == {"low"}


def test_the_rank_backlog_is_prompts_over_the_operating_point_of_their_rank() -> None:
    """a: (530 + 70) / 400 = 1.5 s of rank 8. b: (130 + 70) / 100 = 2 s of rank 128, though fewer tokens. What
    decodes does not count."""
    loads = {"a": (RankLoad(8, 9, 3, 530),), "b": (RankLoad(128, 0, 1, 130),)}
    assert chosen("rank-backlog", 8, loads) == {"a"}
    assert chosen("rank-backlog", 8, {**loads, "a": (RankLoad(8, 0, 3, 750),)}) == {"b"}


def test_dlora_counts_whole_batches_and_those_of_one_adapter_less() -> None:
    """Batches of 4. Nine requests on each: on `mixed` 3 + 3 + 3 of three adapters, floor(9 / 4) = 2; on `one`
    8 + 1 of two: 2 * 0.6 and floor(1 / 4) = 1.2."""
    mixed, one = OwnRequests(), OwnRequests()
    for version in ("x", "y", "z"):
        for _ in range(3):
            mixed.send(VersionId(version), 8, 10)
    for version in "xxxxxxxxy":
        one.send(VersionId(version), 8, 10)
    own = {"mixed": mixed, "one": one}
    assert chosen("dlora", 8, {"mixed": (), "one": ()}, own) == {"one"}
    for _ in range(4):
        one.send(VersionId("z"), 8, 10)
    assert chosen("dlora", 8, {"mixed": (), "one": ()}, own) == {"one"}, "1.8 against 2"
    for _ in range(4):
        one.send(VersionId("y"), 8, 10)
    assert chosen("dlora", 8, {"mixed": (), "one": ()}, own) == {"mixed"}, "2.4 against 2"


def test_below_a_batch_dlora_takes_the_fewest_requests() -> None:
    loads = {"a": (RankLoad(8, 2, 1, 10),), "b": (RankLoad(8, 2, 0, 0),)}
    assert chosen("dlora", 8, loads) == {"b"}


@pytest.mark.parametrize("policy", ["toppings", "rank-backlog", "dlora"])
def test_equal_replicas_share_and_those_that_nothing_is_known_of_come_last(policy: str) -> None:
    idle: Loads = {"a": (), "b": ()}
    assert chosen(policy, 8, idle) == {"a", "b"}
    busy = {"a": (RankLoad(8, 9, 9, 900),)}
    seen = LoadView(loads={ReplicaId("a"): report("a", busy["a"])}, in_flight={})
    where = table(8, {"a": COST, "b": COST})
    request = RouteRequest(adapter=AdapterName("a"), prompt_tokens=1)
    assert Chooser(policy, seed=1).choose(request, where, seen).replica_id == "a"
    nothing = LoadView(loads={}, in_flight={ReplicaId("a"): 1})
    assert Chooser(policy, seed=1).choose(request, where, nothing).replica_id == "b"


@pytest.mark.parametrize("policy", ["toppings", "rank-backlog", "dlora"])
def test_what_a_router_has_sent_since_the_report_counts(policy: str) -> None:
    """Nothing is reported; a hundred requests are spread evenly all the same."""
    own = {name: OwnRequests() for name in "abcd"}
    where = table(8, dict.fromkeys(own, COST))
    view = LoadView(
        loads={ReplicaId(name): report(name, ()) for name in own},
        in_flight={},
        own={ReplicaId(name): one for name, one in own.items()},
    )
    chooser = Chooser(policy, seed=3)
    request = RouteRequest(adapter=AdapterName("a"), prompt_tokens=100)
    counts: Counter[str] = Counter()
    for _ in range(100):
        replica = chooser.choose(request, where, view).replica_id
        own[replica].send(VersionId("a@1"), 8, 100)
        counts[replica] += 1
    assert max(counts.values()) - min(counts.values()) <= 1
    assert make_routing_policy(policy).wants_own


def test_the_stock_is_the_report_and_what_the_router_did_since_then_once_for_each_router() -> None:
    own = OwnRequests()
    for _ in range(3):
        own.send(VersionId("x"), 8, 50)
    own.report()
    load = report("a", (RankLoad(8, 2, 2, 100), RankLoad(64, 1, 0, 0)))
    stock = Stock()
    assert stock.take(load, own, 0.0) == {8: (2, 2, 100), 64: (1, 0, 0)}
    own.send(VersionId("y"), 64, 30)
    own.lease(64, 7)
    assert stock.take(load, own, 0.0) == {8: (2, 2, 100), 64: (1, 2, 37)}
    assert stock.take(load, own, 1.0) == {8: (2, 2, 100), 64: (1, 3, 67)}
    own.end(VersionId("x"), 8)
    own.end(VersionId("x"), 8)
    own.end(VersionId("x"), 8)
    assert stock.take(load, own, 0.0)[8] == RankStock(0, 1, 100), "three fewer: the two that ran, and one"
    unranked = ReplicaLoad(
        replica_id=ReplicaId("b"), running=3, waiting=2, outstanding_tokens=0, kv_cache_usage=0.0
    )
    assert Stock().take(unranked._replace(prompt_tokens=10.0), None, 0.0) == {0: (3, 2, 20)}
