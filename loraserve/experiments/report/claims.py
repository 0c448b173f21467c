"""What somebody published beside what was found here: ratios, and a verdict in words."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from loraserve.experiments.report.aggregate import (
    FIGURES,
    Aggregate,
    Setting,
    Spread,
    counted,
    rate_text,
    spread_of,
)
from loraserve.experiments.results import JobResult, Point, jobs_of
from loraserve.experiments.spec import ClaimSection

NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimCase:
    """A claim on one trace in one setting at one rate, '' where the figure is of none.

    `value` is over the seeds that give one: how many times better `policy` is than `over` (above 1 is always
    better), or the figure itself where `over` is ''. It is at least that if `is_bound`: the other one failed
    already at the least that was tried. If there is no value, `note` says why.
    """

    trace: str
    setting: Setting
    rate: str
    value: Spread | None
    is_bound: bool
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimFound:
    """A claim and all that was found about it; `best` is the case for "up to"."""

    claim: ClaimSection
    cases: tuple[ClaimCase, ...]
    best: ClaimCase | None
    typical: float | None
    verdict: str
    is_reached: bool | None

    @property
    def unit(self) -> str:
        """Of its values, '' for ratios."""
        if self.claim.over:
            return ""
        searched = {"highest_rate": "req/s", "fewest_replicas": "replicas"}
        return searched.get(self.claim.figure) or FIGURES[self.claim.figure].unit

    def best_of(self, cases: Iterable[ClaimCase]) -> ClaimCase | None:
        """The best of these that have a value."""
        return _best(self.claim, cases)


def claims_found(data: Aggregate) -> tuple[ClaimFound, ...]:
    """Every claim of the experiment, in its order."""
    return tuple(_found(data, claim) for claim in data.result.experiment.claims)


def value_text(value: float, *, is_bound: bool = False) -> str:
    """A ratio or a figure as people read it."""
    digits = f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"at least {digits}" if is_bound else digits


def _found(data: Aggregate, claim: ClaimSection) -> ClaimFound:
    cases = tuple(_cases(data, claim))
    values = [case.value.median for case in cases if case.value is not None]
    best = _best(claim, cases)
    reached = None
    if best is not None and best.value is not None and claim.paper is not None:
        ours = round(best.value.median, 2)
        reached = ours >= claim.paper if _grows(claim) else ours <= claim.paper
    return ClaimFound(
        claim=claim,
        cases=cases,
        best=best,
        typical=statistics.median(values) if values else None,
        verdict=_verdict(claim, cases, best, reached),
        # A bound below what was published decides nothing.
        is_reached=None if best is not None and best.is_bound and not reached else reached,
    )


def _grows(claim: ClaimSection) -> bool:
    """Whether more is better."""
    return bool(claim.over) or _more_is_better(claim)


def _more_is_better(claim: ClaimSection) -> bool:
    known = FIGURES.get(claim.figure)
    return known.more_is_better if known is not None else claim.figure == "highest_rate"


def _best(claim: ClaimSection, cases: Iterable[ClaimCase]) -> ClaimCase | None:
    there = [(case.value.median, case) for case in cases if case.value is not None]
    found = (max if _grows(claim) else min)(there, key=lambda one: one[0], default=None)
    return found[1] if found is not None else None


def _verdict(
    claim: ClaimSection, cases: Sequence[ClaimCase], best: ClaimCase | None, reached: bool | None
) -> str:
    if best is None or best.value is None:
        notes = list(dict.fromkeys(case.note for case in cases)) or [NOT_RUN]
        return f"no figure: {'; '.join(notes)}"
    ours = value_text(best.value.median, is_bound=best.is_bound)
    if claim.paper is None or reached is None:
        return f"{'up to ' if claim.over else ''}{ours}"
    paper = f"{claim.paper:g}"
    seeds = ""
    if best.value.lowest < claim.paper < best.value.highest:
        seeds = f"; seeds from {value_text(best.value.lowest)} to {value_text(best.value.highest)}"
    if reached:
        return f"reached: {ours}, published {paper}{seeds}"
    if best.is_bound:
        return f"not shown: {ours}, published {paper}; more was not tried"
    return f"not reached: {ours} of {paper} at {'most' if claim.over else 'best'}{seeds}"


def _cases(data: Aggregate, claim: ClaimSection) -> Iterator[ClaimCase]:
    is_search = claim.figure == "fewest_replicas"
    for setting in data.searches() if is_search else data.runs():
        if claim.kernels and setting.kernel not in claim.kernels:
            continue
        for trace in claim.traces or data.traces:
            yield from _cases_on(data, claim, trace, setting)


def _cases_on(data: Aggregate, claim: ClaimSection, trace: str, setting: Setting) -> Iterator[ClaimCase]:
    ours = _jobs(data, trace, setting, claim.policy)
    others = {job.seed: job for job in _jobs(data, trace, setting, claim.over)} if claim.over else {}
    for rate, asked in _rates(claim, ours):
        values: list[float] = []
        notes: list[str] = []
        is_bound = False
        for job in ours:
            of_seed, bound, why_none = _one(claim, job, others.get(job.seed), asked)
            if of_seed is not None:
                values.append(of_seed)
                is_bound = is_bound or bound
            else:
                notes.append(why_none)
        note = "; ".join(dict.fromkeys(notes))
        if values and notes:
            note = f"{note} in {counted(len(notes), 'seed')} of {len(ours)}"
        yield ClaimCase(
            trace=trace,
            setting=setting,
            rate=rate,
            value=spread_of(values),
            is_bound=is_bound,
            note=note if ours else NOT_RUN,
        )


def _jobs(data: Aggregate, trace: str, setting: Setting, policy: str) -> Sequence[JobResult]:
    return jobs_of(
        data.result,
        trace=trace,
        policy=policy,
        replicas=setting.replicas,
        kernel=setting.kernel,
        profile=setting.profile,
    )


def _rates(claim: ClaimSection, jobs: Sequence[JobResult]) -> list[tuple[str, str]]:
    """The rates to compare at, for people and as asked for."""
    if claim.figure == "highest_rate" or not jobs:
        return [("", "")]
    at = jobs[0].fewest if claim.figure == "fewest_replicas" else jobs[0].points
    rates = [(rate_text(one.asked, one.rate_per_s), one.asked) for one in at]
    if claim.rate is None:
        return rates or [("", "")]
    wanted = str(claim.rate)
    return [one for one in rates if one[1] == wanted] or [(wanted, wanted)]


def _one(
    claim: ClaimSection, job: JobResult, other: JobResult | None, asked: str
) -> tuple[float | None, bool, str]:
    """The value of one seed, whether it is but a bound, and what is to be said."""
    ours, our_bound = _figure(claim, job, asked)
    if ours is None:
        return None, False, NOT_RUN
    if not claim.over:
        missed = None if our_bound is None else _missed(claim, job, asked, claim.policy)
        return (ours, False, "") if missed is None else (None, False, missed)
    theirs, their_bound = _figure(claim, other, asked) if other is not None else (None, None)
    if theirs is None:
        return None, False, NOT_RUN
    if our_bound is not None:
        who = claim.policy if their_bound is None else ""
        return None, False, _missed(claim, job, asked, who)
    if their_bound is not None:
        if not 0 < their_bound < math.inf:
            return None, False, _missed(claim, job, asked, claim.over)
        theirs = their_bound
    if _more_is_better(claim):
        if not theirs:
            return None, False, f"{claim.over} has none"
        return ours / theirs, their_bound is not None, ""
    if not ours:
        return None, False, f"{claim.policy} has none"
    return theirs / ours, their_bound is not None, ""


def _missed(claim: ClaimSection, job: JobResult, asked: str, who: str) -> str:
    """That this policy, '' for neither of both, has no such figure."""
    if claim.figure == "highest_rate":
        return f"{who} never inside the SLO" if who else "neither ever inside the SLO"
    if claim.figure == "fewest_replicas":
        probes = [probe for one in job.fewest if one.asked == asked for probe in one.probes]
        most = max((probe.replicas for probe in probes), default=0)
        return f"{who or 'neither'} {'not ' if who else ''}inside the SLO on {counted(most, 'replica')}"
    label = FIGURES[claim.figure].label
    return f"{who} has no finite {label}" if who else f"neither has a finite {label}"


def _figure(claim: ClaimSection, job: JobResult, asked: str) -> tuple[float | None, float | None]:
    """The figure, None if it was not run; and if it has no finite value, what it is beyond."""
    if claim.figure == "highest_rate":
        if job.highest is None:
            return None, None
        held = job.highest.held_per_s
        return held, None if held else job.highest.failed_per_s
    if claim.figure == "fewest_replicas":
        one = next((one for one in job.fewest if one.asked == asked), None)
        if one is None:
            return None, None
        most = max((probe.replicas for probe in one.probes), default=0)
        return (float(one.replicas), None) if one.replicas else (math.inf, most + 1.0)
    point = next((point for point in job.points if point.asked == asked), None)
    value = _value(claim, point) if point is not None else None
    return value, value if value == math.inf else None


def _value(claim: ClaimSection, point: Point) -> float | None:
    return FIGURES[claim.figure].read(point)


def case_name(data: Aggregate, case: ClaimCase) -> str:
    """Where it was found."""
    return ", ".join(part for part in (case.trace, data.setting_name(case.setting), case.rate) if part)
