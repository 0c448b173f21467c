"""The estimate of a gauge, kept up to date step by step, against the same worked out anew."""

import math
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from placement.latency import LatencyModel, RankKernel
from placement.routing.chooser import OwnRequests, RankLoad, ReplicaLoad
from placement.routing.marginal_cost_gauge import (
    AHEAD,
    BUSY,
    FULL_KV,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    SPREAD_ROWS,
    Gauge,
    cost_ms,
)
from placement.routing.replica_cost import ReplicaCost
from placement.types import ReplicaId, VersionId

RANKS = (0, 8, 16, 64, 128)
PROMPT, OUTPUT = 321, 99


def counts_of(load: ReplicaLoad, own: OwnRequests, peers: float) -> dict[int, float]:
    """Requests there by rank."""
    reported = {one.rank: one.running + one.waiting for one in load.ranks}
    found = {}
    for rank in RANKS:
        now, then = own.ranks.get(rank, 0), own.reported.get(rank, 0)
        others = max(0.0, reported.get(rank, 0) - then + peers * (now - then))
        found[rank] = others + now + own.leased.get(rank, 0)
    return found


def padding_of(counts: dict[int, float], rank: int) -> tuple[float, float]:
    """The rank charged on average over a request's life, and how much of it is the request's doing."""
    charged, raised = float(rank), 0.0
    for level in range(max(RANKS)):
        # One of the m requests above this level is there for m / (m + 1) of the time.
        above = sum(number for other, number in counts.items() if other > level)
        if level >= rank:
            charged += above / (above + 1)
        else:
            raised += 1 / (above + 1)
    return charged, raised


def plain_cost_ms(
    load: ReplicaLoad, own: OwnRequests, peers: float, cost: ReplicaCost, rank: int, prompt: int, output: int
) -> float:
    """The cost of one request more, see the docstring of `placement.routing.marginal_cost_gauge`."""
    model, counts = cost.latency, counts_of(load, own, peers)
    rows, mean_prompt, mean_output = (
        sum(counts.values()),
        load.prompt_tokens or PROMPT_TOKENS,
        load.output_tokens or OUTPUT_TOKENS,
    )
    length = mean_prompt + mean_output / 2
    seats = min(cost.max_num_seqs, cost.kv_tokens / length)
    if load.waiting and load.kv_cache_usage > FULL_KV:
        seats = min(seats, load.running)
    seats = max(1.0, seats)
    batch = min(rows + 1, seats)
    share = batch / (rows + 1)
    adapter_rows = rows - counts[0]
    adapters = adapter_rows + (rank > 0)
    charged, raised = padding_of(counts, rank) if model.kernel is RankKernel.PADDED_BATCH else (0.0, 0.0)
    there = sum(level * number for level, number in counts.items())
    own_rank, others_rank, rank_rows = {
        RankKernel.PADDED_BATCH: (charged, charged, adapters * charged),
        RankKernel.PADDED_CONFIG: (128.0, 128.0, adapters * 128.0),
        RankKernel.SUM: (rank, there / adapter_rows if adapter_rows else 0.0, there + rank),
    }[model.kernel]
    own_rank = own_rank if rank else 0.0
    row_ms = model.row_ms + model.context_token_ms * length
    decode = model.base_ms + row_ms * batch + model.decode_rank_ms * rank_rows * share
    if adapters:
        decode += model.lora_step_ms + model.adapter_ms * min(adapters * share, cost.adapter_slots)
    prompts = (batch - 1) * mean_prompt / mean_output
    added = row_ms + raised * (model.decode_rank_ms * adapter_rows * share + model.prefill_rank_ms * prompts)
    if rank:
        added += model.decode_rank_ms * own_rank + model.adapter_ms
    others_ms = model.prefill_token_ms + model.prefill_rank_ms * others_rank
    own_ms = model.prefill_token_ms + model.prefill_rank_ms * own_rank
    waiting = SPREAD_ROWS * math.log1p(math.exp((rows + 1 - seats) / SPREAD_ROWS))
    queue = waiting * (mean_output * decode + batch * mean_prompt * others_ms) / seats
    tokens: float = sum(one.prefill_tokens for one in load.ranks) + sum(own.leased_tokens.values())
    tokens += (1 + peers) * sum(own.sent_tokens.values())
    ahead = tokens * (others_ms + decode / cost.max_num_batched_tokens) - 1e3 * load.age_s
    delayed = rows + BUSY * waiting
    found = max(queue, (1 + (AHEAD - 1) / (1 + waiting)) * ahead) + BUSY * queue + 1.5 * decode
    found += prompt * (own_ms * (1 + delayed) + decode / cost.max_num_batched_tokens)
    found += 0.5 * model.prefill_pair_ms * (1 + delayed) * prompt**2
    return found + output * (decode + prompts * others_ms + delayed * added)


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
        age_s=draw(st.sampled_from((0.0, 0.07))),
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

    @rule(age_s=st.sampled_from((0.0, 0.03, 0.4)))
    def grow_older(self, age_s: float) -> None:
        for age in (0.01, age_s):
            self.load = self.load._replace(age_s=age)
            self.ask(0)
            self.ask(64)

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

    @rule(rank=st.sampled_from(RANKS))
    def ask(self, rank: int) -> None:
        gauge, own = self.gauge, self.own
        if self.load is not gauge.load or own.stamp != gauge.stamp:
            gauge.update(self.load, own, self.peers)
        found = cost_ms(gauge.terms if rank else gauge.base_terms(), gauge.charge(rank), PROMPT, OUTPUT)
        plain = plain_cost_ms(self.load, own, self.peers, self.cost, rank, PROMPT, OUTPUT)
        assert math.isclose(found, plain, rel_tol=1e-9)

    @invariant()
    def sums_are_kept(self) -> None:
        if hasattr(self, "own"):
            assert self.own.num_sent_tokens == sum(self.own.sent_tokens.values())
            assert self.own.num_leased_tokens == sum(self.own.leased_tokens.values())


TestUpdates = Updates.TestCase
