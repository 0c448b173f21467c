"""What one more request would cost at one replica: its own delay there and what it adds to that of others.

Owns the estimate for one replica, from what a router knows of it; `placement.marginal_cost` chooses by it.

The estimate is the marginal cost of a queue whose members share one server (its engine's steps): what a
further request waits and takes, and how much longer everything takes because of it, times those whom that
delays. It is in milliseconds of somebody's waiting. Requests are taken to live exponentially long and to be
replaced when they end, so that what holds now holds on average while the request is there.
"""

import math
from typing import NamedTuple

from placement.latency import RankKernel
from placement.replica_cost import ReplicaCost
from placement.routing_view import OwnRequests, ReplicaLoad

PROMPT_TOKENS = 512.0
OUTPUT_TOKENS = 128.0
"""Lengths that are taken where neither the request nor the replica tells any."""

SPREAD_ROWS = 2.0
"""How far the number of requests there may be from what it seems: so near to a full batch, some will wait."""

BUSY = 3.0
"""How many of those who come later a wait delays for each that waits now: load / (1 - load) at a load of
0.75. It counts the more the longer the queue; by experiment 2 to 8 do about equally well."""

FULL_KV = 0.95


class Price(NamedTuple):
    """A request's cost in ms: a constant, per prompt token, per its square, per output token."""

    fixed_ms: float
    prompt_ms: float
    pair_ms: float
    output_ms: float

    def of(self, prompt_tokens: float, output_tokens: float) -> float:
        """The cost of a request of these lengths."""
        fixed_ms, prompt_ms, pair_ms, output_ms = self
        return fixed_ms + (prompt_ms + pair_ms * prompt_tokens) * prompt_tokens + output_ms * output_tokens


class _Step(NamedTuple):
    """The engine's steps with one request more: ms of a decoding step, per prompt token of the others and of
    the new one, and by how many ms the new one prolongs a step."""

    decode_ms: float
    others_token_ms: float
    own_token_ms: float
    added_ms: float


class Gauge:
    """One replica as one router sees it. `price` is kept until the report or the router's own requests
    change; the mean lengths of requests there are those of the last price."""

    __slots__ = (
        "_adapter_rows",
        "_cost",
        "_load",
        "_peers",
        "_prefill_tokens",
        "_prices",
        "_rank_rows",
        "_rows",
        "_stamp",
        "_stretches",
        "_top",
        "output_tokens",
        "prompt_tokens",
    )

    def __init__(self) -> None:
        self._load: ReplicaLoad | None = None
        self._cost: ReplicaCost | None = None
        self._stamp = -1
        self._peers = 0.0
        self._prices: dict[int, Price] = {}
        self._top = 0
        # Ranks from low to high, and for what part of a life requests of at least high are there.
        self._stretches: list[tuple[int, int, float]] = []
        self._rows = self._adapter_rows = self._rank_rows = self._prefill_tokens = 0.0
        self.prompt_tokens = PROMPT_TOKENS
        self.output_tokens = OUTPUT_TOKENS

    def price(
        self, rank: int, load: ReplicaLoad, own: OwnRequests | None, peers: float, cost: ReplicaCost
    ) -> Price:
        """What one more request of this rank (0: the base model) costs."""
        stamp = -1 if own is None else own.stamp
        if load is not self._load or stamp != self._stamp or peers != self._peers or cost is not self._cost:
            self._load, self._stamp, self._peers, self._cost = load, stamp, peers, cost
            self._take_stock(load, own, peers)
            self._prices = {}
        found = self._prices.get(rank)
        if found is None:
            found = self._prices[rank] = self._price(rank, load, cost)
        return found

    # -- what is there -------------------------------------------------------------------------

    def _take_stock(self, load: ReplicaLoad, own: OwnRequests | None, peers: float) -> None:
        """Count the requests there now by rank: the others' as reported, this router's own as they are.
        What it has sent and had back since the report counts once more for each peer."""
        counts: dict[int, float] = {}
        tokens = 0.0
        for rank, running, waiting, prefill_tokens in load.ranks:
            counts[rank] = float(running + waiting)
            tokens += prefill_tokens
        if own is not None:
            for rank in own.reported.keys() | own.ranks.keys():
                now, then = own.ranks.get(rank, 0), own.reported.get(rank, 0)
                others = max(0.0, counts.get(rank, 0.0) - then + peers * (now - then))
                counts[rank] = others + now
            for rank, number in own.leased.items():
                counts[rank] = counts.get(rank, 0.0) + number
            if own.sent_tokens or own.leased_tokens:
                tokens += (1 + peers) * sum(own.sent_tokens.values()) + sum(own.leased_tokens.values())
        rows = rank_rows = 0.0
        self._top = high = max(counts, default=0)
        self._stretches = stretches = []
        for rank in sorted(counts, reverse=True):
            if high > rank:
                stretches.append((rank, high, rows / (rows + 1)))
            high, count = rank, counts[rank]
            rows += count
            rank_rows += rank * count
        if high:
            stretches.append((0, high, rows / (rows + 1)))
        self._rows, self._rank_rows = rows, rank_rows
        self._adapter_rows = rows - counts.get(0, 0.0)
        self._prefill_tokens = tokens
        self.prompt_tokens = load.prompt_tokens or PROMPT_TOKENS
        self.output_tokens = load.output_tokens or OUTPUT_TOKENS

    # -- what one more does --------------------------------------------------------------------

    def _price(self, rank: int, load: ReplicaLoad, cost: ReplicaCost) -> Price:
        rows, prompt, output = self._rows, self.prompt_tokens, self.output_tokens
        seats = self._seats(load, cost)
        batch = min(rows + 1, seats)
        step = self._step(rank, batch, cost)
        # While one output is drawn, every place in the batch gets a new prompt once.
        life_ms = output * step.decode_ms + batch * prompt * step.others_token_ms
        waiting = _soft_excess(rows + 1 - seats)
        queue_ms = waiting * life_ms / seats
        token_ms = step.others_token_ms + step.decode_ms / cost.max_num_batched_tokens
        ahead_ms = max(0.0, self._prefill_tokens * token_ms - 1e3 * load.age_s)
        # Whoever is there is delayed, and of those who come later the more the longer the queue.
        delayed = rows + BUSY * waiting
        return Price(
            fixed_ms=max(queue_ms, ahead_ms) + BUSY * queue_ms + 1.5 * step.decode_ms,
            prompt_ms=step.own_token_ms * (1 + delayed) + step.decode_ms / cost.max_num_batched_tokens,
            pair_ms=0.5 * cost.latency.prefill_pair_ms * (1 + delayed),
            output_ms=step.decode_ms
            + (batch - 1) * prompt * step.others_token_ms / output
            + delayed * step.added_ms,
        )

    def _seats(self, load: ReplicaLoad, cost: ReplicaCost) -> float:
        """How many requests fit into the batch, by places or by the KV cache."""
        seats = min(float(cost.max_num_seqs), cost.kv_tokens / (self.prompt_tokens + self.output_tokens / 2))
        if load.waiting and load.kv_cache_usage > FULL_KV:
            seats = min(seats, load.running)
        return max(1.0, seats)

    def _step(self, rank: int, batch: float, cost: ReplicaCost) -> _Step:
        model = cost.latency
        adapters = self._adapter_rows + (1 if rank else 0)
        share = batch / (self._rows + 1)
        raised = 0.0
        if model.kernel is RankKernel.PADDED_BATCH:
            charged, raised = self._padding(rank)
            own_rank, others_rank, rank_rows = charged if rank else 0.0, charged, adapters * charged
        elif model.kernel is RankKernel.SUM:
            own_rank = float(rank)
            others_rank = self._rank_rows / self._adapter_rows if self._adapter_rows else 0.0
            rank_rows = self._rank_rows + rank
        else:
            others_rank = float(model.max_lora_rank)
            own_rank, rank_rows = others_rank if rank else 0.0, adapters * others_rank
        context_ms = model.context_token_ms * (self.prompt_tokens + self.output_tokens / 2)
        decode_ms = model.base_ms + (model.row_ms + context_ms) * batch
        decode_ms += model.decode_rank_ms * rank_rows * share
        if adapters:
            decode_ms += model.lora_step_ms + model.adapter_ms * min(adapters * share, cost.adapter_slots)
        # A higher rank slows each step for all, decoding or not.
        prompts = (batch - 1) * self.prompt_tokens / self.output_tokens
        added_ms = raised * (
            model.decode_rank_ms * self._adapter_rows * share + model.prefill_rank_ms * prompts
        )
        # Also where the batch is full and it takes another's place, or full replicas would seem the cheaper.
        added_ms += model.row_ms + context_ms
        if rank:
            added_ms += model.decode_rank_ms * own_rank + model.adapter_ms
        return _Step(
            decode_ms=decode_ms,
            others_token_ms=model.prefill_token_ms + model.prefill_rank_ms * others_rank,
            own_token_ms=model.prefill_token_ms + model.prefill_rank_ms * own_rank,
            added_ms=added_ms,
        )

    def _padding(self, rank: int) -> tuple[float, float]:
        """The highest rank in the batch, on average over the request's life, and how much of it is its doing.

        With m others of at least some rank and lives as in the module's docstring, one of them is there for
        m / (m + 1) of the request's life; for the rest of it the request alone makes the batch so high.
        """
        charged, raised = float(rank), 0.0
        if rank > self._top:
            raised += rank - self._top
        for low, high, part in self._stretches:
            if low >= rank:
                charged += (high - low) * part
            elif high > rank:
                charged += (high - rank) * part
                raised += (rank - low) * (1 - part)
            else:
                raised += (high - low) * (1 - part)
        return charged, raised


def _soft_excess(rows: float) -> float:
    """max(0, rows), less sharply: what it is on average if `rows` is uncertain by `SPREAD_ROWS`."""
    scaled = rows / SPREAD_ROWS
    return rows if scaled > 30 else SPREAD_ROWS * math.log1p(math.exp(scaled))
