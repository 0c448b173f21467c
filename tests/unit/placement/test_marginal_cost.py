"""Routing by marginal cost: what makes a replica dearer, what rank does by kernel, and what silence does."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.latency import LatencyModel, RankKernel
from placement.profile import EngineFacts, Profile
from placement.routing.chooser import (
    Chooser,
    LoadView,
    OwnRequests,
    RankLoad,
    ReplicaLoad,
    RouteRequest,
    Target,
)
from placement.routing.marginal_cost import MAX_LOOKS, PrefixMemory
from placement.routing.marginal_cost_gauge import Gauge, cost_ms
from placement.routing.replica_cost import CostBook, ReplicaCost, cost_of
from placement.table import RoutingTable, TableEntry, TableReplica
from placement.types import AdapterName, Holder, ReplicaId, ReplicaSpec, VersionId

RANKS = (8, 16, 32, 64, 128)
A = AdapterName("a")
KERNELS = tuple(RankKernel)


def cost(kernel: RankKernel = RankKernel.PADDED_BATCH) -> ReplicaCost:
    model = LatencyModel(
        kernel=kernel, base_ms=31.8, prefill_token_ms=0.057, decode_rank_ms=0.0039, prefill_rank_ms=0.00047
    )
    return ReplicaCost(latency=model, max_num_seqs=32, kv_tokens=100_000)


def table_of(
    shares: Mapping[str, float], rank: int, known: ReplicaCost | None, spill: Sequence[str] = ()
) -> RoutingTable:
    holders = [
        Holder(replica_id=ReplicaId(name), share=share, spill=name in spill) for name, share in shares.items()
    ]
    replicas = [
        TableReplica(replica_id=one.replica_id, address="", max_lora_rank=128, cost=known) for one in holders
    ]
    entry = TableEntry(name=A, version_id=VersionId("a@1"), rank=rank, holders=tuple(holders))
    return RoutingTable(version=1, replicas={one.replica_id: one for one in replicas}, entries={A: entry})


def load_of(name: str, by_rank: Mapping[int, int], waiting: int = 0, **more: Any) -> ReplicaLoad:
    """So many requests of each rank run, `waiting` more of each wait with prompts of 500 tokens."""
    ranks = tuple(RankLoad(rank, number, waiting, 500 * waiting) for rank, number in sorted(by_rank.items()))
    return ReplicaLoad(
        ReplicaId(name),
        running=sum(by_rank.values()),
        waiting=waiting * len(ranks),
        outstanding_tokens=0,
        kv_cache_usage=0.2,
        ranks=ranks,
        prompt_tokens=500.0,
        output_tokens=150.0,
        **more,
    )


def view_of(*loads: ReplicaLoad, own: Mapping[ReplicaId, OwnRequests] | None = None) -> LoadView:
    return LoadView(loads={load.replica_id: load for load in loads}, in_flight={}, own=own or {})


def price(by_rank: Mapping[int, int], rank: int, kernel: RankKernel = RankKernel.PADDED_BATCH) -> float:
    """What a request of 500 prompt and 150 output tokens costs there."""
    gauge = Gauge(cost(kernel))
    gauge.update(load_of("r", by_rank), OwnRequests(), 0.0)
    return cost_ms(gauge.terms if rank else gauge.base_terms(), gauge.charge(rank), 500, 150)


counts = st.dictionaries(st.sampled_from((0, *RANKS)), st.integers(1, 12), max_size=5)


@given(st.lists(counts, min_size=2, max_size=6), st.sampled_from((0, *RANKS)), st.integers(0, 9))
def test_a_decision_is_a_candidate_and_the_same_for_the_same_seed(
    loads: list[dict[int, int]], rank: int, seed: int
) -> None:
    table = table_of({f"r{index}": 1.0 for index in range(len(loads))}, rank, cost())
    view = view_of(*(load_of(f"r{index}", one) for index, one in enumerate(loads)))
    request = RouteRequest(A, 300)
    first = [Chooser("marginal-cost", seed).choose(request, table, view) for _ in range(2)]
    assert first[0] == first[1]
    assert first[0].replica_id in first[0].candidates
    assert (first[0].reason, first[0].rank) == ("marginal-cost", rank)


@given(counts, st.sampled_from((0, *RANKS)), st.sampled_from((0, *RANKS)), st.sampled_from(KERNELS))
def test_one_request_more_never_makes_a_holder_more_attractive(
    there: dict[int, int], rank: int, more: int, kernel: RankKernel
) -> None:
    # Where batches are padded a request of its own rank or above may spare it the blame for raising it:
    # they gather. One of the base model raises nothing.
    if kernel is RankKernel.PADDED_BATCH:
        rank = 0
    loaded = there | {more: there.get(more, 0) + 1}
    # The mean rank of the prompts to come may fall a little where each is charged its own.
    assert price(loaded, rank, kernel) >= price(there, rank, kernel) * (
        0.99 if kernel is RankKernel.SUM else 1
    )


@given(st.integers(1, 30), st.sampled_from(RANKS[1:]))
def test_a_high_rank_is_dearer_among_low_ones_only_where_the_batch_is_padded(number: int, rank: int) -> None:
    among_low = {8: number}
    among_high = {rank: number}
    assert price(among_low, rank) > price(among_high, rank) or number < 3
    assert price(among_low, rank, RankKernel.SUM) <= price(among_high, rank, RankKernel.SUM)
    config = RankKernel.PADDED_CONFIG
    assert price(among_low, rank, config) == price(among_high, rank, config)


def test_high_ranks_gather_and_low_ones_keep_away_from_them() -> None:
    view = view_of(load_of("low", {8: 12}), load_of("high", {128: 12}))
    shares = {"low": 0.5, "high": 0.5}
    for rank, expected in ((128, "high"), (8, "low")):
        chosen = Chooser("marginal-cost", 0).choose(
            RouteRequest(A, 500), table_of(shares, rank, cost()), view
        )
        assert chosen.replica_id == expected


@given(st.lists(counts, min_size=2, max_size=5), st.integers(0, 9))
def test_without_costs_it_is_least_outstanding(loads: list[dict[int, int]], seed: int) -> None:
    table = table_of({f"r{index}": 1.0 for index in range(len(loads))}, 8, None)
    view = view_of(*(load_of(f"r{index}", one) for index, one in enumerate(loads)))
    request = RouteRequest(A, 300)
    chosen = Chooser("marginal-cost", seed).choose(request, table, view)
    other = Chooser("least-outstanding", seed).choose(request, table, view)
    assert (chosen.replica_id, chosen.reason) == (other.replica_id, "marginal-cost:least-outstanding")


def test_requests_sent_since_the_report_count_and_those_that_ended_do_not() -> None:
    own = {ReplicaId(name): OwnRequests() for name in ("r0", "r1")}
    view = view_of(load_of("r0", {8: 5}), load_of("r1", {8: 6}), own=own)
    table, chooser = table_of({"r0": 0.5, "r1": 0.5}, 8, cost()), Chooser("marginal-cost", 0)
    request = RouteRequest(A, 500)
    assert chooser.choose(request, table, view).replica_id == "r0"
    for _ in range(3):
        own[ReplicaId("r0")].send(VersionId("a@1"), 8, 500)
    assert chooser.choose(request, table, view).replica_id == "r1"
    for _ in range(3):
        own[ReplicaId("r0")].end(VersionId("a@1"), 8)
    own[ReplicaId("r0")].report()
    assert chooser.choose(request, table, view).replica_id == "r0"


def test_silence_attracts_nobody() -> None:
    table = table_of({"r0": 0.3, "r1": 0.3, "r2": 0.4}, 8, cost())
    view = view_of(load_of("r0", {8: 30}), load_of("r1", {8: 10}))
    chooser = Chooser("marginal-cost", 0)
    assert {chooser.choose(RouteRequest(A, 9), table, view).replica_id for _ in range(20)} == {"r1"}


def test_a_holder_without_a_share_is_used_where_the_others_cost_more() -> None:
    shares = {"r0": 0.5, "r1": 0.5, "r2": 0.0}
    request, chooser = RouteRequest(A, 500), Chooser("marginal-cost", 0)
    busy = view_of(load_of("r0", {8: 40}), load_of("r1", {8: 40}), load_of("r2", {8: 3}))
    decision = chooser.choose(request, table_of(shares, 8, cost(), spill=["r2"]), busy)
    assert (decision.replica_id, decision.reason) == ("r2", "marginal-cost:spill")
    equal = view_of(load_of("r0", {8: 3}), load_of("r1", {8: 3}), load_of("r2", {8: 3}))
    assert chooser.choose(request, table_of(shares, 8, cost(), spill=["r2"]), equal).replica_id != "r2"
    assert chooser.choose(request, table_of(shares, 8, cost()), busy).replica_id != "r2"


def test_a_prompt_goes_where_its_beginning_was_computed_unless_that_costs_more() -> None:
    table = table_of({"r0": 0.5, "r1": 0.5}, 8, cost())
    chooser, blocks = Chooser("marginal-cost", 0), tuple(range(4))
    request = RouteRequest(A, 4 * 512, prefix=blocks, block_tokens=512)
    first = chooser.choose(request, table, view_of(load_of("r0", {8: 4}), load_of("r1", {8: 5})))
    assert first.replica_id == "r0"
    again = chooser.choose(request, table, view_of(load_of("r0", {8: 6}), load_of("r1", {8: 5})))
    assert (again.replica_id, again.reason) == ("r0", "marginal-cost:prefix")
    full = chooser.choose(request, table, view_of(load_of("r0", {8: 60}), load_of("r1", {8: 5})))
    assert (full.replica_id, full.reason) == ("r1", "marginal-cost")


def test_the_memory_of_prefixes_is_bounded() -> None:
    memory = PrefixMemory(limit=8)
    target = Target(adapter=A, version_id=VersionId("a@1"), rank=8, costs={})
    for block in range(0, 40, 4):
        request = RouteRequest(A, 0, prefix=tuple(range(block, block + 4)), block_tokens=16)
        memory.note(request, target, ReplicaId("r0"))
        assert memory.find(request, target) == ("r0", 64)
    assert memory.find(RouteRequest(A, 0, prefix=(0, 1), block_tokens=16), target) == (None, 0)


def test_of_many_holders_a_good_one_is_found() -> None:
    names = [f"r{index}" for index in range(10 * MAX_LOOKS)]
    table = table_of(dict.fromkeys(names, 1 / len(names)), 8, cost())
    view = view_of(*(load_of(name, {8: index % 24}) for index, name in enumerate(names)))
    chooser = Chooser("marginal-cost", 3)
    chosen = [chooser.choose(RouteRequest(A, 500), table, view).replica_id for _ in range(20)]
    assert max(names.index(name) % 24 for name in chosen[1:]) <= 10


def test_replicas_of_one_kind_and_setting_share_a_cost() -> None:
    spec = ReplicaSpec(
        replica_id=ReplicaId("r0"), max_lora_rank=64, pool_adapters=1, pool_bytes=1, profile="p"
    )
    engine = EngineFacts(
        kind="k", model="m", max_lora_rank=128, max_num_seqs=8, kv_blocks=10, block_tokens=16
    )
    latency = LatencyModel(kernel=RankKernel.PADDED_CONFIG, base_ms=1.0)
    profile = Profile(name="p", source="", engine=engine, latency=latency, latency_basis="fitted")
    book = CostBook({"p": profile})
    found = book.of(spec)
    assert found is not None
    assert found is book.of(replace(spec, replica_id=ReplicaId("r1")))
    assert (found.latency.max_lora_rank, found.max_num_seqs, found.kv_tokens) == (64, 8, 160)
    assert book.of(replace(spec, profile="q")) is None is cost_of(None, 64)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_empty_replica_costs_what_the_request_takes(kernel: RankKernel) -> None:
    assert 150 * 31.8 < price({}, 8, kernel) < 2 * 150 * 31.8
