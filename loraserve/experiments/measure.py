"""What one job finds: runs at the rates asked for, the highest rate inside the SLO, the fewest replicas."""

import math
from collections.abc import Callable

import msgspec

from loraserve.errors import BadInputError
from loraserve.experiments.drawn import own_rate
from loraserve.experiments.fewest import ReplicaSearch
from loraserve.experiments.jobs import Job
from loraserve.experiments.points import finite, point_of, rank_map_of
from loraserve.experiments.results import Fewest, Highest, JobResult, Point, Probe, RankMap
from loraserve.experiments.scenarios import fluid_per_s, scenario_at
from loraserve.experiments.spec import OWN, share_of
from loraserve.profiling.search import RateSearch, SearchLimits
from loraserve.simulator.figures import Judging, figures_of, metrics_of
from loraserve.simulator.give_up import GaveUpError, GiveUp
from loraserve.simulator.run import simulate
from traces.metrics import Slo

START, GROWTH = 0.8, 1.2
"""Where a search begins, of the fluid rate, and its steps until rates that hold and fail are found."""
LOWEST, HIGHEST = 0.02, 2.0

Tell = Callable[[str], None]


def measure(job: Job, tell: Tell | None = None) -> JobResult:
    """Do one job; `tell` is told what has been done, in words. BadInputError says what does not fit."""
    try:
        return _Measuring(job, tell or (lambda _: None)).all()
    except BadInputError as error:
        raise BadInputError(f"{job.label}: {error}") from error


class _Measuring:
    """One job and what it has found so far."""

    def __init__(self, job: Job, tell: Tell) -> None:
        self._job, self._tell = job, tell
        slo = job.experiment.slo
        self._judging = Judging(
            slo=Slo(ttft_ms=slo.ttft_ms, tbt_ms=slo.tbt_ms), warmup_s=job.experiment.cluster.warmup_s
        )
        self._map: RankMap | None = None

    def all(self) -> JobResult:
        job = self._job
        found = JobResult(
            trace=job.trace,
            policy=job.contender.name,
            replicas=job.replicas,
            kernel=job.kernel or (job.profile.latency.kernel.value if job.profile.latency else ""),
            profile=job.profile.name,
            seed=job.seed,
            fluid_per_s=fluid_per_s(self._job, max(1, job.replicas)) if job.profile.operating_points else 0.0,
        )
        if not job.replicas:
            asked = job.experiment.find.fewest_replicas_at
            return msgspec.structs.replace(found, fewest=tuple(self._fewest(rate) for rate in asked))
        points = tuple(self._point(rate) for rate in job.experiment.all_rates)
        highest = self._highest(points) if job.experiment.find.highest_rate else None
        return msgspec.structs.replace(found, points=points, highest=highest, rank_map=self._map)

    def _point(self, asked: float | str) -> Point:
        rate = self._rate(asked)
        result = simulate(scenario_at(self._job, None if asked == OWN else rate, self._job.replicas))
        figures = figures_of(result, self._judging)
        if self._job.has_map and asked == self._map_rate():
            self._map = rank_map_of(figures, rate)
        self._tell(f"{rate:.4g}/s")
        return point_of(
            figures,
            result,
            asked=str(asked),
            rate_per_s=rate,
            replicas=self._job.replicas,
            warmup_s=self._judging.warmup_s,
            token_ms=self._job.experiment.slo.token_ms,
        )

    def _map_rate(self) -> float | str:
        rates = self._job.experiment.all_rates
        return self._job.experiment.map_rate or rates[len(rates) // 2]

    def _highest(self, points: tuple[Point, ...]) -> Highest:
        fluid = fluid_per_s(self._job, self._job.replicas)
        limits = SearchLimits(
            lowest=LOWEST * fluid,
            highest=HIGHEST * fluid,
            tolerance=self._job.experiment.find.tolerance,
            growth=GROWTH,
        )
        failed = min((one.rate_per_s for one in points if not one.in_slo), default=None)
        held = max(
            (one.rate_per_s for one in points if one.in_slo and (failed is None or one.rate_per_s < failed)),
            default=None,
        )
        search = RateSearch(limits, START * fluid, held=held, failed=failed)
        probes = []
        while (rate := search.next_rate) is not None:
            probes.append(self._probe(rate, self._job.replicas))
            search.tell(held=probes[-1].held)
        return Highest(held_per_s=search.held or 0.0, failed_per_s=search.failed or 0.0, probes=tuple(probes))

    def _fewest(self, asked: float | str) -> Fewest:
        rate = self._rate(asked)
        find, profile = self._job.experiment.find, self._job.profile
        start = math.ceil(rate / fluid_per_s(self._job, 1)) if profile.operating_points else 1
        search = ReplicaSearch(most=find.most_replicas, start=start)
        probes = []
        while (replicas := search.next_replicas) is not None:
            probes.append(self._probe(rate, replicas, is_own=asked == OWN))
            search.tell(held=probes[-1].held)
        return Fewest(asked=str(asked), rate_per_s=rate, replicas=search.fewest or 0, probes=tuple(probes))

    def _probe(self, rate_per_s: float, replicas: int, *, is_own: bool = False) -> Probe:
        slo, warmup_s = self._judging.slo, self._judging.warmup_s
        scenario = scenario_at(self._job, None if is_own else rate_per_s, replicas)
        try:
            result = simulate(scenario, give_up=GiveUp(ttft_ms=slo.ttft_ms, warmup_s=warmup_s))
        except GaveUpError:
            held, ttft_p95_ms = False, None
        else:
            overall = metrics_of(result, self._judging).summary.overall
            held, ttft_p95_ms = overall.slo_met, finite(overall.ttft_ms.p95)
        self._tell(f"{rate_per_s:.4g}/s on {replicas}: {'held' if held else 'missed'}")
        return Probe(rate_per_s=rate_per_s, replicas=replicas, held=held, ttft_p95_ms=ttft_p95_ms)

    def _rate(self, asked: float | str) -> float:
        share = share_of(asked)
        if share is not None:
            return share * fluid_per_s(self._job, max(1, self._job.replicas))
        return own_rate(self._job.workload, self._job.seed) if isinstance(asked, str) else asked
