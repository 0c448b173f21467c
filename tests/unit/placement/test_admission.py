"""Early refusal: only who would be late, never from an idle replica, and goodput holds under overload."""

import heapq
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.clock import ManualClock
from loraserve.engines.replica_model.model import ReplicaModel
from loraserve.engines.replica_model.sequence import ReplicaLimits, Sequence
from loraserve.replica.meter import Meter, Progress
from loraserve.router.loads import LoadBook
from loraserve.rpc.table_codec import LoadReport
from placement.latency import PS_PER_S, LatencyModel, StepCost
from placement.routing.admission import Demand, TooLateError, choose_in_time, estimate, is_late
from placement.routing.chooser import Chooser, LoadView, ReplicaLoad, RouteRequest
from placement.table import RoutingTable, TableReplica
from placement.types import ReplicaId

NAMES = [ReplicaId("r0"), ReplicaId("r1")]
TABLE = RoutingTable(
    version=1,
    base_model="base",
    replicas={name: TableReplica(replica_id=name, address="127.0.0.1:1", max_lora_rank=8) for name in NAMES},
    entries={},
)
BASE = RouteRequest(adapter=None)


def make_load(
    name: str,
    *,
    waiting: int,
    starts_per_s: float = 10.0,
    token_s: float = 0.05,
    output_tokens: float = 20.0,
    running: int = 8,
) -> ReplicaLoad:
    return ReplicaLoad(
        replica_id=ReplicaId(name),
        running=running,
        waiting=waiting,
        outstanding_tokens=0,
        kv_cache_usage=0.0,
        starts_per_s=starts_per_s,
        token_s=token_s,
        output_tokens=output_tokens,
    )


def seen(*loads: ReplicaLoad) -> LoadView:
    return LoadView(loads={load.replica_id: load for load in loads}, in_flight={})


loads = st.builds(
    make_load,
    st.sampled_from(NAMES),
    waiting=st.integers(0, 200),
    starts_per_s=st.floats(0.0, 100.0),
    token_s=st.floats(0.0, 1.0),
    output_tokens=st.floats(0.0, 500.0),
)
demands = st.builds(Demand, st.integers(1, 1000), st.floats(0.001, 600.0))
sent = st.floats(-50.0, 50.0)


def late(load: ReplicaLoad, sent_since: float, demand: Demand) -> bool:
    return is_late(estimate(load, sent_since, demand.max_tokens), demand.remaining_s)


@given(loads, sent, demands, st.integers(1, 100), st.integers(0, 500), st.floats(0.0, 100.0))
def test_a_late_request_stays_late_with_more_load_more_tokens_or_less_time(
    load: ReplicaLoad, sent_since: float, demand: Demand, more: int, longer: int, sooner_s: float
) -> None:
    if not late(load, sent_since, demand):
        return
    assert late(load, sent_since + more, demand)
    assert late(load, sent_since, demand._replace(max_tokens=demand.max_tokens + longer))
    assert late(load, sent_since, demand._replace(remaining_s=demand.remaining_s - sooner_s))
    busier = make_load(
        load.replica_id,
        waiting=load.waiting + more,
        starts_per_s=load.starts_per_s / 2 or load.starts_per_s,
        token_s=load.token_s * 2,
        output_tokens=load.output_tokens,
    )
    assert late(busier, sent_since, demand)


@given(loads, loads, demands, st.integers(0, 99))
def test_nothing_is_refused_or_moved_to_who_is_late_while_a_holder_is_in_time(
    one: ReplicaLoad, two: ReplicaLoad, demand: Demand, seed: int
) -> None:
    view = seen(one, two)
    everyone_late = all(name in view.loads and late(view.loads[name] or one, 0.0, demand) for name in NAMES)
    chooser = Chooser("weighted-share", seed)
    if everyone_late:
        with pytest.raises(TooLateError) as refused:
            choose_in_time(chooser, BASE, TABLE, view, demand)
        assert 0.1 <= refused.value.retry_after_s <= 60
        assert refused.value.estimate.finish_s > demand.remaining_s / 2
        return
    chosen = view.loads.get(choose_in_time(chooser, BASE, TABLE, view, demand).replica_id)
    assert chosen is None or not late(chosen, 0.0, demand)


@given(demands, st.integers(0, 10_000), sent)
def test_an_idle_or_unknown_replica_is_never_refused(demand: Demand, running: int, sent_since: float) -> None:
    assert not late(make_load("r0", waiting=0, running=running, starts_per_s=0.001), sent_since, demand)
    assert not late(make_load("r0", waiting=9, starts_per_s=0.0), sent_since, demand)
    assert estimate(None, sent_since, demand.max_tokens) is None


def test_the_estimate_is_the_queue_over_its_rate_and_the_usual_output() -> None:
    load = make_load("r0", waiting=9, starts_per_s=5.0, token_s=0.1, output_tokens=30.0)
    assert estimate(load, 10.0, 1000) == (4.0, 3.0)
    assert estimate(load, -100.0, 10) == (0.2, 1.0)


def test_a_request_goes_to_the_holder_that_is_in_time() -> None:
    view = seen(make_load("r0", waiting=2, starts_per_s=1.0, running=2), make_load("r1", waiting=9))
    decision = choose_in_time(Chooser("least-outstanding", 0), BASE, TABLE, view, Demand(20, 3.5))
    assert (decision.replica_id, decision.reason) == ("r1", "in-time:only-holder")
    with pytest.raises(
        TooLateError, match=r"finish in 2.00 s at the soonest, 1.00 s of it waiting"
    ) as refused:
        choose_in_time(Chooser("least-outstanding", 0), BASE, TABLE, view, Demand(20, 2.1))
    assert refused.value.retry_after_s == pytest.approx(0.8)


class Replica:
    """A replica model that takes one step at a time, and a meter, in virtual time."""

    LIMITS = ReplicaLimits(kv_blocks=512, max_num_seqs=8, max_num_batched_tokens=512)
    COST = StepCost.of(LatencyModel(base_ms=25.0, prefill_token_ms=0.2, row_ms=2.0))

    def __init__(self, name: ReplicaId, clock: ManualClock) -> None:
        self.name = name
        self.model = ReplicaModel(self.LIMITS, self.COST, max_run_steps=1)
        self.meter = Meter(clock)
        self.progress: dict[Sequence, Progress] = {}
        self.sequence = 0
        self.stepping = False

    def report(self) -> LoadReport:
        self.sequence += 1
        running, waiting = self.model.running, self.model.waiting + self.model.coming
        rates = self.meter.rates(running=running, waiting=waiting)
        return LoadReport(
            replica_id=self.name,
            incarnation="a",
            sequence=self.sequence,
            running=running,
            waiting=waiting,
            outstanding_tokens=0,
            kv_cache_usage=0.0,
            **rates._asdict(),
        )


class Overload:
    """Poisson arrivals at one router in front of two replicas; `good` counts who finished in time."""

    DEADLINE_S = 2.5

    def __init__(self, seed: int, *, per_s: float, seconds: float, early_refusal: bool) -> None:
        self.rng = Random(seed)
        self.clock = ManualClock()
        self.per_s, self.seconds, self.early_refusal = per_s, seconds, early_refusal
        self.in_flight = dict.fromkeys(NAMES, 0)
        self.book = LoadBook(clock=self.clock, in_flight=self.in_flight)
        self.chooser = Chooser("least-outstanding", seed)
        self.replicas = {name: Replica(name, self.clock) for name in NAMES}
        self.good = self.late = self.refused = 0
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def run(self) -> "Overload":
        for arrival_s in self._arrivals():
            self._after(arrival_s, self._arrive)
        for name in NAMES:
            self._after(0.0, partial(self._report, name))
        while self._events and self.clock.now_s() < self.seconds:
            at_s, _, event = heapq.heappop(self._events)
            self.clock.advance(max(0.0, at_s - self.clock.now_s()))
            event()
        return self

    def goodput_per_s(self) -> float:
        return self.good / self.seconds

    def _arrivals(self) -> Iterator[float]:
        at_s = 0.0
        while at_s < self.seconds:
            at_s += self.rng.expovariate(self.per_s)
            yield at_s

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.now_s() + seconds, next(self._order), event))

    def _report(self, name: ReplicaId) -> None:
        assert self.book.record(self.replicas[name].report())
        self._after(0.1, partial(self._report, name))

    def _arrive(self) -> None:
        view = self.book.view()
        # Nobody knows before how long an output gets; most stay below their max_tokens.
        output_tokens = self.rng.randint(10, 30)
        try:
            if self.early_refusal:
                decision = choose_in_time(self.chooser, BASE, TABLE, view, Demand(40, self.DEADLINE_S))
            else:
                decision = self.chooser.choose(BASE, TABLE, view)
        except TooLateError:
            self.refused += 1
            return
        replica = self.replicas[decision.replica_id]
        self.in_flight[replica.name] += 1
        sequence = Sequence(next(self._order), self.rng.randint(5, 40), output_tokens)
        replica.progress[sequence] = replica.meter.begin()
        replica.model.submit(sequence, self._now_ps(replica))
        self._after(self.DEADLINE_S, partial(self._expire, replica, sequence))
        if not replica.stepping:
            self._step(replica)

    def _now_ps(self, replica: Replica) -> int:
        return max(round(self.clock.now_s() * PS_PER_S), replica.model.now_ps)

    def _step(self, replica: Replica) -> None:
        replica.model.advance(self._now_ps(replica) + 1)
        due_ps = replica.model.next_ps()
        replica.stepping = due_ps is not None
        if due_ps is not None:
            seconds = max(0.0, due_ps / PS_PER_S - self.clock.now_s())
            self._after(seconds, partial(self._stepped, replica, due_ps))

    def _stepped(self, replica: Replica, due_ps: int) -> None:
        model = replica.model
        model.advance(max(due_ps, model.now_ps))
        for sequence in (*model.batch.running, *model.finished):
            drawn = model.drawn(sequence)
            if drawn:
                replica.progress[sequence].step(1)
        for sequence in model.finished:
            replica.progress[sequence].finish(sequence.drawn)
            self.good += 1
            self._leave(replica, sequence)
        model.finished.clear()
        self._step(replica)

    def _expire(self, replica: Replica, sequence: Sequence) -> None:
        if sequence in replica.progress:
            self.late += 1
            replica.model.cancel(sequence, replica.model.now_ps)
            self._leave(replica, sequence)

    def _leave(self, replica: Replica, sequence: Sequence) -> None:
        del replica.progress[sequence]
        self.in_flight[replica.name] -= 1


def test_goodput_holds_at_five_times_the_load_that_can_be_served() -> None:
    capacity_per_s = 18.0
    goodput = {
        (times, refusal): Overload(1, per_s=times * capacity_per_s, seconds=30.0, early_refusal=refusal).run()
        for times in (1, 2, 5)
        for refusal in (True, False)
    }
    figures = {key: (run.goodput_per_s(), run.late, run.refused) for key, run in goodput.items()}
    print(figures)
    peak = max(run.goodput_per_s() for run in goodput.values())
    for times in (1, 2, 5):
        assert goodput[times, True].goodput_per_s() >= 0.9 * peak, figures
    assert goodput[5, False].goodput_per_s() <= 0.5 * peak, figures
