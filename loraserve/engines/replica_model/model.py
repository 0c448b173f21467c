"""One replica in time: requests come in, adapters become active, steps run one after the other.

The one model behind the simulator (virtual time) and the emulated engine (the wall clock): both tell it
what comes when, and move it on with `advance`. It owns no clock and sleeps nowhere.
"""

import math
from collections import deque
from itertools import chain

from loraserve.engines.replica_model.batch import Batch
from loraserve.engines.replica_model.cost import RankMembers
from loraserve.engines.replica_model.gate import AdapterGate
from loraserve.engines.replica_model.log import ReplicaLog
from loraserve.engines.replica_model.run import Run
from loraserve.engines.replica_model.sequence import Phase, ReplicaLimits, Sequence
from placement.latency import StepCost
from placement.routing.chooser import RankLoad
from placement.types import VersionId

ENDLESS = 1 << 62


class ReplicaModel:
    """Continuous batching under a latency model; times are whole picoseconds and never go back.

    A request that comes at the very moment at which a step ends may be in the next step. What is not known
    by `advance(until_ps)` may still come at `until_ps`, so the step that begins then is not planned before
    time moves on: who lets it run by itself calls `advance(next_ps() + 1)`. `max_run_steps` bounds how many
    steps are taken at once; the outcome is the same.
    """

    def __init__(
        self,
        limits: ReplicaLimits,
        cost: StepCost,
        *,
        log: ReplicaLog | None = None,
        max_run_steps: int = ENDLESS,
    ) -> None:
        self.limits = limits
        self.log = ReplicaLog() if log is None else log
        self.batch = Batch(limits, cost, self.log, max_run_steps)
        self.gate = AdapterGate(limits)
        self.finished = self.batch.ended
        self._inbox: deque[tuple[int, Sequence]] = deque()
        self._run = Run()
        self._is_busy = False
        self._begun_ps = 0
        """When the run under way began; between runs, when the last one ended."""
        self._end_ps = 0
        self._until_ps = 0
        self._least_step_ps = cost.base
        self.quiet_ps = 0
        """Before that nothing happens by itself: until then, `advance` changes no more than the time."""

    # -- what others ask -----------------------------------------------------------------------

    @property
    def now_ps(self) -> int:
        """How far time has moved on."""
        return self._until_ps

    @property
    def earliest_ps(self) -> int:
        """No request can come before this: time has moved on, or another was submitted for later."""
        return max(self._until_ps, self._inbox[-1][0]) if self._inbox else self._until_ps

    @property
    def step_end_ps(self) -> int | None:
        """When the step under way ends, None between two."""
        return self._begun_ps + self._run_ps(self._steps_done() + 1) if self._is_busy else None

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self.batch.running)

    @property
    def waiting(self) -> int:
        """Sequences queued for the batch or for their adapter."""
        return len(self.batch.waiting) + len(self.gate)

    @property
    def coming(self) -> int:
        """Sequences submitted for a moment that has not come."""
        return len(self._inbox)

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that the sequences in the batch or its queue will still draw."""
        return self.load()[2]

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks in use, 0 to 1."""
        return self.load()[3]

    @property
    def wanted(self) -> list[VersionId]:
        """The versions that requests wait for and the pool lacks; whoever fetches them clears the list."""
        return self.gate.wanted

    @property
    def evicted(self) -> list[VersionId]:
        """The versions that have made room for others; whoever reads the list clears it."""
        return self.gate.evicted

    def load(self) -> tuple[int, int, int, float]:
        """`running`, `waiting`, `outstanding_tokens` and `kv_usage` in one, as reports want them."""
        batch = self.batch
        done = self._steps_done()
        blocks, tokens = batch.used_blocks, batch.outstanding_tokens
        if done:
            blocks += batch.blocks_to_come(batch.num_steps, done)
            tokens -= done * batch.num_decoding
        waiting = len(batch.waiting)
        if num_outside := len(self.gate):
            waiting += num_outside
            tokens += sum(one.output_tokens - one.drawn for one in self.gate.sequences())
        return len(batch.running), waiting, tokens, blocks / self.limits.kv_blocks

    def rank_loads(self) -> tuple[RankLoad, ...]:
        """The sequences in the batch or its queue by rank, the lowest first."""
        if len(self.gate):
            batch = self.batch
            return RankMembers(chain(batch.running, batch.waiting, self.gate.sequences())).loads()
        return self.batch.rank_loads()

    def drawn(self, sequence: Sequence) -> int:
        """The tokens that the sequence has drawn so far."""
        drawn = self.batch.drawn(sequence)
        return drawn + self._steps_done() if sequence.phase is Phase.DECODE else drawn

    def next_ps(self) -> int | None:
        """When something happens next by itself: a step ends, an adapter becomes active, a request comes."""
        join_ps = self._next_join_ps()
        if self._is_busy:
            return min(join_ps, self._begun_ps + self._run_ps(self._steps_done() + 1))
        if self.batch.waiting or self.batch.running:
            return self._begun_ps
        return join_ps if join_ps < ENDLESS else None

    def next_end_ps(self) -> int:
        """No request here or on its way ends before this, nor does one that is submitted for later than that
        less a step."""
        step_ps, join_ps = self._least_step_ps, self._next_join_ps()
        mine_ps = ENDLESS
        if self._is_busy:
            mine_ps = self._end_ps if self.batch.may_end(self._run) else self._end_ps + step_ps
        elif self.batch.running or self.batch.waiting:
            mine_ps = self._begun_ps + step_ps
        # Who joins is computed in a step that begins no earlier.
        join_ps += step_ps
        return mine_ps if mine_ps < join_ps else join_ps

    # -- what happens --------------------------------------------------------------------------

    def submit(self, sequence: Sequence, at_ps: int) -> None:
        """A request comes at `at_ps`, no earlier than those before it and than time has moved on to.

        ValueError for a request that can never be computed here, and for a time that is past.
        """
        if not self.limits.fits(sequence.prompt_tokens, sequence.output_tokens):
            raise ValueError(
                f"request {sequence.request}: {sequence.prompt_tokens} prompt and {sequence.output_tokens} "
                f"output tokens; the KV cache holds {self.limits.kv_blocks * self.limits.block_tokens}"
            )
        if sequence.prompt_tokens < 1 or sequence.output_tokens <= sequence.drawn:
            raise ValueError(
                f"request {sequence.request}: at least one token of prompt and of output to come"
            )
        if at_ps < self.earliest_ps:
            raise ValueError(f"request {sequence.request}: comes at {at_ps} ps, which is past")
        self._inbox.append((at_ps, sequence))
        if at_ps < self.quiet_ps:
            self.quiet_ps = at_ps

    def bring_forward(self, at_ps: int) -> None:
        """Let the requests that were to come later come at `at_ps`, in their order."""
        self._inbox = deque((min(coming_ps, at_ps), sequence) for coming_ps, sequence in self._inbox)
        self.quiet_ps = 0

    def advance(self, until_ps: int) -> None:
        """Let time pass: every step that ends by `until_ps` is done, and who has ended is in `finished`."""
        if until_ps < self.quiet_ps:
            if until_ps > self._until_ps:
                self._until_ps = until_ps
            return
        run = self._run
        while True:
            if self._is_busy:
                if self._inbox or self.gate.landing:
                    join_ps = self._next_join_ps()
                    if join_ps <= until_ps and join_ps < self._end_ps:
                        self._join(join_ps)
                        continue
                if self._end_ps > until_ps:
                    break
                self._commit(run.steps, self._end_ps)
                self._is_busy = False
            if self._inbox or self.gate.landing:
                self._take_joins(self._begun_ps)
            if self._begun_ps >= until_ps or not self._plan():
                join_ps = self._next_join_ps()
                if join_ps > until_ps:
                    break
                self._begun_ps = join_ps
        if until_ps > self._until_ps:
            self._until_ps = until_ps
        join_ps = self._next_join_ps()
        mine_ps = self._end_ps if self._is_busy else self._begun_ps
        if not self._is_busy and not (self.batch.running or self.batch.waiting):
            mine_ps = ENDLESS
        self.quiet_ps = mine_ps if mine_ps < join_ps else join_ps

    def cancel(self, sequence: Sequence, at_ps: int) -> bool:
        """A request's client has gone: it is out at once, and the step under way goes on without it; False
        if it is not here."""
        self.advance(at_ps)
        for entry in self._inbox:
            if entry[1] is sequence:
                self._inbox.remove(entry)
                sequence.phase = Phase.ENDED
                return True
        if sequence.phase is Phase.ENDED:
            return False
        self._split(at_ps)
        self.batch.remove(sequence, self._run if self._is_busy else None)
        sequence.phase = Phase.ENDED
        if sequence.version is not None:
            self.gate.leave(sequence, at_ps)
            self._wake(at_ps)
        return True

    def hold(self, version: VersionId, rank: int, size_bytes: int, at_ps: int) -> None:
        """The version's weights have come to the host pool; ValueError if they can never fit."""
        self.advance(at_ps)
        self.gate.hold(version, size_bytes, at_ps)
        self._wake(at_ps)

    def release(self, version: VersionId, at_ps: int) -> bool:
        """Drop the version; False while requests name it."""
        self.advance(at_ps)
        released = self.gate.release(version, at_ps)
        self._wake(at_ps)
        return released

    def fail(self, at_ps: int) -> list[Sequence]:
        """The replica dies, and this model with it: every sequence it had, with the tokens drawn so far."""
        self.advance(at_ps)
        self._split(at_ps)
        batch = self.batch
        lost = [*batch.running, *batch.waiting, *self.gate.sequences(), *(one for _, one in self._inbox)]
        for sequence in tuple(batch.running):
            batch.remove(sequence, self._run if self._is_busy else None)
        for sequence in tuple(batch.waiting):
            batch.remove(sequence, None)
        for sequence in lost:
            sequence.phase = Phase.ENDED
        batch.close()
        self._inbox.clear()
        self.gate = AdapterGate(self.limits)
        self._is_busy = False
        self._begun_ps = at_ps
        return lost

    def check_invariants(self) -> None:
        """AssertionError unless sequences, tokens, blocks, bytes and slots add up."""
        self.batch.check_invariants(self._run if self._is_busy else None)
        self.gate.check_invariants()
        versions = {one.version for one in self.batch.running} - {None}
        assert len(versions) <= self.limits.adapter_slots, "more adapters in the batch than slots"

    # -- time ----------------------------------------------------------------------------------

    def _run_ps(self, steps: int) -> int:
        run = self._run
        return steps * run.step_ps + run.growth_ps * (steps * (steps - 1) // 2)

    def _steps_by(self, at_ps: int) -> int:
        """How many steps of the run under way have ended by then, not more than it has."""
        run, passed_ps = self._run, at_ps - self._begun_ps
        if run.growth_ps:
            # The stable form of the quadratic's root; floats are off by one step at most.
            half = run.step_ps - run.growth_ps / 2
            steps = int(2 * passed_ps / (half + math.sqrt(half * half + 2 * run.growth_ps * passed_ps)))
            while self._run_ps(steps) > passed_ps:
                steps -= 1
            while self._run_ps(steps + 1) <= passed_ps:
                steps += 1
        else:
            steps = passed_ps // run.step_ps
        return min(steps, run.steps)

    def _steps_done(self) -> int:
        return self._steps_by(self._until_ps) if self._is_busy and self._until_ps > self._begun_ps else 0

    def _plan(self) -> bool:
        """Begin the next run now, if there is anything to compute."""
        batch = self.batch
        if not (batch.running or batch.waiting) or not batch.plan(self._run):
            return False
        self._is_busy = True
        self._end_ps = self._begun_ps + self._run_ps(self._run.steps)
        return True

    def _commit(self, steps: int, end_ps: int) -> None:
        ended = self.finished
        num_before = len(ended)
        self.batch.commit(self._run, steps, self._begun_ps, end_ps)
        self._begun_ps = end_ps
        if len(ended) > num_before:
            for sequence in ended[num_before:]:
                if sequence.version is not None:
                    self.gate.leave(sequence, end_ps)
            self._enter()

    def _split(self, at_ps: int) -> None:
        """Make the step under way a run of its own, which may lose rows; one that only begins now is not."""
        self.quiet_ps = 0
        if not self._is_busy or self._run.steps == 1:
            return
        run = self._run
        steps = self._steps_by(at_ps)
        if steps:
            self._commit(steps, self._begun_ps + self._run_ps(steps))
            if self._begun_ps == at_ps:
                self._is_busy = False
                return
            run.step_ps += run.growth_ps * steps
            self.batch.take_step_blocks(run)
        run.steps = 1
        self._end_ps = self._begun_ps + run.step_ps

    # -- joining -------------------------------------------------------------------------------

    def _next_join_ps(self) -> int:
        """When the next request comes or the next adapter becomes active; `ENDLESS` if nothing does."""
        landing = self.gate.landing
        coming_ps = self._inbox[0][0] if self._inbox else ENDLESS
        return coming_ps if not landing or coming_ps <= landing[0][0] else landing[0][0]

    def _join(self, join_ps: int) -> None:
        """Take in what comes while a run is under way, which ends early if somebody could enter the batch.

        Where somebody waits already, the head of the queue did not fit, and does not until the run ends.
        """
        is_blocked = bool(self.batch.waiting)
        self._take_joins(join_ps)
        if not is_blocked:
            self._shorten(join_ps)

    def _shorten(self, at_ps: int) -> None:
        """End the run under way with the step that runs at `at_ps`, if somebody waits for that."""
        if self._is_busy and self.batch.waiting and self._run.steps > 1:
            steps = self._steps_by(at_ps)
            if steps == 0 or self._begun_ps + self._run_ps(steps) < at_ps:
                steps += 1
            self._run.steps = steps
            self._end_ps = self._begun_ps + self._run_ps(steps)

    def _take_joins(self, until_ps: int) -> None:
        """Let in, in the order of time, the adapters that are active and the requests that have come.

        An adapter is first: a request may still come at the very moment that was looked at.
        """
        inbox, gate, batch = self._inbox, self.gate, self.batch
        while True:
            landing_ps = gate.landing[0][0] if gate.landing else None
            if inbox and inbox[0][0] <= until_ps and (landing_ps is None or inbox[0][0] < landing_ps):
                at_ps, sequence = inbox.popleft()
                if sequence.version is None:
                    batch.add(sequence)
                else:
                    gate.want(sequence, at_ps)
            elif landing_ps is not None and landing_ps <= until_ps:
                gate.land(landing_ps)
            else:
                return
            self._enter()

    def _enter(self) -> None:
        for sequence in self.gate.take_ready():
            self.batch.add(sequence)

    def _wake(self, at_ps: int) -> None:
        """Somebody may have become ready by what was done to the pool at `at_ps`."""
        self.quiet_ps = 0
        is_blocked = bool(self.batch.waiting)
        self._enter()
        if self._is_busy:
            if not is_blocked:
                self._shorten(at_ps)
        elif self._begun_ps < at_ps:
            self._begun_ps = at_ps
