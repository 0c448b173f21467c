"""Early refusal: whether a request can still finish inside its deadline at one of its holders.

Owns the estimate and what follows from it. Work on a request that comes too late anyway is taken from
requests that would have come in time, so under overload refusing at once is what keeps goodput up.
Nothing is refused that does not have to wait, or of which too little is known.
"""

from typing import NamedTuple

from placement.routing.chooser import Chooser, Decision, LoadView, ReplicaLoad, RouteRequest, RoutingError
from placement.table import RoutingTable

HEADROOM = 1.75
"""How much longer than estimated everything may take before an admitted request is late. With less,
those admitted last come too late whenever the rates or their outputs are a little worse than usual,
and their work is lost; waiting that much shorter costs no throughput, since a queue is left."""

MIN_RETRY_AFTER_S = 0.1
MAX_RETRY_AFTER_S = 60.0


class Demand(NamedTuple):
    """What admission asks of a request: its longest output and the seconds it has left."""

    max_tokens: int
    remaining_s: float


class Estimate(NamedTuple):
    """Seconds until a request would start at a replica, and from then to its last token."""

    wait_s: float
    serve_s: float

    @property
    def finish_s(self) -> float:
        """Seconds until the request would be finished."""
        return self.wait_s + self.serve_s


class TooLateError(RoutingError):
    """No holder would finish the request in time.

    `estimate` is the best holder's; after `retry_after_s` its queue may be short enough.
    """

    def __init__(self, estimate: Estimate, demand: Demand) -> None:
        super().__init__(
            f"the request would finish in {estimate.finish_s:.2f} s at the soonest, {estimate.wait_s:.2f} s"
            f" of it waiting, and its deadline is in {demand.remaining_s:.2f} s"
        )
        self.estimate = estimate
        self.retry_after_s = retry_after_s(estimate, demand)


def estimate(load: ReplicaLoad | None, sent_since: float, max_tokens: int) -> Estimate | None:
    """How long a further request would take at this replica.

    None when nobody waits there or its rates are not known. `sent_since` is how many requests more
    than reported it has, see `LoadView.sent_since`. An output is taken to be as long as they usually
    are there, `max_tokens` at most.
    """
    if load is None or load.waiting == 0 or load.starts_per_s <= 0:
        return None
    ahead = max(0.0, load.waiting + sent_since)
    num_tokens = min(float(max_tokens), load.output_tokens) if load.output_tokens > 0 else 0.0
    return Estimate(wait_s=(ahead + 1) / load.starts_per_s, serve_s=num_tokens * load.token_s)


def is_late(found: Estimate | None, remaining_s: float) -> bool:
    """Whether so long an estimate is too long; one that is not known never is."""
    return found is not None and found.finish_s * HEADROOM > remaining_s


def retry_after_s(found: Estimate, demand: Demand) -> float:
    """Seconds until the wait may be short enough, if nobody else comes."""
    excess_s = found.finish_s - demand.remaining_s / HEADROOM
    return min(max(min(excess_s, found.wait_s), MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)


def choose_in_time(
    chooser: Chooser, request: RouteRequest, table: RoutingTable, view: LoadView, demand: Demand
) -> Decision:
    """The chooser's replica, or another holder if that one would be late and another would not.

    TooLateError when all would be late; the chooser's errors besides.
    """
    decision = chooser.choose(request, table, view)
    load = view.loads.get(decision.replica_id)
    # The common case, on every request's path: nobody waits.
    if load is None or load.waiting == 0:
        return decision
    if not is_late(estimate(load, view.sent_since(load), demand.max_tokens), demand.remaining_s):
        return decision
    late, soonest = set(request.exclude), None
    for replica_id in decision.candidates:
        load = view.loads.get(replica_id)
        found = None if load is None else estimate(load, view.sent_since(load), demand.max_tokens)
        if found is None or not is_late(found, demand.remaining_s):
            continue
        late.add(replica_id)
        if soonest is None or found.finish_s < soonest.finish_s:
            soonest = found
    if soonest is not None and late.issuperset(decision.candidates):
        raise TooLateError(soonest, demand)
    other = chooser.choose(request._replace(exclude=frozenset(late)), table, view)
    return other._replace(reason=f"in-time:{other.reason.removeprefix('retry:')}")
