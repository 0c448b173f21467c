"""Runs of steps and stretches made up by a test, and the same as records, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from traces.columns import TraceAdapter
from traces.records import Outcome, RequestRecord
from traces.runs.run_metrics import RequestColumns
from traces.runs.step_runs import ReplicaSteps

PS_PER_S = 1e12


def steps_of(runs: Sequence[tuple[int, int, int, int]]) -> ReplicaSteps:
    """One replica without stretches from `(steps, step_ps, growth_ps, idle_ps before)` of each run."""
    rows, step, time_ps = [], 0, 0
    for num_steps, step_ps, growth_ps, idle_ps in runs:
        time_ps += idle_ps
        rows.append((step, time_ps, step_ps, growth_ps))
        step += num_steps
        time_ps += num_steps * step_ps + growth_ps * (num_steps * (num_steps - 1) // 2)
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T.copy()
    none = np.zeros(0, dtype=np.int64)
    return ReplicaSteps(
        run_step=columns[0],
        run_ps=columns[1],
        run_step_ps=columns[2],
        run_growth_ps=columns[3],
        num_steps=step,
        stretch_request=none,
        stretch_first=none,
        stretch_last=none,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeStretch:
    """Steps `first` to `last` of a replica."""

    replica: int
    first: int
    last: int


@dataclass(slots=True, kw_only=True)
class MadeRequest:
    """One request as the test wants it."""

    stretches: Sequence[MadeStretch]
    outcome: Outcome
    adapter: int
    arrival_ps: int
    times_ps: list[int]


@dataclass(slots=True, kw_only=True)
class MadeRun:
    """Replicas and the requests that drew tokens on them."""

    replicas: Sequence[ReplicaSteps]
    adapters: tuple[TraceAdapter, ...]
    requests: list[MadeRequest] = field(default_factory=list)

    def end_ps(self, replica: int, step: int) -> int:
        """When a step of a replica ends, added up one by one."""
        runs = self.replicas[replica]
        run = int(np.flatnonzero(runs.run_step <= step)[-1])
        time_ps = int(runs.run_ps[run])
        for place in range(step - int(runs.run_step[run]) + 1):
            time_ps += int(runs.run_step_ps[run]) + place * int(runs.run_growth_ps[run])
        return time_ps

    def add(
        self, stretches: Sequence[MadeStretch], *, outcome: Outcome, adapter: int, waited_ps: int
    ) -> None:
        """A request that arrived `waited_ps` before its first token, or at that time if it has none."""
        times_ps = [
            self.end_ps(stretch.replica, step)
            for stretch in stretches
            for step in range(stretch.first, stretch.last + 1)
        ]
        arrival_ps = max(0, times_ps[0] - waited_ps) if times_ps else waited_ps
        self.requests.append(
            MadeRequest(
                stretches=stretches,
                outcome=outcome,
                adapter=adapter,
                arrival_ps=arrival_ps,
                times_ps=times_ps,
            )
        )

    def steps(self) -> list[ReplicaSteps]:
        """The replicas with the stretches of all requests."""
        return [self._with_stretches(place, replica) for place, replica in enumerate(self.replicas)]

    def _with_stretches(self, place: int, replica: ReplicaSteps) -> ReplicaSteps:
        rows = [
            (index, stretch.first, stretch.last)
            for index, request in enumerate(self.requests)
            for stretch in request.stretches
            if stretch.replica == place
        ]
        columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy()
        return ReplicaSteps(
            run_step=replica.run_step,
            run_ps=replica.run_ps,
            run_step_ps=replica.run_step_ps,
            run_growth_ps=replica.run_growth_ps,
            num_steps=replica.num_steps,
            stretch_request=columns[0],
            stretch_first=columns[1],
            stretch_last=columns[2],
        )

    def columns(self) -> RequestColumns:
        """The requests."""
        made = self.requests
        outcomes = list(Outcome)
        return RequestColumns(
            arrival_ps=np.array([one.arrival_ps for one in made], dtype=np.int64),
            first_ps=np.array([one.times_ps[0] if one.times_ps else -1 for one in made], dtype=np.int64),
            end_ps=np.array(
                [one.times_ps[-1] if one.times_ps else one.arrival_ps for one in made], dtype=np.int64
            ),
            prompt_tokens=np.full(len(made), 7, dtype=np.int32),
            output_tokens=np.array([len(one.times_ps) for one in made], dtype=np.int32),
            outcome=np.array([outcomes.index(one.outcome) for one in made], dtype=np.int8),
            adapter=np.array([one.adapter for one in made], dtype=np.int32),
            adapters=self.adapters,
        )


def records_of_made(made: MadeRun, warmup_s: float = 0.0) -> list[RequestRecord]:
    """What a client would have recorded, one message per token."""
    records = []
    for index, one in enumerate(made.requests):
        adapter = made.adapters[one.adapter] if one.adapter >= 0 else None
        arrival_s = one.arrival_ps / PS_PER_S
        times_s = tuple(time_ps / PS_PER_S for time_ps in one.times_ps)
        records.append(
            RequestRecord(
                index=index,
                request_id=f"r-{index}",
                adapter=adapter.name if adapter else None,
                rank=adapter.rank if adapter else None,
                scheduled_s=arrival_s,
                sent_s=arrival_s,
                end_s=times_s[-1] if times_s else arrival_s,
                prompt_tokens=7,
                output_tokens=len(times_s),
                expected_output_tokens=len(times_s),
                outcome=one.outcome,
                message_times_s=times_s,
                message_tokens=(1,) * len(times_s),
                warmup=one.arrival_ps < round(warmup_s * PS_PER_S),
            )
        )
    return records
