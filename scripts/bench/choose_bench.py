"""Measures routing decisions of `marginal-cost`: medians, in microseconds.

Between two decisions happens what happens between two requests of a busy router: one request is sent, one
ends, and reports come as often per request as with 100 requests/s per 8 replicas and 10 reports/s of each.
After each of these the chooser prepares, as the router has it do between requests. With `prepares` False it
does not, and each decision has to work out by itself what has changed.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from statistics import median
from time import perf_counter

from placement.latency import LatencyModel, RankKernel
from placement.routing.chooser import Chooser, LoadView, OwnRequests, RankLoad, ReplicaLoad, RouteRequest
from placement.routing.replica_cost import ReplicaCost
from placement.table import RoutingTable, TableEntry, TableReplica
from placement.types import AdapterName, Holder, ReplicaId, VersionId

RANKS = (8, 16, 32, 64, 128)
DECISIONS = 5_000
REPORTS_PER_DECISION = 0.8
PROMPT_TOKENS = 700


def both_us(
    sizes: Sequence[int] = (8, 256), *, policy: str = "marginal-cost", decisions: int = DECISIONS
) -> dict[str, dict[str, dict[str, float]]]:
    """`routing_us` by number of holders, prepared and unprepared."""
    return {
        str(size): {
            name: routing_us(size, policy=policy, decisions=decisions, prepares=name == "prepared")
            for name in ("prepared", "unprepared")
        }
        for size in sizes
    }


def routing_us(
    num_holders: int,
    *,
    policy: str = "marginal-cost",
    decisions: int = DECISIONS,
    prepares: bool = True,
) -> dict[str, float]:
    """The medians of `choose`, `send`, `end` and `report`, each with what is prepared because of it; and
    `request`, that of all of them together per request."""
    bench = _Bench(num_holders, policy, prepares=prepares)
    for _ in range(decisions):
        bench.step()
    return {
        **{name: median(found) for name, found in bench.taken_us.items() if found},
        "request": median(bench.request_us),
    }


class _Bench:
    def __init__(self, num_holders: int, policy: str, *, prepares: bool) -> None:
        self._rng = rng = Random(num_holders)
        self._table = _table(num_holders)
        self._names = list(self._table.replicas)
        self._loads: dict[ReplicaId, ReplicaLoad | None] = {name: _load(name, rng) for name in self._names}
        self._own = {name: OwnRequests() for name in self._names}
        self._view = LoadView(loads=self._loads, in_flight={}, own=self._own)
        self._chooser, self._prepares = Chooser(policy, 0), prepares
        self._requests = [RouteRequest(name, PROMPT_TOKENS) for name in self._table.entries]
        self._sent: list[tuple[ReplicaId, VersionId | None, int]] = []
        self._begun_s = 0.0
        self.taken_us: dict[str, list[float]] = {"choose": [], "send": [], "end": [], "report": []}
        self.request_us: list[float] = []

    def step(self) -> None:
        """One request, and what else happens until the next."""
        rng, sent = self._rng, self._sent
        self.request_us.append(0.0)
        request = self._requests[len(self.request_us) % len(self._requests)]
        self._begin()
        decision = self._chooser.choose(request, self._table, self._view)
        self._note("choose")
        self._begin()
        self._own[decision.replica_id].send(decision.version_id, decision.rank, PROMPT_TOKENS)
        self._prepare(decision.replica_id)
        self._note("send")
        sent.append((decision.replica_id, decision.version_id, decision.rank))
        if len(sent) > 4 * len(self._names):
            replica, version, rank = sent.pop(rng.randrange(len(sent)))
            self._begin()
            self._own[replica].end(version, rank)
            self._prepare(replica)
            self._note("end")
        if rng.random() < REPORTS_PER_DECISION:
            name = rng.choice(self._names)
            load = _load(name, rng)
            self._begin()
            self._loads[name] = load
            self._own[name].report()
            self._prepare(name)
            self._note("report")

    def _prepare(self, replica: ReplicaId) -> None:
        if self._prepares:
            self._chooser.prepare(replica, self._view)

    def _begin(self) -> None:
        self._begun_s = perf_counter()

    def _note(self, what: str) -> None:
        taken_us = (perf_counter() - self._begun_s) * 1e6
        self.taken_us[what].append(taken_us)
        self.request_us[-1] += taken_us


def _table(num_holders: int) -> RoutingTable:
    model = LatencyModel(
        kernel=RankKernel.PADDED_BATCH,
        base_ms=31.8,
        prefill_token_ms=0.0568,
        decode_rank_ms=0.0039,
        prefill_rank_ms=0.000467,
    )
    cost = ReplicaCost(latency=model, max_num_seqs=32, kv_tokens=107_200, adapter_slots=32)
    first = TableReplica(replica_id=ReplicaId(""), address="", max_lora_rank=128, cost=cost)
    names = [ReplicaId(f"replica-{index}") for index in range(num_holders)]
    holders = tuple(Holder(replica_id=name, share=1 / num_holders) for name in names)
    adapters = {AdapterName(f"adapter-{rank}"): rank for rank in RANKS}
    return RoutingTable(
        version=1,
        replicas={name: replace(first, replica_id=name) for name in names},
        entries={
            name: TableEntry(name=name, version_id=VersionId(f"{name}@0"), rank=rank, holders=holders)
            for name, rank in adapters.items()
        },
    )


def _load(name: ReplicaId, rng: Random) -> ReplicaLoad:
    ranks = tuple([RankLoad(rank, rng.randrange(6), rng.randrange(2), 700) for rank in RANKS])
    running = sum(one.running for one in ranks)
    waiting = sum(one.waiting for one in ranks)
    return ReplicaLoad(name, running, waiting, 0, 0.3, output_tokens=150.0, ranks=ranks, prompt_tokens=700.0)
