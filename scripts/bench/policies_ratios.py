"""From the runs of a comparison to the ratios that its goals are about. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev
from typing import Any

from policies_cases import EVERYWHERE, FROM_SCRATCH, OURS, RIVAL, Outcome

# One-sided 95 % of Student's t, by how many seeds there are.
_T95 = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13, 6: 2.02, 7: 1.94, 8: 1.89, 9: 1.86, 10: 1.83}


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """One figure over another, seed by seed: the geometric mean of the ratios, and what it is at least and
    at most with 95 % each (one-sided t of the logarithms; endless with a single seed)."""

    ratio: float
    low: float
    high: float


def paired(ours: Sequence[float], others: Sequence[float]) -> Paired:
    """The ratio of two figures of the same seeds, none of them 0; two that are infinite count as equal."""
    logs = [_log_ratio(one, other) for one, other in zip(ours, others, strict=True)]
    if not all(map(math.isfinite, logs)):
        middle = math.exp(median(logs))
        return Paired(ratio=middle, low=0.0, high=math.inf)
    middle = mean(logs)
    if len(logs) < 2:
        return Paired(ratio=math.exp(middle), low=0.0, high=math.inf)
    wide = _T95.get(len(logs), 1.7) * stdev(logs) / math.sqrt(len(logs))
    return Paired(ratio=math.exp(middle), low=math.exp(middle - wide), high=math.exp(middle + wide))


def _log_ratio(one: float, other: float) -> float:
    if one == other:
        return 0.0
    if math.isinf(one) or other == 0:
        return math.inf
    return -math.inf if math.isinf(other) or one == 0 else math.log(one / other)


def against_best(runs: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For each rate: `optimal`'s TTFT p95 over that of the best other contender there, the best by its
    geometric mean over the seeds; `worse` when even the low end of the ratio is above 1."""
    rows = []
    for rate, group in _by_rate(runs).items():
        of = {name: _by_seed(group, name) for name in _names(group)}
        ours = of.pop(OURS, None)
        of.pop(FROM_SCRATCH, None)
        if not ours or not of:
            continue
        best = min(of, key=lambda name: _level(of[name].values()))
        seeds = sorted(ours.keys() & of[best].keys())
        ratio = paired([ours[seed] for seed in seeds], [of[best][seed] for seed in seeds])
        rows.append(
            {
                "rate_per_s": rate,
                "best_other": best,
                "ratio": ratio.ratio,
                "low": ratio.low,
                "high": ratio.high,
                "worse": ratio.low > 1.0,
            }
        )
    return rows


def over_scratch(runs: Sequence[Outcome]) -> list[dict[str, Any]]:
    """For each rate, `optimal`'s TTFT p95 over that of plans from scratch, and the bytes that both move."""
    rows: list[dict[str, Any]] = []
    for rate, group in _by_rate(runs).items():
        ours, other = _by_seed(group, OURS), _by_seed(group, FROM_SCRATCH)
        if seeds := sorted(ours.keys() & other.keys()):
            ratio = paired([ours[seed] for seed in seeds], [other[seed] for seed in seeds])
            moved = _moved(group)
            row: dict[str, Any] = {"rate_per_s": rate, "ratio": ratio.ratio, "low": ratio.low}
            row |= {"high": ratio.high, "moved_over_scratch": _over(moved[OURS], moved[FROM_SCRATCH])}
            rows.append(row)
    return rows


def rate_ratios(highest: Mapping[str, Mapping[int, float]]) -> dict[str, Any]:
    """`optimal`'s highest rate inside the SLO over that of each other contender, seed by seed."""
    ours = highest.get(OURS)
    if ours is None:
        return {}
    ratios = {}
    for name, rates in highest.items():
        seeds = sorted(ours.keys() & rates.keys())
        if name != OURS and seeds:
            found = paired([ours[seed] for seed in seeds], [rates[seed] for seed in seeds])
            ratios[name] = {"ratio": found.ratio, "low": found.low, "high": found.high}
    return ratios


def ttft_ratio(runs: Sequence[Outcome]) -> dict[str, Any]:
    """`loraserve`'s TTFT p95 over `optimal`'s, of runs at one rate."""
    ours, rival = _by_seed(runs, OURS), _by_seed(runs, RIVAL)
    seeds = sorted(ours.keys() & rival.keys())
    if not seeds:
        return {}
    found = paired([rival[seed] for seed in seeds], [ours[seed] for seed in seeds])
    return {
        "rate_per_s": runs[0].rate_per_s,
        "loraserve_ttft_p95_ms": _level(rival.values()),
        "optimal_ttft_p95_ms": _level(ours.values()),
        "ratio": found.ratio,
        "low": found.low,
        "high": found.high,
    }


def bytes_ratios(runs: Sequence[Outcome]) -> dict[str, Any]:
    """What `optimal` moves over what `loraserve` does, and holds over least-loaded-everywhere, at all rates
    together; None where the other has none."""
    moved = _moved(runs)
    held = {
        name: mean([one.resident_bytes for one in runs if one.contender == name]) for name in _names(runs)
    }
    return {
        "moved_over_loraserve": _over(moved.get(OURS), moved.get(RIVAL)),
        "resident_over_everywhere": _over(held.get(OURS), held.get(EVERYWHERE)),
    }


def _moved(runs: Sequence[Outcome]) -> dict[str, int]:
    return {name: sum(one.bytes_moved for one in runs if one.contender == name) for name in _names(runs)}


def _over(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _names(runs: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(one.contender for one in runs))


def _by_rate(runs: Sequence[Outcome]) -> dict[float, list[Outcome]]:
    groups: dict[float, list[Outcome]] = {}
    for one in runs:
        groups.setdefault(one.rate_per_s, []).append(one)
    return dict(sorted(groups.items()))


def _by_seed(runs: Sequence[Outcome], name: str) -> dict[int, float]:
    return {one.seed: one.ttft_p95_ms for one in runs if one.contender == name}


def _level(values: Any) -> float:
    logs = [math.log(value) if value > 0 else -math.inf for value in values]
    return math.exp(mean(logs)) if all(map(math.isfinite, logs)) else math.inf


def level(values: Sequence[float]) -> float:
    """The geometric mean; infinite if one of them is."""
    return _level(values)
