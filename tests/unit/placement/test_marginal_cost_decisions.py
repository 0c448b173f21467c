"""Decisions over a history of reports, requests, leases and deaths: the cheapest by the plain estimate, and
the same whether anything was prepared for them or not."""

from collections.abc import Callable
from random import Random

import pytest

from placement.latency import LatencyModel, RankKernel
from placement.routing.chooser import (
    Chooser,
    Decision,
    LoadView,
    OwnRequests,
    RankLoad,
    ReplicaLoad,
    RouteRequest,
)
from placement.routing.marginal_cost import SPILL_PENALTY
from placement.routing.replica_cost import ReplicaCost
from placement.table import RoutingTable, TableEntry, TableReplica
from placement.types import AdapterName, Holder, ReplicaId, VersionId
from tests.support.plain_cost import RANKS, plain_cost_ms

REPLICAS = tuple(ReplicaId(f"r{index}") for index in range(5))
SPILL = REPLICAS[-1]
ADAPTERS = {rank: AdapterName(f"a{rank}") for rank in RANKS if rank}
PROMPT, LONGEST = 300, 99
DECISIONS = 400


def table_of(version: int, cost: ReplicaCost) -> RoutingTable:
    holders = tuple(
        Holder(replica_id=name, share=0.0 if name == SPILL else 0.25, spill=name == SPILL)
        for name in REPLICAS
    )
    return RoutingTable(
        version=version,
        replicas={
            name: TableReplica(replica_id=name, address="", max_lora_rank=128, cost=cost) for name in REPLICAS
        },
        entries={
            name: TableEntry(name=name, version_id=VersionId(f"{name}@1"), rank=rank, holders=holders)
            for rank, name in ADAPTERS.items()
        },
    )


class Site:
    """What one router knows of some replicas, as it changes at random."""

    def __init__(self, kernel: RankKernel, seed: int) -> None:
        model = LatencyModel(
            kernel=kernel,
            base_ms=31.8,
            row_ms=0.1,
            prefill_token_ms=0.057,
            decode_rank_ms=0.0039,
            prefill_rank_ms=0.00047,
        )
        self.cost = ReplicaCost(latency=model, max_num_seqs=16, kv_tokens=100_000)
        self.rng = Random(seed)
        self.now_s = 0.0
        self.loads = {name: self._load(name) for name in REPLICAS}
        self.own = {name: OwnRequests() for name in REPLICAS}
        self.peers = 0.0
        self.table = table_of(1, self.cost)
        self.sent: list[Decision] = []

    @property
    def view(self) -> LoadView:
        return LoadView(loads=self.loads, in_flight={}, own=self.own, peers=self.peers, now_s=self.now_s)

    def _load(self, name: ReplicaId) -> ReplicaLoad:
        counts = {rank: (self.rng.randrange(4), self.rng.randrange(2)) for rank in RANKS}
        ranks = tuple(RankLoad(rank, *number, 300 * number[1]) for rank, number in counts.items())
        running, waiting = (sum(one[place] for one in counts.values()) for place in (0, 1))
        return ReplicaLoad(
            name, running, waiting, 0, 0.3, self.now_s, output_tokens=150.0, ranks=ranks, prompt_tokens=700.0
        )

    def change(self) -> ReplicaId:
        """Something at one replica, or now and then at all; which one."""
        name, what = self.rng.choice(REPLICAS), self.rng.random()
        if what < 0.4:
            self.loads[name] = self._load(name)
            self.own[name].report()
        elif what < 0.7 and self.sent:
            decision = self.sent.pop(self.rng.randrange(len(self.sent)))
            name = decision.replica_id
            self.own[name].end(decision.version_id, decision.rank)
        elif what < 0.8:
            self.own[name].lease(self.rng.choice(RANKS), 70)
        elif what < 0.9:
            self.now_s += 0.1 * self.rng.random()
        elif what < 0.92:
            self.own[name].clear()
            self.sent = [decision for decision in self.sent if decision.replica_id != name]
        elif what < 0.94:
            self.peers = self.rng.choice((0.0, 0.7))
        elif what < 0.96:
            self.table = table_of(self.table.version + 1, self.cost)
        return name

    def send(self, decision: Decision) -> None:
        self.own[decision.replica_id].send(decision.version_id, decision.rank, PROMPT)
        self.sent.append(decision)

    def plain_ms(self, name: ReplicaId, rank: int) -> float:
        """The plain estimate."""
        load, own = self.loads[name], self.own[name]
        age_s = self.now_s - load.received_s
        found = plain_cost_ms(load, own, self.peers, self.cost, rank, PROMPT, LONGEST, age_s)
        return found * SPILL_PENALTY if name == SPILL and rank else found


def decisions(
    kernel: RankKernel, seed: int, prepare: Callable[[Chooser, ReplicaId, Site], None]
) -> list[ReplicaId]:
    """The replicas chosen, each of which costs as little as any."""
    site, chooser = Site(kernel, seed), Chooser("marginal-cost", seed)
    found: list[ReplicaId] = []
    for _ in range(DECISIONS):
        for _ in range(site.rng.randrange(3)):
            prepare(chooser, site.change(), site)
        rank = site.rng.choice(RANKS)
        request = RouteRequest(ADAPTERS.get(rank), PROMPT, LONGEST)
        decision = chooser.choose(request, site.table, site.view)
        costs = {name: site.plain_ms(name, rank) for name in REPLICAS}
        assert costs[decision.replica_id] <= min(costs.values()) * (1 + 1e-9)
        found.append(decision.replica_id)
        site.send(decision)
        prepare(chooser, decision.replica_id, site)
    return found


@pytest.mark.parametrize("kernel", RankKernel)
@pytest.mark.parametrize("seed", range(3))
def test_the_cheapest_is_chosen_whether_prepared_or_not(kernel: RankKernel, seed: int) -> None:
    lots = Random(seed)

    def always(chooser: Chooser, name: ReplicaId, site: Site) -> None:
        chooser.prepare(name, site.view)

    def never(chooser: Chooser, name: ReplicaId, site: Site) -> None:
        pass

    def sometimes(chooser: Chooser, name: ReplicaId, site: Site) -> None:
        if lots.random() < 0.5:
            chooser.prepare(lots.choice(REPLICAS), site.view)

    expected = decisions(kernel, seed, never)
    assert len(set(expected)) == len(REPLICAS)
    assert decisions(kernel, seed, always) == expected
    assert decisions(kernel, seed, sometimes) == expected
