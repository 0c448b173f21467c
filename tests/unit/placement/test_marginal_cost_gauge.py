"""The estimate of a gauge, kept up to date step by step, against the same worked out anew."""

import math
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from placement.latency import LatencyModel, RankKernel
from placement.routing.chooser import OwnRequests, RankLoad, ReplicaLoad
from placement.routing.marginal_cost_gauge import Gauge, cost_ms
from placement.routing.replica_cost import ReplicaCost
from placement.types import ReplicaId, VersionId
from tests.support.plain_cost import RANKS, plain_cost_ms

PROMPT, OUTPUT = 321, 99


rank_loads = st.lists(
    st.builds(RankLoad, st.sampled_from(RANKS), st.integers(0, 6), st.integers(0, 3), st.integers(0, 2000)),
    max_size=5,
    unique_by=lambda one: one.rank,
)


@st.composite
def reports(draw: st.DrawFn) -> ReplicaLoad:
    ranks = draw(rank_loads)
    return ReplicaLoad(
        ReplicaId("r"),
        running=sum(one.running for one in ranks),
        waiting=sum(one.waiting for one in ranks),
        outstanding_tokens=0,
        kv_cache_usage=draw(st.sampled_from((0.3, 0.99))),
        output_tokens=draw(st.sampled_from((0.0, 150.0))),
        ranks=tuple(ranks),
        prompt_tokens=draw(st.sampled_from((0.0, 700.0))),
    )


costs = st.builds(
    ReplicaCost,
    latency=st.builds(
        LatencyModel,
        kernel=st.sampled_from(RankKernel),
        base_ms=st.just(30.0),
        row_ms=st.sampled_from((0.0, 0.1)),
        prefill_token_ms=st.just(0.05),
        prefill_pair_ms=st.sampled_from((0.0, 1e-5)),
        context_token_ms=st.sampled_from((0.0, 1e-4)),
        lora_step_ms=st.sampled_from((0.0, 1.0)),
        adapter_ms=st.sampled_from((0.0, 0.2)),
        decode_rank_ms=st.just(0.004),
        prefill_rank_ms=st.just(0.0005),
    ),
    max_num_seqs=st.sampled_from((4, 32)),
    kv_tokens=st.sampled_from((5_000, 100_000)),
    adapter_slots=st.sampled_from((2, 32)),
)


class Updates(RuleBasedStateMachine):
    """A gauge that sees each change when it is asked, sometimes several at once."""

    @initialize(cost=costs, load=reports())
    def begin(self, cost: ReplicaCost, load: ReplicaLoad) -> None:
        self.cost, self.load, self.peers = cost, load, 0.0
        self.gauge, self.own = Gauge(cost), OwnRequests()

    @rule(load=reports())
    def report(self, load: ReplicaLoad) -> None:
        self.load = load
        self.own.report()

    @rule(rank=st.sampled_from(RANKS), tokens=st.integers(0, 900))
    def send(self, rank: int, tokens: int) -> None:
        self.own.send(VersionId(f"a{rank}@1"), rank, tokens)

    @rule(data=st.data())
    def end(self, data: Any) -> None:
        if self.own.ranks:
            rank = data.draw(st.sampled_from(sorted(self.own.ranks)))
            self.own.end(VersionId(f"a{rank}@1"), rank)

    @rule(rank=st.sampled_from(RANKS))
    def lease(self, rank: int) -> None:
        self.own.lease(rank, 70)

    @rule(data=st.data())
    def end_lease(self, data: Any) -> None:
        if self.own.leased:
            self.own.end_lease(data.draw(st.sampled_from(sorted(self.own.leased))), 70)

    @rule()
    def die(self) -> None:
        self.own.clear()

    @rule(peers=st.sampled_from((0.0, 0.7, 2.0)))
    def change_peers(self, peers: float) -> None:
        self.peers = peers
        self.gauge.stamp = -1

    @rule(rank=st.sampled_from(RANKS), age_s=st.sampled_from((0.0, 0.03, 0.4)))
    def ask(self, rank: int, age_s: float) -> None:
        gauge, own = self.gauge, self.own
        if self.load is not gauge.load or own.stamp != gauge.stamp:
            gauge.update(self.load, own, self.peers)
        terms = gauge.terms if rank else gauge.base_terms()
        found = cost_ms(terms, gauge.charge(rank), PROMPT, OUTPUT, age_s)
        plain = plain_cost_ms(self.load, own, self.peers, self.cost, rank, PROMPT, OUTPUT, age_s)
        assert math.isclose(found, plain, rel_tol=1e-9)

    @invariant()
    def sums_are_kept(self) -> None:
        if hasattr(self, "own"):
            assert self.own.num_sent_tokens == sum(self.own.sent_tokens.values())
            assert self.own.num_leased_tokens == sum(self.own.leased_tokens.values())


TestUpdates = Updates.TestCase
