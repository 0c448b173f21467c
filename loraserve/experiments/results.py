"""What comes of an experiment, as values that go to JSON and back.

A latency without a finite value (more requests than a percentile allows were late for ever) is None.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from loraserve.experiments.spec import Experiment


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all."""


class Point(Value, frozen=True):
    """One run, warm-up excluded everywhere. `asked` is the rate as the experiment has it, '' for one that was
    searched. `latency_per_token_ms` is the mean over requests of the whole time over its output tokens,
    `latency_per_token_p99_ms` their 99th percentile and `token_attainment` the share of all requests with at
    most the SLO's `token_ms`. `wait_per_token_ms` is the mean of the time to the first token over the output
    tokens; TPOT leaves the first token out. `resident_bytes` is the mean over epochs of the adapters that all
    replicas hold; `in_slo`: TTFT p95 and TBT p95 are both within their targets."""

    asked: str
    rate_per_s: float
    replicas: int
    requests: int
    failed: int
    throughput_per_s: float
    goodput_per_s: float
    attainment: float
    in_slo: bool
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    ttft_p99_ms: float | None
    tbt_p50_ms: float | None
    tbt_p95_ms: float | None
    tbt_p99_ms: float | None
    latency_per_token_ms: float | None
    utilisation: float
    bytes_moved: int
    resident_bytes: float
    copies: int
    cold_misses: int
    latency_per_token_p99_ms: float | None = None
    token_attainment: float | None = None
    wait_per_token_ms: float | None = None
    tpot_mean_ms: float | None = None
    tpot_p99_ms: float | None = None


FIGURES = tuple(name for name in Point.__struct_fields__ if name not in ("asked", "rate_per_s", "replicas"))
"""The names of everything that is told of one run."""


class Probe(Value, frozen=True):
    """One step of a search: whether this rate, or this number of replicas, held the SLO; `ttft_p95_ms` None
    also where the run was ended because it could no longer hold."""

    rate_per_s: float
    replicas: int
    held: bool
    ttft_p95_ms: float | None


class Highest(Value, frozen=True):
    """The highest rate that held (0: none), the lowest that did not (0: none), and the way there."""

    held_per_s: float
    failed_per_s: float
    probes: tuple[Probe, ...]


class Fewest(Value, frozen=True):
    """The fewest replicas that held the SLO at a rate, 0: not even the most allowed; and the way there."""

    asked: str
    rate_per_s: float
    replicas: int
    probes: tuple[Probe, ...]


class RankMap(Value, frozen=True):
    """What each replica did over time in one run: `rank[replica][bin]` is the mean over the bin's busy time
    of the largest rank in a step, None where it was idle; `busy` the share of the bin that it computed in."""

    rate_per_s: float
    edges_s: tuple[float, ...]
    rank: tuple[tuple[float | None, ...], ...]
    busy: tuple[tuple[float, ...], ...]


class JobResult(Value, frozen=True):
    """What one job found: one curve, of one seed. `replicas` 0: a search for the fewest. `fluid_per_s` is the
    rate at which all replicas (one, for such a search) would be busy if ranks never met in a batch, 0: not
    known."""

    trace: str
    policy: str
    replicas: int
    kernel: str
    profile: str
    seed: int
    fluid_per_s: float
    points: tuple[Point, ...] = ()
    highest: Highest | None = None
    fewest: tuple[Fewest, ...] = ()
    rank_map: RankMap | None = None


class ExperimentResult(Value, frozen=True):
    """All jobs, in the experiment's order: traces, kernels, profiles, replicas, policies, seeds."""

    name: str
    experiment: Experiment
    jobs: tuple[JobResult, ...]


def to_json(value: Value) -> bytes:
    """The same value gives the same bytes."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=1) + b"\n"


def job_from_json(data: bytes) -> JobResult:
    """What `to_json` gave of a job; ValueError if that is not what it is."""
    return msgspec.json.decode(data, type=JobResult)


def read_results(path: Path) -> ExperimentResult:
    """A `results.json`; ValueError if it is none, OSError if it cannot be read."""
    return msgspec.json.decode(path.read_bytes(), type=ExperimentResult)


def tree_of(value: Value) -> dict[str, Any]:
    """The value as plain values."""
    tree: dict[str, Any] = msgspec.to_builtins(value)
    return tree


def jobs_of(
    result: ExperimentResult,
    *,
    trace: str | None = None,
    policy: str | None = None,
    replicas: int | None = None,
    kernel: str | None = None,
    profile: str | None = None,
) -> Sequence[JobResult]:
    """The jobs of these, one for each seed."""
    wanted = {"trace": trace, "policy": policy, "replicas": replicas, "kernel": kernel, "profile": profile}
    given = {key: value for key, value in wanted.items() if value is not None}
    return [job for job in result.jobs if all(getattr(job, key) == value for key, value in given.items())]
