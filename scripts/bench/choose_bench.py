"""Measures one routing decision of `marginal-cost`: the median over decisions, in microseconds.

Between two decisions happens what happens between two requests of a busy router: one request is sent, one
ends, and reports come as often per request as with 100 requests/s per 8 replicas and 10 reports/s of each.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from statistics import median
from time import perf_counter

from placement.latency import LatencyModel, RankKernel
from placement.routing.chooser import Chooser, LoadView, OwnRequests, RankLoad, ReplicaLoad, RouteRequest
from placement.routing.replica_cost import ReplicaCost
from placement.table import RoutingTable, TableEntry, TableReplica
from placement.types import AdapterName, Holder, ReplicaId, VersionId

RANKS = (8, 16, 32, 64, 128)
DECISIONS = 5_000
REPORTS_PER_DECISION = 0.8


def choose_us(
    sizes: Sequence[int] = (8, 256), *, policy: str = "marginal-cost", decisions: int = DECISIONS
) -> dict[str, float]:
    """The median by number of holders."""
    return {str(size): _median_us(size, policy, decisions) for size in sizes}


def _median_us(num_holders: int, policy: str, decisions: int) -> float:
    rng = Random(num_holders)
    table = _table(num_holders)
    names = list(table.replicas)
    loads: dict[ReplicaId, ReplicaLoad | None] = {name: _load(name, rng) for name in names}
    own = {name: OwnRequests() for name in names}
    view = LoadView(loads=loads, in_flight={}, own=own)
    chooser = Chooser(policy, 0)
    requests = [RouteRequest(name, 700) for name in table.entries]
    sent: list[tuple[ReplicaId, VersionId | None, int]] = []
    taken_us = []
    for index in range(decisions):
        request = requests[index % len(requests)]
        begun_s = perf_counter()
        decision = chooser.choose(request, table, view)
        taken_us.append((perf_counter() - begun_s) * 1e6)
        own[decision.replica_id].send(decision.version_id, decision.rank, 700)
        sent.append((decision.replica_id, decision.version_id, decision.rank))
        if len(sent) > 4 * num_holders:
            replica, version, rank = sent.pop(rng.randrange(len(sent)))
            own[replica].end(version, rank)
        if rng.random() < REPORTS_PER_DECISION:
            name = rng.choice(names)
            loads[name] = _load(name, rng)
            own[name].report()
    return median(taken_us)


def _table(num_holders: int) -> RoutingTable:
    model = LatencyModel(
        kernel=RankKernel.PADDED_BATCH,
        base_ms=31.8,
        prefill_token_ms=0.0568,
        decode_rank_ms=0.0039,
        prefill_rank_ms=0.000467,
    )
    cost = ReplicaCost(latency=model, max_num_seqs=32, kv_tokens=107_200, adapter_slots=32)
    first = TableReplica(replica_id=ReplicaId(""), address="", max_lora_rank=128, cost=cost)
    names = [ReplicaId(f"replica-{index}") for index in range(num_holders)]
    holders = tuple(Holder(replica_id=name, share=1 / num_holders) for name in names)
    adapters = {AdapterName(f"adapter-{rank}"): rank for rank in RANKS}
    return RoutingTable(
        version=1,
        replicas={name: replace(first, replica_id=name) for name in names},
        entries={
            name: TableEntry(name=name, version_id=VersionId(f"{name}@0"), rank=rank, holders=holders)
            for name, rank in adapters.items()
        },
    )


def _load(name: ReplicaId, rng: Random) -> ReplicaLoad:
    ranks = tuple([RankLoad(rank, rng.randrange(6), rng.randrange(2), 700) for rank in RANKS])
    running = sum(one.running for one in ranks)
    waiting = sum(one.waiting for one in ranks)
    return ReplicaLoad(name, running, waiting, 0, 0.3, output_tokens=150.0, ranks=ranks, prompt_tokens=700.0)
