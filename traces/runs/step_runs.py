"""Runs of engine steps and stretches of output as columns, and the gaps between tokens that they stand for.

Owns the geometry: which gap a step closes, and which requests it counts for. Knows no statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Whole = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplicaSteps:
    """What one replica did; all columns int64, times in picoseconds.

    Run k has the steps `run_step[k]` up to `run_step[k + 1]` (the last: up to `num_steps`), begins at
    `run_ps[k]`, its first step takes `run_step_ps[k]`, each further one `run_growth_ps[k]` more than the
    one before. Request `stretch_request[i]` drew a token at the end of each of the steps
    `stretch_first[i]` to `stretch_last[i]`.
    """

    run_step: Whole
    run_ps: Whole
    run_step_ps: Whole
    run_growth_ps: Whole
    num_steps: int
    stretch_request: Whole
    stretch_first: Whole
    stretch_last: Whole


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gaps:
    """Equally spaced gaps: row k stands for `count[k]` of them, the first `start_ps[k]` long, each further
    one `growth_ps[k]` longer."""

    start_ps: Whole
    growth_ps: Whole
    count: Whole

    def rows(self, places: Whole) -> "Gaps":
        """Some of the rows."""
        return Gaps(
            start_ps=self.start_ps[places], growth_ps=self.growth_ps[places], count=self.count[places]
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OwnedGaps(Gaps):
    """Gaps of which row k belongs to run or request `owner[k]`."""

    owner: Whole


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRuns:
    """All replicas' runs end to end, cut so that every stretch begins and ends with a run.

    `gaps` has one row per run: the gaps that its steps close, for every request that draws in it. `heads`
    are gaps that a run's first step closes and that are longer than the step, because the replica stood
    still before it; such a run has one gap less in `gaps`. A stretch draws its first token at the end of
    run `first_run` and its last at the end of run `last_run`. `pauses`, owned by requests, are the gaps
    between two stretches of one request.
    """

    gaps: Gaps
    heads: OwnedGaps
    pauses: OwnedGaps
    request: Whole
    first_run: Whole
    last_run: Whole
    first_ps: Whole
    last_ps: Whole
    tokens: Whole

    @classmethod
    def of(cls, replicas: Sequence[ReplicaSteps]) -> "StepRuns":
        """Join the replicas; the pauses come in the order of requests."""
        parts = [_Part.of(_cut(replica)) for replica in replicas]
        offsets = np.cumsum([0, *(len(part.steps) for part in parts)])
        owners = [part.heads + offset for part, offset in zip(parts, offsets, strict=False)]
        heads = _join([part.head_ps for part in parts])
        request = _join([part.replica.stretch_request for part in parts])
        first_ps = _join([part.end_ps[part.first_run] for part in parts])
        last_ps = _join([part.end_ps[part.last_run] for part in parts])
        return cls(
            gaps=Gaps(
                start_ps=_join([part.start_ps for part in parts]),
                growth_ps=_join([part.replica.run_growth_ps for part in parts]),
                count=_join([part.steps for part in parts]),
            ),
            heads=_single(heads, _join(owners)),
            pauses=_pauses(request, first_ps, last_ps),
            request=request,
            first_run=_join([part.first_run + offset for part, offset in zip(parts, offsets, strict=False)]),
            last_run=_join([part.last_run + offset for part, offset in zip(parts, offsets, strict=False)]),
            first_ps=first_ps,
            last_ps=last_ps,
            tokens=_join([part.replica.stretch_last - part.replica.stretch_first + 1 for part in parts]),
        )

    def weights(self, stretches: Whole) -> Whole:
        """How many of these stretches have the gaps of each run."""
        size = len(self.gaps.count) + 1
        change = np.bincount(self.first_run[stretches] + 1, minlength=size)
        change -= np.bincount(self.last_run[stretches] + 1, minlength=size)
        return np.cumsum(change, out=change)[:-1]

    def runs_of(self, stretches: Whole) -> tuple[Whole, Whole]:
        """The runs that these stretches have gaps in, ascending, and how many of them each."""
        row, place = spread_rows(self.last_run[stretches] - self.first_run[stretches])
        return np.unique(self.first_run[stretches][row] + 1 + place, return_counts=True)

    def heads_of(self, runs: Whole) -> tuple[Whole, Whole]:
        """The rows of `heads` that these ascending runs have, and which of the runs have them."""
        owner = self.heads.owner
        place = np.searchsorted(owner, runs)
        found = np.flatnonzero(np.append(owner, -1)[place] == runs)
        return place[found], found

    def num_runs_of(self, stretches: Whole) -> int:
        """How many runs these stretches have gaps in, those that they share counted for each."""
        return int((self.last_run[stretches] - self.first_run[stretches]).sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """One replica's share of `StepRuns`, with places in its own runs."""

    replica: ReplicaSteps
    start_ps: Whole
    steps: Whole
    end_ps: Whole
    heads: Whole
    head_ps: Whole
    first_run: Whole
    last_run: Whole

    @classmethod
    def of(cls, replica: ReplicaSteps) -> "_Part":
        steps = np.diff(replica.run_step, append=replica.num_steps)
        end_ps = ends_ps(replica, steps)
        stood_ps = replica.run_ps[1:] - end_ps[:-1]
        heads = np.flatnonzero(stood_ps) + 1
        start_ps = replica.run_step_ps
        head_ps = start_ps[heads] + stood_ps[heads - 1]
        if len(heads):
            start_ps, steps = start_ps.copy(), steps.copy()
            start_ps[heads] += replica.run_growth_ps[heads]
            steps[heads] -= 1
        return cls(
            replica=replica,
            start_ps=start_ps,
            steps=steps,
            end_ps=end_ps,
            heads=heads,
            head_ps=head_ps,
            first_run=_run_of(replica, replica.stretch_first),
            last_run=_run_of(replica, replica.stretch_last),
        )


def ends_ps(replica: ReplicaSteps, steps: Whole) -> Whole:
    """When each run ends; `steps` is how many steps it has."""
    grown = replica.run_growth_ps * (steps * (steps - 1) // 2)
    return replica.run_ps + steps * replica.run_step_ps + grown


def _run_of(replica: ReplicaSteps, step: Whole) -> Whole:
    return np.searchsorted(replica.run_step, step, side="right") - 1


def _cut(replica: ReplicaSteps) -> ReplicaSteps:
    """The same steps in runs that end wherever a stretch begins or ends."""
    step = replica.run_step
    bounds = np.concatenate((replica.stretch_first, replica.stretch_last)) + 1
    place = np.searchsorted(step, bounds)
    ends = np.append(step, replica.num_steps)
    missing = np.unique(bounds[ends[place] != bounds])
    if not len(missing):
        return replica
    cuts = np.union1d(step, missing)
    run = np.searchsorted(step, cuts, side="right") - 1
    skipped = cuts - step[run]
    growth_ps = replica.run_growth_ps[run]
    return ReplicaSteps(
        run_step=cuts,
        run_ps=replica.run_ps[run]
        + skipped * replica.run_step_ps[run]
        + growth_ps * (skipped * (skipped - 1) // 2),
        run_step_ps=replica.run_step_ps[run] + growth_ps * skipped,
        run_growth_ps=growth_ps,
        num_steps=replica.num_steps,
        stretch_request=replica.stretch_request,
        stretch_first=replica.stretch_first,
        stretch_last=replica.stretch_last,
    )


def _pauses(request: Whole, first_ps: Whole, last_ps: Whole) -> OwnedGaps:
    several = np.bincount(request)[request] > 1 if len(request) else np.zeros(0, dtype=np.bool_)
    rows = np.flatnonzero(several)
    rows = rows[np.lexsort((first_ps[rows], request[rows]))]
    same = request[rows[1:]] == request[rows[:-1]]
    before, after = rows[:-1][same], rows[1:][same]
    return _single(first_ps[after] - last_ps[before], request[after])


def _single(gap_ps: Whole, owner: Whole) -> OwnedGaps:
    return OwnedGaps(
        start_ps=gap_ps, growth_ps=np.zeros_like(gap_ps), count=np.ones_like(gap_ps), owner=owner
    )


def _join(columns: Sequence[Whole]) -> Whole:
    return np.concatenate(columns) if columns else np.zeros(0, dtype=np.int64)


def spread_rows(times: Whole) -> tuple[Whole, Whole]:
    """Row k written `times[k]` times, and the place of each within its row."""
    row = np.repeat(np.arange(len(times)), times)
    ends = np.cumsum(times)
    return row, np.arange(len(row)) - np.repeat(ends - times, times)
