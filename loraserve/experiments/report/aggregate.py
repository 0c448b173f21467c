"""An experiment's results over its seeds: the median, with the least and the most.

A latency without a finite value is infinite here, so that a median over seeds is still one.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from loraserve.experiments.results import ExperimentResult, JobResult, Point, RankMap


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over seeds."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of a run: what it is called, how it is read from a `Point`, and how it is drawn."""

    label: str
    unit: str
    read: Callable[[Point], float | None]
    is_share: bool = False
    is_log: bool = False
    more_is_better: bool = False

    @property
    def title(self) -> str:
        """The label with the unit."""
        return ", ".join(part for part in (self.label, self.unit) if part)


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Setting:
    """What a table or a plot of all traces is about; `replicas` 0: searches for the fewest."""

    kernel: str
    profile: str
    replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AtRate:
    """A curve at one of the experiment's rates; a figure is None where nothing was measured."""

    asked: str
    rate_per_s: float
    figures: Mapping[str, Spread | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FewestAt:
    """The fewest replicas at a rate, infinite where not even the most held; `held` says of each number of
    replicas that was probed in how many seeds it held, and in how many it was tried."""

    asked: str
    rate_per_s: float
    replicas: Spread
    held: Mapping[int, tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One policy on one trace in one setting; `highest` is 0 where no rate held. `rank_map` is of the first
    seed."""

    points: tuple[AtRate, ...]
    highest: Spread | None
    fewest: tuple[FewestAt, ...]
    rank_map: RankMap | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """All curves, by trace, setting and policy; the names in the experiment's order."""

    result: ExperimentResult
    traces: tuple[str, ...]
    policies: tuple[str, ...]
    settings: tuple[Setting, ...]
    curves: Mapping[tuple[str, Setting, str], Curve]

    @property
    def num_seeds(self) -> int:
        """How many seeds each figure is the median of."""
        return len(self.result.experiment.seeds)

    @property
    def middle_rate(self) -> str | None:
        """The rate for what is shown at one of them only: the one of the maps."""
        experiment = self.result.experiment
        named = [str(rate) for rate in experiment.all_rates]
        wanted = str(experiment.map_rate)
        return wanted if wanted in named else named[len(named) // 2] if named else None

    @property
    def asked_for(self) -> tuple[str, ...]:
        """The figures of runs that its claims and published lines are about."""
        experiment = self.result.experiment
        named = [
            *(claim.figure for claim in experiment.claims),
            *(line.figure for line in experiment.published),
        ]
        return tuple(name for name in dict.fromkeys(named) if name in FIGURES)

    def curve(self, trace: str, setting: Setting, policy: str) -> Curve | None:
        """That curve, None if it was not run."""
        return self.curves.get((trace, setting, policy))

    def searches(self) -> tuple[Setting, ...]:
        """The settings of searches for the fewest replicas."""
        return tuple(setting for setting in self.settings if not setting.replicas)

    def runs(self) -> tuple[Setting, ...]:
        """The settings with a number of replicas."""
        return tuple(setting for setting in self.settings if setting.replicas)

    def setting_name(self, setting: Setting, *, with_replicas: bool = True) -> str:
        """What distinguishes this setting from the others, '' if nothing does."""
        parts = [setting.kernel.replace("_", " ")] if _differ(one.kernel for one in self.settings) else []
        if _differ(one.profile for one in self.settings):
            parts.append(setting.profile)
        if with_replicas and setting.replicas and _differ(one.replicas for one in self.runs()):
            parts.append(counted(setting.replicas, "replica"))
        return ", ".join(parts)


MIB = 2.0**20


def _own(name: str) -> Callable[[Point], float | None]:
    def read(point: Point) -> float | None:
        value: float | None = getattr(point, name)
        return value

    return read


def _latency(name: str) -> Callable[[Point], float | None]:
    def read(point: Point) -> float | None:
        value: float | None = getattr(point, name)
        if value is not None:
            return value
        # Without one failure a value that is missing was never measured; else it was late for ever.
        return math.inf if point.failed else None

    return read


def _milliseconds(name: str, label: str) -> tuple[str, Figure]:
    return name, Figure(label=label, unit="ms", read=_latency(name), is_log=True)


def _share(name: str, label: str) -> Figure:
    return Figure(label=label, unit="", read=_own(name), is_share=True, more_is_better=True)


def _rate(name: str, label: str) -> Figure:
    return Figure(label=label, unit="req/s", read=_own(name), more_is_better=True)


FIGURES: Mapping[str, Figure] = dict(
    [
        *(
            _milliseconds(f"{name}_{quantile}_ms", f"{name.upper()} {quantile}")
            for name in ("ttft", "tbt")
            for quantile in ("p50", "p95", "p99")
        ),
        _milliseconds("latency_per_token_ms", "Latency per output token, mean"),
        _milliseconds("latency_per_token_p99_ms", "Latency per output token, p99"),
        _milliseconds("wait_per_token_ms", "TTFT per output token, mean"),
        _milliseconds("tpot_mean_ms", "TPOT, mean"),
        _milliseconds("tpot_p99_ms", "TPOT p99"),
        ("attainment", _share("attainment", "Attainment")),
        ("token_attainment", _share("token_attainment", "Inside the target per token")),
        ("utilisation", _share("utilisation", "Utilisation")),
        ("throughput_per_s", _rate("throughput_per_s", "Throughput")),
        ("goodput_per_s", _rate("goodput_per_s", "Goodput")),
        ("failed", Figure(label="Failed", unit="requests", read=_own("failed"))),
        ("bytes_moved", Figure(label="Moved", unit="MiB", read=lambda one: one.bytes_moved / MIB)),
        ("cold_misses", Figure(label="Cold misses", unit="requests", read=_own("cold_misses"))),
        ("copies", Figure(label="Copies", unit="", read=_own("copies"))),
        (
            "resident_bytes",
            Figure(
                label="Resident per replica",
                unit="MiB",
                read=lambda one: one.resident_bytes / max(1, one.replicas) / MIB,
            ),
        ),
        ("in_slo", _share("in_slo", "Inside the SLO")),
    ]
)
"""By the name of the field of `Point`."""


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """The median of what is there, with the least and the most; None of nothing."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    return Spread(median=statistics.median(known), lowest=min(known), highest=max(known))


def aggregate(result: ExperimentResult) -> Aggregate:
    """Take the seeds of each curve together."""
    groups: dict[tuple[str, Setting, str], list[JobResult]] = {}
    for job in result.jobs:
        setting = Setting(kernel=job.kernel, profile=job.profile, replicas=job.replicas)
        groups.setdefault((job.trace, setting, job.policy), []).append(job)
    return Aggregate(
        result=result,
        traces=tuple(dict.fromkeys(trace for trace, _, _ in groups)),
        policies=tuple(dict.fromkeys(policy for _, _, policy in groups)),
        settings=tuple(dict.fromkeys(setting for _, setting, _ in groups)),
        curves={key: _curve(jobs) for key, jobs in groups.items()},
    )


def counted(count: int, what: str) -> str:
    """`1 replica`, `2 replicas`."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def rate_text(asked: str, rate_per_s: float) -> str:
    """A rate as the experiment has it; a share with what it comes to."""
    if asked.replace(".", "", 1).replace("e", "", 1).isdigit():
        return f"{float(asked):g}/s"
    return f"{asked} ({rate_per_s:.3g}/s)"


def _curve(jobs: Sequence[JobResult]) -> Curve:
    highest = spread_of(job.highest.held_per_s if job.highest else None for job in jobs)
    return Curve(
        points=tuple(_at_rate([job.points[at] for job in jobs]) for at in range(len(jobs[0].points))),
        highest=highest,
        fewest=tuple(_fewest(jobs, at) for at in range(len(jobs[0].fewest))),
        rank_map=next((job.rank_map for job in jobs if job.rank_map is not None), None),
    )


def _at_rate(points: Sequence[Point]) -> AtRate:
    return AtRate(
        asked=points[0].asked,
        rate_per_s=statistics.median(point.rate_per_s for point in points),
        figures={name: spread_of(figure.read(point) for point in points) for name, figure in FIGURES.items()},
    )


def _fewest(jobs: Sequence[JobResult], at: int) -> FewestAt:
    found = [job.fewest[at] for job in jobs]
    held: dict[int, tuple[int, int]] = {}
    for one in found:
        for probe in one.probes:
            good, tried = held.get(probe.replicas, (0, 0))
            held[probe.replicas] = (good + probe.held, tried + 1)
    replicas = spread_of(float(one.replicas) if one.replicas else math.inf for one in found)
    assert replicas is not None  # an experiment has a seed
    return FewestAt(
        asked=found[0].asked,
        rate_per_s=statistics.median(one.rate_per_s for one in found),
        replicas=replicas,
        held=dict(sorted(held.items())),
    )


def _differ(values: Iterable[object]) -> bool:
    return len(set(values)) > 1
