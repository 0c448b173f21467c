"""The routing of published systems, to compare with: Toppings, the rank-weighted backlog, dLoRA's dispatch.

All of them send to holders alone, never to a replica that would have to load the adapter first. Where a
replica has no fresh report, or no cost that the policy needs, the others are preferred; where none has, the
fewest requests outstanding decide. Ties are drawn by lot.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Generic, TypeVar

from placement.latency import LatencyModel, RankKernel
from placement.profile import operating_point_of
from placement.routing.replica_cost import ReplicaCost
from placement.routing.simple import LeastOutstanding
from placement.routing.stock import OUTPUT_TOKENS, PROMPT_TOKENS, RankStock, Stock
from placement.routing.view import LoadView, OwnRequests, Picked, ReplicaLoad, RouteRequest, Target
from placement.types import Holder, ReplicaId

_NOTHING = RankStock(0.0, 0.0, 0.0)
_Score = tuple[float, ...]
_Known = TypeVar("_Known")
_Stocks = dict[int, RankStock]


class _ByScore(ABC, Generic[_Known]):
    """The holder of the lowest score; a policy is one way to score a replica.

    What of a score does not depend on the request is `_known`, and worked out again only when what is there
    changes.
    """

    uses_spill = False
    wants_own = True

    def __init__(self) -> None:
        self._stocks: dict[ReplicaId, Stock] = {}
        self._kept: dict[ReplicaId, tuple[_Stocks, ReplicaCost, _Known]] = {}
        self._fallback = LeastOutstanding()

    def pick(
        self, request: RouteRequest, target: Target, holders: Sequence[Holder], view: LoadView, rng: Random
    ) -> Picked:
        """The holder with the lowest score."""
        best: list[Holder] = []
        lowest: _Score = (float("inf"),)
        for holder in holders:
            load = view.loads.get(holder.replica_id)
            cost = target.costs.get(holder.replica_id)
            if load is None or cost is None:
                continue
            score = self._score(request, target.rank, load, view, cost)
            if score < lowest:
                lowest, best = score, [holder]
            elif score == lowest:
                best.append(holder)
        if not best:
            return self._fallback.pick(request, target, holders, view, rng)
        return (best[0] if len(best) == 1 else best[int(rng.random() * len(best))]), ""

    @abstractmethod
    def _score(
        self, request: RouteRequest, rank: int, load: ReplicaLoad, view: LoadView, cost: ReplicaCost
    ) -> _Score:
        """The lower, the better."""

    @abstractmethod
    def _known(
        self, stocks: _Stocks, cost: ReplicaCost, replica: ReplicaId, own: OwnRequests | None
    ) -> _Known:
        """What scores of a replica are made from; `stocks` are others when any of this is."""

    def _known_of(self, load: ReplicaLoad, view: LoadView, cost: ReplicaCost) -> _Known:
        replica = load.replica_id
        stock = self._stocks.get(replica)
        if stock is None:
            stock = self._stocks[replica] = Stock()
        own = view.own.get(replica)
        stocks = stock.take(load, own, view.peers)
        kept = self._kept.get(replica)
        if kept is None or kept[0] is not stocks or kept[1] is not cost:
            kept = self._kept[replica] = (stocks, cost, self._known(stocks, cost, replica, own))
        return kept[2]


@dataclass(slots=True)
class _Slowed:
    """A replica's stocks, the requests in all, and what its next prefill and decoding steps take in ms:
    decoding with so much context, as it is and with a request more of a rank."""

    stocks: _Stocks
    requests: float
    prefill_ms: float
    context: float = -1.0
    decode_ms: float = 0.0
    after_ms: dict[int, float] = field(default_factory=dict)


class Toppings(_ByScore[_Slowed]):
    """Toppings' (ATC'25, CaraServe before) Algorithm 1: by how much the request slows down those there.

    The time that computing all waiting prompts takes with the request less without it, over the mean output,
    plus the time of a decoding step with everything that runs or waits, with the request less without it,
    times the number of those requests; from the profile's latency model, whose kernel decides what rank
    costs. Replicas where the decoding step would break the SLO come after those where it would not.
    """

    def _score(
        self, request: RouteRequest, rank: int, load: ReplicaLoad, view: LoadView, cost: ReplicaCost
    ) -> _Score:
        known = self._known_of(load, view, cost)
        stocks = known.stocks
        prompt = float(request.prompt_tokens) or load.prompt_tokens or PROMPT_TOKENS
        output = load.output_tokens or OUTPUT_TOKENS
        context = (load.prompt_tokens or prompt) + output / 2
        if context != known.context:
            known.context, known.decode_ms, known.after_ms = context, _decode_ms(cost, stocks, context), {}
        there = stocks.get(rank, _NOTHING)
        joined = dict(stocks)
        joined[rank] = RankStock(there.running, there.waiting + 1, there.prefill_tokens + prompt)
        prefill_ms = _prefill_ms(cost.latency, joined) - known.prefill_ms
        after_ms = known.after_ms.get(rank)
        if after_ms is None:
            after_ms = known.after_ms[rank] = _decode_ms(cost, joined, context)
        decode_ms = after_ms - known.decode_ms
        breaks = cost.tbt_slo_ms is not None and after_ms > cost.tbt_slo_ms
        return (float(breaks), (prefill_ms / output + decode_ms) * known.requests)

    def _known(
        self, stocks: _Stocks, cost: ReplicaCost, replica: ReplicaId, own: OwnRequests | None
    ) -> _Slowed:
        return _Slowed(stocks, _requests(stocks), _prefill_ms(cost.latency, stocks))


class RankBacklog(_ByScore[float]):
    """What LoRAServe's artifact calls Toppings: the least time that the waiting prompts take, each rank's
    tokens, and `EXTRA_TOKENS` for a rank that has any, over its operating point."""

    EXTRA_TOKENS = 70.0

    def __init__(self) -> None:
        super().__init__()
        self._capacities: dict[tuple[ReplicaId, int], tuple[ReplicaCost, float]] = {}

    def _score(
        self, request: RouteRequest, rank: int, load: ReplicaLoad, view: LoadView, cost: ReplicaCost
    ) -> _Score:
        return (self._known_of(load, view, cost),)

    def _known(
        self, stocks: _Stocks, cost: ReplicaCost, replica: ReplicaId, own: OwnRequests | None
    ) -> float:
        backlog_s = 0.0
        for level, stock in stocks.items():
            if stock.waiting > 0 or stock.prefill_tokens > 0:
                tokens = stock.prefill_tokens + self.EXTRA_TOKENS
                backlog_s += tokens / self._tokens_per_s(replica, level, cost)
        return backlog_s

    def _tokens_per_s(self, replica: ReplicaId, rank: int, cost: ReplicaCost) -> float:
        known = self._capacities.get((replica, rank))
        if known is None or known[0] is not cost:
            points = cost.operating_points
            value = operating_point_of(points, rank) if points else 1.0
            known = self._capacities[replica, rank] = (cost, value)
        return known[1]


class DLoraDispatch(_ByScore[_Score]):
    """dLoRA's (OSDI'24) dispatch: the fewest batches to come, those of one adapter alone counting less.

    Of each adapter's requests as many whole batches as there are, at `MERGED` of the time as they run with
    the adapter merged into the weights, and whole batches of what remains. Which adapters others' requests
    are for is not known, so they count as remaining. Below a batch all replicas are alike, and the fewest
    requests decide, where the artifact takes the first. Its proactive variant, which also looks at replicas
    that would replace an idle adapter, is a matter of placement here: nothing is routed to where the adapter
    is not.
    """

    MERGED = 0.6

    def _score(
        self, request: RouteRequest, rank: int, load: ReplicaLoad, view: LoadView, cost: ReplicaCost
    ) -> _Score:
        return self._known_of(load, view, cost)

    def _known(
        self, stocks: _Stocks, cost: ReplicaCost, replica: ReplicaId, own: OwnRequests | None
    ) -> _Score:
        batch, requests = cost.max_num_seqs, _requests(stocks)
        whole, known = 0, 0
        for count in own.versions.values() if own is not None else ():
            known += count
            whole += count // batch
        remaining = max(0.0, requests - known) + known - whole * batch
        return (whole * self.MERGED + remaining // batch, requests)


def _requests(stocks: _Stocks) -> float:
    return sum([one.running + one.waiting for one in stocks.values()])


def _prefill_ms(model: LatencyModel, stocks: _Stocks) -> float:
    """One step that computes all waiting prompts; 0 if there are none."""
    rows = tokens = adapters = 0.0
    by_rank: dict[int, float] = {}
    for rank, (_, waiting, prefill_tokens) in stocks.items():
        rows += waiting
        tokens += prefill_tokens
        if rank:
            adapters += waiting
            if prefill_tokens > 0:
                by_rank[rank] = prefill_tokens
    if tokens <= 0:
        return 0.0
    ms = model.base_ms + (model.lora_step_ms if by_rank else 0.0)
    ms += model.row_ms * rows + model.prefill_token_ms * tokens + model.adapter_ms * adapters
    ms += model.prefill_pair_ms * tokens * tokens / max(1.0, rows) / 2
    return ms + model.prefill_rank_ms * _charged(model, by_rank)


def _decode_ms(cost: ReplicaCost, stocks: _Stocks, context: float) -> float:
    """A step in which all that run or wait decode, each with so many tokens in the cache; 0 if nothing
    does."""
    model = cost.latency
    rows = 0.0
    by_rank: dict[int, float] = {}
    for rank, (running, waiting, _) in stocks.items():
        count = running + waiting
        rows += count
        if rank and count > 0:
            by_rank[rank] = count
    if rows <= 0:
        return 0.0
    adapters = min(float(cost.adapter_slots), sum(by_rank.values()))
    ms = model.base_ms + (model.lora_step_ms if by_rank else 0.0) + model.adapter_ms * adapters
    ms += (model.row_ms + model.context_token_ms * context) * rows
    return ms + model.decode_rank_ms * _charged(model, by_rank)


def _charged(model: LatencyModel, by_rank: dict[int, float]) -> float:
    """The ranks that the kernel charges these rows, or tokens, of adapters for, in all."""
    if not by_rank:
        return 0.0
    kernel = model.kernel
    if kernel is RankKernel.SUM:
        return sum([rank * count for rank, count in by_rank.items()])
    # Else every row, or token, is charged for the same rank.
    return (max(by_rank) if kernel is RankKernel.PADDED_BATCH else model.max_lora_rank) * sum(
        by_rank.values()
    )
