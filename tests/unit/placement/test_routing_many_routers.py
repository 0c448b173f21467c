"""Several routers on one set of replicas, in virtual time: together they balance about as one would.

Bursts of requests reach random routers; the replicas report every 100 ms, a few milliseconds late.
Each router has a real load book and a real chooser; only the replicas are queues of fixed slots.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from random import Random

import pytest

from loraserve.clock import ManualClock
from loraserve.router.loads import LoadBook
from loraserve.rpc.table_codec import LoadReport
from placement.routing.chooser import Chooser, RouteRequest
from placement.table import RoutingTable, TableReplica
from placement.types import ReplicaId

NAMES = [ReplicaId(f"r{index}") for index in range(4)]
SLOTS = 16
SERVICE_S = 0.5
BURST = 24
LOAD = 0.85
REPORT_S = 0.1
DELAY_S = 0.004
SECONDS = 10.0
TABLE = RoutingTable(
    version=1,
    base_model="base",
    replicas={name: TableReplica(replica_id=name, address="127.0.0.1:1", max_lora_rank=8) for name in NAMES},
    entries={},
)


@dataclass(slots=True)
class Queue:
    """A replica: so many requests run at once, the others wait."""

    running: int = 0
    waiting: deque[int] = field(default_factory=deque)
    sequence: int = 0

    @property
    def outstanding(self) -> int:
        return self.running + len(self.waiting)


class Simulation:
    """One run; `excess` samples by how many requests the fullest replica is above the mean."""

    def __init__(self, num_routers: int, seed: int, *, told: bool, omniscient: bool = False) -> None:
        self.rng = Random(seed)
        self.clock = ManualClock()
        self.told_routers = num_routers if told else 1
        self.omniscient = omniscient
        self.in_flight: list[dict[ReplicaId, int]] = [
            dict.fromkeys(NAMES, 0) for _ in range(1 if omniscient else num_routers)
        ]
        self.books = [LoadBook(clock=self.clock, in_flight=own) for own in self.in_flight]
        self.choosers = [Chooser("least-outstanding", seed * 100 + index) for index in range(num_routers)]
        self.replicas = [Queue() for _ in NAMES]
        self.excess: list[float] = []
        self.longest_queue = 0
        self._order = count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def run(self) -> "Simulation":
        self._plan_arrivals()
        for index in range(len(NAMES)):
            self._after(self.rng.random() * REPORT_S, partial(self._report, index))
        while self._events:
            at_s, _, event = heapq.heappop(self._events)
            if at_s > SECONDS:
                break
            self.clock.advance(max(0.0, at_s - self.clock.now_s()))
            event()
        return self

    def p99_excess(self) -> float:
        return sorted(self.excess)[int(0.99 * len(self.excess))]

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.clock.now_s() + seconds, next(self._order), event))

    def _plan_arrivals(self) -> None:
        bursts_per_s = LOAD * SLOTS * len(NAMES) / SERVICE_S / BURST
        at_s = 0.0
        while at_s < SECONDS:
            at_s += self.rng.expovariate(bursts_per_s)
            for _ in range(self.rng.randint(1, 2 * BURST - 1)):
                self._after(at_s + self.rng.random() * 0.03, self._arrive)

    def _arrive(self) -> None:
        router = self.rng.randrange(len(self.books))
        decision = self.choosers[router].choose(RouteRequest(adapter=None), TABLE, self.books[router].view())
        index = NAMES.index(decision.replica_id)
        self.in_flight[router][NAMES[index]] += 1
        self._after(0.0 if self.omniscient else 0.001, partial(self._land, index, router))

    def _land(self, index: int, router: int) -> None:
        replica = self.replicas[index]
        if replica.running < SLOTS:
            self._start(index, router)
        else:
            replica.waiting.append(router)
        outstanding = [one.outstanding for one in self.replicas]
        self.excess.append(max(outstanding) - sum(outstanding) / len(outstanding))
        self.longest_queue = max(self.longest_queue, len(replica.waiting))

    def _start(self, index: int, router: int) -> None:
        self.replicas[index].running += 1
        self._after(SERVICE_S * self.rng.uniform(0.5, 1.5), partial(self._finish, index, router))

    def _finish(self, index: int, router: int) -> None:
        replica = self.replicas[index]
        replica.running -= 1
        self.in_flight[router][NAMES[index]] -= 1
        if replica.waiting:
            self._start(index, replica.waiting.popleft())

    def _report(self, index: int) -> None:
        replica = self.replicas[index]
        replica.sequence += 1
        report = LoadReport(
            replica_id=NAMES[index],
            incarnation="a",
            sequence=replica.sequence,
            running=replica.running,
            waiting=len(replica.waiting),
            outstanding_tokens=0,
            kv_cache_usage=0.0,
            routers=self.told_routers,
        )
        if not self.omniscient:
            for book in self.books:
                delay_s = DELAY_S * self.rng.uniform(0.5, 1.5)
                self._after(delay_s, partial(_deliver, book, report))
        self._after(REPORT_S, partial(self._report, index))


def _deliver(book: LoadBook, report: LoadReport) -> None:
    assert book.record(report)


@pytest.mark.parametrize(("num_routers", "at_most_of_without"), [(2, 0.75), (4, 0.4), (8, 0.25)])
def test_many_routers_do_not_herd(num_routers: int, at_most_of_without: float) -> None:
    seeds = (1, 2, 3)
    alone = [Simulation(num_routers, seed, told=False, omniscient=True).run() for seed in seeds]
    untold = [Simulation(num_routers, seed, told=False).run() for seed in seeds]
    told = [Simulation(num_routers, seed, told=True).run() for seed in seeds]
    excess, queue = {}, {}
    for name, runs in (("one that sees all", alone), ("without", untold), ("with", told)):
        excess[name] = sum(run.p99_excess() for run in runs) / len(runs)
        queue[name] = sum(run.longest_queue for run in runs) / len(runs)
    figures = f"{num_routers} routers: p99 of fullest over mean {excess}, longest queue {queue}"
    print(figures)
    assert excess["with"] <= at_most_of_without * excess["without"], figures
    assert excess["with"] <= excess["one that sees all"] + 3, figures
    assert queue["with"] <= queue["one that sees all"] + 12, figures
    assert queue["with"] <= queue["without"], figures
