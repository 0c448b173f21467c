"""Routing by what a request would cost in all: its own delay, and the delay that it adds to others'.

Minimising each request's marginal cost keeps ranks apart as far as that pays: a high rank goes where high
ranks are already, unless the queue there costs more, and where rank costs nothing what is left is to
balance. `placement.routing.marginal_cost_gauge` has the estimate.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from random import Random

from placement.routing.marginal_cost_gauge import NO_REQUESTS, Gauge
from placement.routing.replica_cost import ReplicaCost
from placement.routing.simple import LeastOutstanding
from placement.routing.view import LoadView, OwnRequests, Picked, RouteRequest, Target
from placement.types import Holder, ReplicaId, VersionId

SPILL_PENALTY = 1.02
"""How many times its estimate a holder without a share costs: the plan knows what the estimate does not,
that those of its own tier are yet to come. More makes routers wait for plans while popularity moves."""

MAX_LOOKS = 12
"""So many holders are looked at for one request. More would take longer than they are worth: the best of a
few drawn by lot is nearly the best of all, and routers that draw differently do not herd together."""

MAX_REMEMBERED = 65_536
"""Adapters, and blocks of prompts, that are remembered."""

MAX_LOOKS_KEPT = 262_144
"""Holders of adapters whose gauges are kept ready: a hundred bytes each."""

_Best = tuple[Sequence[Holder], Holder]
_Look = tuple[Holder, ReplicaId, Gauge | None, float]
"""A holder, its name, its gauge if it has a cost, and how many times its estimate it costs."""
_Cached = tuple[ReplicaId | None, int]
_NOT_CACHED: _Cached = (None, 0)


class MarginalCost:
    """The holder where admitting the request costs least, see `Gauge`; a tie is drawn by lot.

    Holders without a fresh report cost as much as the dearest that has one, so that silence attracts nobody.
    With no report or no cost model at all the fewest outstanding decide. Of more than `MAX_LOOKS` holders a
    part drawn by lot is looked at, and the one that was best for this adapter last time.

    Where the request names the blocks of its prompt, a replica that this router lately sent the same first
    blocks to for the same adapter is taken to have them: they cost nothing there, whatever its rank.
    """

    uses_spill = True
    wants_own = True

    def __init__(self) -> None:
        self._gauges: dict[ReplicaId, Gauge] = {}
        self._costs: Mapping[ReplicaId, ReplicaCost] = {}
        self._own: Mapping[ReplicaId, OwnRequests] = {}
        self._peers = 0.0
        self._looks: dict[VersionId | None, tuple[Sequence[Holder], list[_Look]]] = {}
        self._num_looks = 0
        self._best: dict[VersionId | None, _Best] = {}
        self._prefixes = PrefixMemory()
        self._fallback = LeastOutstanding()

    def pick(
        self, request: RouteRequest, target: Target, holders: Sequence[Holder], view: LoadView, rng: Random
    ) -> Picked:
        """The holder with the lowest cost, and "spill" or "prefix" if it is one for that."""
        looks = self._looks_at(target, holders, view)
        if len(holders) > MAX_LOOKS:
            looks = self._few(target, holders, looks, rng)
        cached = self._prefixes.find(request, target) if request.prefix else _NOT_CACHED
        best, silent = self._cheapest(request, target, looks, view, rng, cached)
        if best is None:
            return self._fall_back(request, target, holders, view, rng)
        if silent:
            best = silent[int(rng.random() * len(silent))]
        if len(holders) > MAX_LOOKS:
            self._remember(target, holders, best)
        if request.prefix:
            self._prefixes.note(request, target, best.replica_id)
        if best.share == 0:
            return best, "spill"
        return best, "prefix" if best.replica_id == cached[0] else ""

    def prepare(self, replica_id: ReplicaId, view: LoadView) -> None:
        """Bring the replica's gauge up to date, if there is one and the view is of the kind last seen."""
        gauge, load = self._gauges.get(replica_id), view.loads.get(replica_id)
        if gauge is None or load is None or view.own is not self._own or view.peers != self._peers:
            return
        own = view.own.get(replica_id, NO_REQUESTS)
        if load is not gauge.load or own.stamp != gauge.stamp:
            gauge.update(load, own, view.peers)

    def _cheapest(
        self,
        request: RouteRequest,
        target: Target,
        looks: list[_Look],
        view: LoadView,
        rng: Random,
        cached: _Cached,
    ) -> tuple[Holder | None, list[Holder]]:
        """The cheapest holder of those with a report; and if all of these cost the same, as where there is
        only one, it with those that are silent."""
        silent: list[Holder] = []
        best: Holder | None = None
        lowest, ties = float("inf"), 1
        find_load, find_own, peers = view.loads.get, view.own.get, view.peers
        cached_at, cached_tokens = cached
        rank, now_s = target.rank, view.now_s
        prompt_tokens, most_tokens = float(request.prompt_tokens), float(request.expected_tokens)
        for holder, name, gauge, penalty in looks:
            load = find_load(name)
            if load is None or gauge is None:
                silent.append(holder)
                continue
            own = gauge.own
            if load is not gauge.load or own.stamp != gauge.stamp:
                gauge.update(load, find_own(name, own) if own is NO_REQUESTS else own, peers)
            charged = gauge.charged.get(rank)
            if charged is None:
                charged = gauge.charge(rank)
            prompt, output = prompt_tokens or gauge.prompt_tokens, gauge.output_tokens
            if cached_at and name == cached_at:
                prompt = max(1.0, prompt - cached_tokens)
            if 0.0 < most_tokens < output:
                output = most_tokens
            # `cost_ms` of the gauge's module, without the call.
            q, q_rank, a, a_rank, aged, f, f_rank, p, p_rank, pair, o, o_rank = (
                gauge.terms if rank else gauge.base_terms()
            )
            wait_ms, ahead_ms = q + q_rank * charged, a + a_rank * charged
            age_s = now_s - load.received_s
            if age_s > 0.0:
                ahead_ms -= aged * age_s
            cost_ms = (
                (wait_ms if wait_ms > ahead_ms else ahead_ms)
                + (f + f_rank * charged)
                + (p + p_rank * charged + pair * prompt) * prompt
                + (o + o_rank * charged) * output
            ) * penalty
            if cost_ms < lowest:
                lowest, best, ties = cost_ms, holder, 1
            elif cost_ms == lowest:
                ties += 1
                best = holder if rng.random() * ties < 1.0 else best
        # So many ties that none cost more.
        return best, [*silent, best] if silent and best and ties + len(silent) == len(looks) else []

    def _looks_at(self, target: Target, holders: Sequence[Holder], view: LoadView) -> list[_Look]:
        """The holders with their gauges, as far as these still hold: costs are of one table, and peers count
        in all of them."""
        if target.costs is not self._costs or view.own is not self._own:
            self._costs, self._own, self._gauges = target.costs, view.own, {}
            self._looks, self._num_looks = {}, 0
        if view.peers != self._peers:
            self._peers = view.peers
            for gauge in self._gauges.values():
                gauge.stamp = -1
        known = self._looks.get(target.version_id)
        if known is not None and known[0] is holders:
            return known[1]
        looks = [self._look_at(holder, target) for holder in holders]
        self._num_looks += len(looks) - (len(known[1]) if known is not None else 0)
        if self._num_looks > MAX_LOOKS_KEPT:
            self._looks, self._num_looks = {}, len(looks)
        self._looks[target.version_id] = (holders, looks)
        return looks

    def _look_at(self, holder: Holder, target: Target) -> _Look:
        name = holder.replica_id
        gauge, cost = self._gauges.get(name), target.costs.get(name)
        if gauge is None and cost is not None:
            gauge = self._gauges[name] = Gauge(cost)
        return holder, name, gauge, SPILL_PENALTY if holder.share == 0 else 1.0

    def _few(self, target: Target, holders: Sequence[Holder], looks: list[_Look], rng: Random) -> list[_Look]:
        """Every so many-th holder from one drawn by lot, and the best of the last time."""
        step = -(-len(holders) // MAX_LOOKS)
        few = looks[int(rng.random() * step) :: step]
        kept = self._best.get(target.version_id)
        return few if kept is None or kept[0] is not holders else [*few, self._look_at(kept[1], target)]

    def _remember(self, target: Target, holders: Sequence[Holder], best: Holder) -> None:
        if len(self._best) >= MAX_REMEMBERED:
            self._best.clear()
        self._best[target.version_id] = (holders, best)

    def _fall_back(
        self, request: RouteRequest, target: Target, holders: Sequence[Holder], view: LoadView, rng: Random
    ) -> Picked:
        meant = [holder for holder in holders if holder.share > 0]
        if len(meant) == 1:
            return meant[0], "least-outstanding"
        equal = [Holder(replica_id=holder.replica_id, share=1.0) for holder in holders]
        picked, _ = self._fallback.pick(request, target, meant or equal, view, rng)
        return picked, "least-outstanding"


class PrefixMemory:
    """Which replica this router lately sent a block of a prompt to, by adapter; the oldest is forgotten."""

    def __init__(self, limit: int = MAX_REMEMBERED) -> None:
        self._limit = limit
        self._replicas: OrderedDict[tuple[VersionId | None, int], ReplicaId] = OrderedDict()

    def find(self, request: RouteRequest, target: Target) -> _Cached:
        """The replica that has the first blocks of the request's prompt, and their tokens."""
        replicas, version = self._replicas, target.version_id
        first = replicas.get((version, request.prefix[0]))
        if first is None:
            return _NOT_CACHED
        num_blocks = 0
        for block in request.prefix:
            if replicas.get((version, block)) != first:
                break
            num_blocks += 1
        return first, num_blocks * request.block_tokens

    def note(self, request: RouteRequest, target: Target, replica: ReplicaId) -> None:
        """The request goes there."""
        replicas, version = self._replicas, target.version_id
        for block in request.prefix:
            key = (version, block)
            replicas[key] = replica
            replicas.move_to_end(key)
        while len(replicas) > self._limit:
            replicas.popitem(last=False)
