"""One replica of a simulated cluster: its model, moved on only when somebody looks, and its load reports.

What a router knows of a replica follows from the replica's state at a few instants: when a report is
sampled, and when the end of a stream is sent. So the model is advanced to just these, in order, at the time
when a router asks, and a replica that nobody asks about costs nothing.
"""

from collections import deque
from dataclasses import dataclass, replace

from loraserve.engines.replica_model.log import ReplicaLog
from loraserve.engines.replica_model.model import ReplicaModel
from loraserve.engines.replica_model.sequence import Sequence
from loraserve.simulator.agenda import FAR_PS
from loraserve.simulator.ledger import OK, Ledger
from loraserve.simulator.scenario import ReplicaSetup
from placement.latency import StepCost
from placement.routing.chooser import OwnRequests, RankLoad, ReplicaLoad
from placement.types import ReplicaId, ReplicaSpec, VersionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What every replica's reports and messages take, in picoseconds, a report no less than a message; how
    many routers it hears, whether it fetches adapters on demand, and whether reports and books tell requests
    of different ranks apart, which only some routing policies want."""

    report_interval_ps: int
    report_delay_ps: int
    network_delay_ps: int
    num_routers: int
    on_demand: bool
    by_rank: bool


OUTPUTS_REMEMBERED = 64
"""As many as a live replica's meter averages over."""


class Means:
    """The mean lengths of the requests that ended lately."""

    __slots__ = ("_number", "output_tokens", "prompt_tokens")

    def __init__(self) -> None:
        self._number = 0
        self.prompt_tokens = 0.0
        self.output_tokens = 0.0

    def add(self, sequence: Sequence) -> None:
        """One more has ended."""
        self._number = min(self._number + 1, OUTPUTS_REMEMBERED)
        self.prompt_tokens += (sequence.prompt_tokens - self.prompt_tokens) / self._number
        self.output_tokens += (sequence.output_tokens - self.output_tokens) / self._number


class Site:
    """A replica in all its lives. `own[r]` is what router r has in flight here, `loads[r]` the last report
    that it has seen; both hold until `news_ps`, when somebody has to `look` again. `own_ranks[r]` is what
    `own[r]` is made of, () if nobody wants that. `model` is None while the replica is down.

    `held` are the versions in its pool but for those that it is `dropping`, `fetching` those on their way.
    """

    __slots__ = (
        "_interval_ps",
        "_ledger",
        "_means",
        "_network_ps",
        "_num_routers",
        "_on_demand",
        "_phase_ps",
        "_reached_ps",
        "_report_ps",
        "_reports",
        "_setup",
        "_tick_ps",
        "capacity_tokens",
        "down_until_ps",
        "dropping",
        "fetching",
        "has_small_pool",
        "held",
        "index",
        "life",
        "loads",
        "logs",
        "model",
        "news_ps",
        "num_sent",
        "own",
        "own_ranks",
        "replica_id",
    )

    def __init__(
        self, index: int, setup: ReplicaSetup, timing: Timing, ledger: Ledger, *, phase_ps: int
    ) -> None:
        self.index = index
        self.replica_id: ReplicaId = setup.spec.replica_id
        self.capacity_tokens = setup.limits.kv_blocks * setup.limits.block_tokens
        self.has_small_pool = setup.limits.pool_adapters > 0 or setup.limits.pool_bytes > 0
        self._setup = setup
        self._ledger = ledger
        self._interval_ps = timing.report_interval_ps
        self._report_ps = timing.report_delay_ps
        self._network_ps = timing.network_delay_ps
        self._num_routers = timing.num_routers
        self._on_demand = timing.on_demand
        self._phase_ps = phase_ps
        self._tick_ps = phase_ps
        self._reached_ps = -1
        self._reports: deque[tuple[int, int, int, int, float, tuple[RankLoad, ...]]] = deque()
        self._means = Means() if timing.by_rank else None
        self.own = [0] * timing.num_routers
        self.own_ranks = tuple([OwnRequests() for _ in self.own]) if timing.by_rank else ()
        self.loads: list[ReplicaLoad | None] = [None] * timing.num_routers
        self.news_ps = -1
        self.num_sent = 0
        self.life = 0
        self.down_until_ps = -1
        self.logs: list[ReplicaLog] = []
        self.held: set[VersionId] = set()
        self.dropping: set[VersionId] = set()
        self.fetching: set[VersionId] = set()
        self.model: ReplicaModel | None = None

    # -- its life ------------------------------------------------------------------------------

    def start(self, at_ps: int) -> ReplicaModel:
        """Begin a life, with nothing in it."""
        log = ReplicaLog()
        self.logs.append(log)
        self.model = ReplicaModel(self._setup.limits, self._setup.cost, log=log)
        if self._means is not None:
            self._means = Means()
        self.life += 1
        periods = -(-(at_ps - self._phase_ps) // self._interval_ps)
        self._tick_ps = self._phase_ps + max(0, periods) * self._interval_ps
        self._reached_ps = at_ps - 1
        self.news_ps = -1
        return self.model

    def set_max_lora_rank(self, rank: int) -> None:
        """What the engine is started with the next time: what it admits, and what it charges for."""
        setup = self._setup
        self._setup = replace(
            setup,
            spec=replace(setup.spec, max_lora_rank=rank),
            cost=replace(setup.cost, max_lora_rank=rank),
        )

    @property
    def cost(self) -> StepCost:
        """What its steps cost."""
        return self._setup.cost

    @property
    def spec(self) -> ReplicaSpec:
        """What the placement may give it."""
        return self._setup.spec

    def die(self, at_ps: int) -> list[Sequence]:
        """End a life; what it had, with what was drawn. What had ended by then is heard."""
        model = self.settle(at_ps)
        if model is None:
            return []
        lost = model.fail(at_ps)
        self._hear(model, at_ps)
        self.model = None
        self.own = [0] * self._num_routers
        self.loads = [None] * self._num_routers
        for own_ranks in self.own_ranks:
            own_ranks.clear()
        self._reports.clear()
        for versions in (self.held, self.dropping, self.fetching):
            versions.clear()
        return lost

    def sequences(self) -> list[Sequence]:
        """What is in the batch, in its queue or waits for its adapter; not what is on its way here."""
        model = self.model
        return [] if model is None else [*model.batch.running, *model.batch.waiting, *model.gate.sequences()]

    def give_up(self, sequence: Sequence, at_ps: int) -> bool:
        """Let go of a request that goes on elsewhere, with what it has drawn; False if it is not here."""
        model = self.settle(at_ps)
        if model is None or not model.cancel(sequence, at_ps):
            return False
        router = sequence.request % self._num_routers
        self.own[router] -= 1
        if self.own_ranks:
            self.own_ranks[router].end(sequence.version, sequence.rank)
        return True

    def finish(self) -> None:
        """Let it finish what it has, when nothing comes any more."""
        if self.model is not None:
            self.model.advance(FAR_PS)
            self._hear(self.model, FAR_PS)

    # -- what routers do -----------------------------------------------------------------------

    def accepts(self, version: VersionId) -> bool:
        """Whether it takes requests for the version, which it may have to fetch if it does that on demand."""
        if self._on_demand:
            return version not in self.dropping
        return version in self.held

    def send(self, sequence: Sequence, router: int, at_ps: int) -> None:
        """A router sends a request; it arrives after the network's delay."""
        model = self.model
        assert model is not None
        model.submit(sequence, at_ps + self._network_ps)
        answer_ps = at_ps + 2 * self._network_ps + self._setup.cost.base
        if answer_ps < self.news_ps:
            self.news_ps = answer_ps
        self.own[router] += 1
        if self.own_ranks:
            self.own_ranks[router].send(sequence.version, sequence.rank, sequence.prompt_tokens)
        self.num_sent += 1

    def look(self, now_ps: int) -> None:
        """Bring `own` and `loads` to what routers know at `now_ps`, which never goes back."""
        model = self.model
        if model is None:
            self.news_ps = FAR_PS
            return
        heard_ps = now_ps - self._network_ps
        if model.quiet_ps <= heard_ps:
            # As `_reach` does, without the call.
            if self._tick_ps <= heard_ps:
                self._sample(model, heard_ps, now_ps)
            if self._reached_ps < heard_ps:
                self._reached_ps = heard_ps
                model.advance(heard_ps)
        elif self._tick_ps <= now_ps - self._report_ps:
            # Nothing has ended, and later samples can be taken when they are seen.
            self._sample(model, now_ps - self._report_ps, now_ps)
        reports = self._reports
        if reports and reports[0][0] <= now_ps:
            # Of several that have come since the last look only the last counts.
            while len(reports) > 1 and reports[1][0] <= now_ps:
                reports.popleft()
            if model.finished:
                self._hear(model, reports[0][0] - self._network_ps)
            self._see(reports.popleft())
        if model.finished:
            self._hear(model, heard_ps)
        news_ps = (model.finished[0].last_ps if model.finished else model.next_end_ps()) + self._network_ps
        seen_ps = reports[0][0] if reports else self._tick_ps + self._report_ps
        self.news_ps = news_ps if news_ps < seen_ps else seen_ps

    def settle(self, now_ps: int) -> ReplicaModel | None:
        """Bring the model itself to `now_ps`, as for something that happens at the replica."""
        model = self.model
        if model is None:
            return None
        self.news_ps = -1
        self._reach(model, now_ps, now_ps)
        return model

    def _reach(self, model: ReplicaModel, until_ps: int, now_ps: int) -> None:
        """Move the model on, by way of the samples that are due."""
        if self._tick_ps <= until_ps:
            self._sample(model, until_ps, now_ps)
        if self._reached_ps < until_ps:
            self._reached_ps = until_ps
            model.advance(until_ps)

    def _sample(self, model: ReplicaModel, until_ps: int, now_ps: int) -> None:
        """Take the reports due by `until_ps`, but for those that are outdated before anybody sees them."""
        tick_ps, interval_ps = self._tick_ps, self._interval_ps
        skipped = (now_ps - self._report_ps - tick_ps) // interval_ps
        if skipped > 0:
            tick_ps += skipped * interval_ps
        while tick_ps <= until_ps:
            model.advance(tick_ps)
            self._reached_ps = tick_ps
            ranks = () if self._means is None else model.rank_loads()
            self._reports.append((tick_ps + self._report_ps, *model.load(), ranks))
            tick_ps += interval_ps
        self._tick_ps = tick_ps

    def _see(self, report: tuple[int, int, int, int, float, tuple[RankLoad, ...]]) -> None:
        """A report comes to the routers, each of which notes what it has here at this moment."""
        _, running, waiting, tokens, usage, ranks = report
        replica_id, loads, num_routers, means = self.replica_id, self.loads, self._num_routers, self._means
        prompt, output = (0.0, 0.0) if means is None else (means.prompt_tokens, means.output_tokens)
        for router, own in enumerate(self.own):
            # By position, which is much faster; its age and its rates are not known, and count as 0.
            loads[router] = ReplicaLoad(
                replica_id,
                running,
                waiting,
                tokens,
                usage,
                0.0,
                own,
                num_routers,
                0.0,
                0.0,
                output,
                ranks,
                prompt,
            )
        for own_ranks in self.own_ranks:
            own_ranks.report()

    def _hear(self, model: ReplicaModel, until_ps: int) -> None:
        """Routers hear the end of the streams that ended by `until_ps`."""
        finished = model.finished
        heard = finished
        if finished and finished[-1].last_ps > until_ps:
            heard = [sequence for sequence in finished if sequence.last_ps <= until_ps]
        ledger, delay_ps, own, num_routers = self._ledger, self._network_ps, self.own, self._num_routers
        means = self._means
        for sequence in heard:
            row = sequence.request
            if ledger.first_ps[row] < 0:
                ledger.first_ps[row] = sequence.first_ps + delay_ps
            ledger.end_ps[row] = sequence.last_ps + delay_ps
            ledger.drawn[row] = sequence.drawn
            ledger.outcome[row] = OK
            own[row % num_routers] -= 1
            if means is not None:
                means.add(sequence)
                self.own_ranks[row % num_routers].end(sequence.version, sequence.rank)
        ledger.num_ended += len(heard)
        del finished[: len(heard)]
