"""What a router takes to be at a replica now, by rank: the last report, and what it did itself since then."""

from typing import NamedTuple

from placement.routing.view import OwnRequests, ReplicaLoad

PROMPT_TOKENS = 512.0
OUTPUT_TOKENS = 128.0
"""Lengths that are taken where neither the request nor the replica tells any."""


class RankStock(NamedTuple):
    """Requests for adapters of one rank: past their first token, before it, and the prompts of these."""

    running: float
    waiting: float
    prefill_tokens: float


_NOTHING = RankStock(0.0, 0.0, 0.0)


class Stock:
    """One replica as one router sees it; counted again only when a report or a request of its own changes it.

    Of the router's own requests those sent since the report wait, those had back since then ran; its peers
    are taken to have sent and had back as many each. A report that does not tell ranks apart counts as the
    base model's.
    """

    __slots__ = ("_load", "_peers", "_stamp", "by_rank")

    def __init__(self) -> None:
        self._load: ReplicaLoad | None = None
        self._stamp = -1
        self._peers = 0.0
        self.by_rank: dict[int, RankStock] = {}

    def take(self, load: ReplicaLoad, own: OwnRequests | None, peers: float) -> dict[int, RankStock]:
        """What is there by rank, 0 being the base model."""
        stamp = -1 if own is None else own.stamp
        if load is not self._load or stamp != self._stamp or peers != self._peers:
            self._load, self._stamp, self._peers = load, stamp, peers
            self.by_rank = _counted(load, own, 1.0 + peers)
        return self.by_rank


def _counted(load: ReplicaLoad, own: OwnRequests | None, routers: float) -> dict[int, RankStock]:
    stocks = {rank: RankStock(running, waiting, tokens) for rank, running, waiting, tokens in load.ranks}
    if not load.ranks and load.running + load.waiting:
        prefill_tokens = load.waiting * (load.prompt_tokens or PROMPT_TOKENS)
        stocks[0] = RankStock(load.running, load.waiting, prefill_tokens)
    if own is None or (own.ranks == own.reported and not own.sent_tokens and not own.leased):
        # As always after a report.
        return stocks
    for rank in own.reported.keys() | own.ranks.keys() | own.leased.keys():
        change = routers * (own.ranks.get(rank, 0) - own.reported.get(rank, 0))
        if not change and rank not in own.sent_tokens and rank not in own.leased:
            continue
        running, waiting, tokens = stocks.get(rank, _NOTHING)
        if change < 0:
            # Those that have ended ran, so far as there were any.
            running, waiting = max(0.0, running + change), max(0.0, waiting + min(0.0, running + change))
            change = 0.0
        waiting += change + own.leased.get(rank, 0)
        tokens += routers * own.sent_tokens.get(rank, 0) + own.leased_tokens.get(rank, 0)
        stocks[rank] = RankStock(running, waiting, tokens)
    return stocks
