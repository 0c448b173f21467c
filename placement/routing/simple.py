"""The routing policies that know no costs: fewest outstanding, by share alone, in turn."""

from collections.abc import Sequence
from random import Random

from placement.routing.view import LoadView, Picked, RouteRequest, Target
from placement.types import AdapterName, Holder

MAX_TURNS = 65_536
"""How many adapters round-robin remembers before it begins anew."""


class LeastOutstanding:
    """The fewest requests outstanding per share, this one counted; a tie is drawn by lot.

    A request outstanding is one of this router's own, exactly known, or one that the replica
    reported and that was not ours. A replica with no fresh report is taken to have as many of
    others' as the most loaded one that has, so that silence attracts nobody. Dividing by the share
    makes idle holders fill in proportion to their shares, and a small share is still used when the
    large ones are busy.

    Peers read the same reports, so between two of them each would fill the same gap. Therefore what
    this router has sent and had back since the report counts once more for each peer: they are taken
    to do as it does, and together they fill the gap about once. See `active_peers`.
    """

    uses_spill = False
    wants_own = False

    def pick(
        self, request: RouteRequest, target: Target, holders: Sequence[Holder], view: LoadView, rng: Random
    ) -> Picked:
        """The holder with the lowest (outstanding + 1) / share."""
        best: list[Holder] = []
        lowest = float("inf")
        for holder, count in zip(holders, _outstanding(holders, view), strict=True):
            score = (count + 1) / holder.share
            if score < lowest:
                lowest, best = score, [holder]
            elif score == lowest:
                best.append(holder)
        return (best[0] if len(best) == 1 else best[int(rng.random() * len(best))]), ""


def _outstanding(holders: Sequence[Holder], view: LoadView) -> list[float]:
    """The requests that each holder is taken to have now."""
    loads, in_flight, leased, peers = view.loads, view.in_flight, view.leased, view.peers
    counts: list[float] = []
    silent: list[int] = []
    worst = 0.0
    for holder in holders:
        name = holder.replica_id
        own = in_flight.get(name, 0)
        if leased:
            own += leased.get(name, 0)
        load = loads.get(name)
        if load is None:
            silent.append(len(counts))
            counts.append(own)
            continue
        others: float = load.running + load.waiting - load.own_requests
        if peers:
            others += peers * (own - load.own_requests)
        if others <= 0:
            counts.append(own)
            continue
        if others > worst:
            worst = others
        counts.append(own + others)
    for index in silent:
        counts[index] += worst
    return counts


class WeightedShare:
    """A draw by share alone, whatever the load: the placement's shares are the whole decision."""

    uses_spill = False
    wants_own = False

    def pick(
        self, request: RouteRequest, target: Target, holders: Sequence[Holder], view: LoadView, rng: Random
    ) -> Picked:
        """A holder drawn with a probability in proportion to its share."""
        drawn = rng.random() * sum(holder.share for holder in holders)
        for holder in holders:
            drawn -= holder.share
            if drawn < 0:
                return holder, ""
        return holders[-1], ""


class RoundRobin:
    """Each adapter's holders in turn, shares and load ignored."""

    uses_spill = False
    wants_own = False

    def __init__(self) -> None:
        self._turns: dict[AdapterName | None, int] = {}

    def pick(
        self, request: RouteRequest, target: Target, holders: Sequence[Holder], view: LoadView, rng: Random
    ) -> Picked:
        """The adapter's next holder; one counter per adapter, since a shared one could lock in step."""
        if len(self._turns) >= MAX_TURNS:
            self._turns.clear()
        turn = self._turns.get(request.adapter, 0)
        self._turns[request.adapter] = turn + 1
        return holders[turn % len(holders)], ""
