"""What a cluster has to hold, as a user writes it: `ttft_p95<2s,tbt_p95<100ms,attainment>0.99`.

Owns the grammar and the comparison of figures with it. Knows nothing of where figures come from.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from loraserve.errors import BadInputError
from traces.metrics import GroupSummary, Slo
from traces.quantiles import Distribution

LATENCIES = ("ttft", "tbt", "tpot", "e2e")
PERCENTILES = ("p50", "p95", "p99")
ATTAINMENT, GOODPUT = "attainment", "goodput"
LATENCY_FIGURES = tuple(f"{kind}_{percentile}" for kind in LATENCIES for percentile in PERCENTILES)
FIGURES = (*LATENCY_FIGURES, ATTAINMENT, GOODPUT)

_CLAUSE = re.compile(
    r"(?P<figure>[a-z0-9_]+)\s*(?P<sign><=|>=|<|>)\s*"
    r"(?P<number>[0-9]{1,12}(?:\.[0-9]{1,12})?|\.[0-9]{1,12})\s*(?P<unit>[a-z%/]*)",
    re.ASCII,
)
_UNITS_MS: Mapping[str, float] = {"s": 1e3, "ms": 1.0}
_FORM = "expected such as ttft_p95<2s,tbt_p95<100ms,attainment>0.99"

Figures = Mapping[str, float | None]
"""Figures by the names of FIGURES: milliseconds, a share, requests per second. None: nothing to measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """One bound on one figure: milliseconds, a share from 0 to 1, or requests per second."""

    figure: str
    sign: str
    limit: float

    @property
    def is_latency(self) -> bool:
        """Whether less is better, in ms."""
        return self.figure in LATENCY_FIGURES

    @property
    def text(self) -> str:
        """As a user writes it; the inverse of parsing."""
        if not self.is_latency:
            return f"{self.figure}{self.sign}{_plain(self.limit)}"
        # Others would not always come back as what they were.
        in_s = self.limit >= 1000 and self.limit % 100 == 0
        return f"{self.figure}{self.sign}" + (
            f"{_plain(self.limit / 1000)}s" if in_s else f"{_plain(self.limit)}ms"
        )

    def holds(self, value: float | None) -> bool:
        """Whether a figure keeps it. No latency at all keeps every bound, as answers of one token have no
        gaps; of the other figures nothing keeps none."""
        if value is None:
            return self.is_latency
        match self.sign:
            case "<":
                return value < self.limit
            case "<=":
                return value <= self.limit
            case ">":
                return value > self.limit
            case _:
                return value >= self.limit

    def used(self, value: float | None) -> float:
        """The part of the bound that a figure uses, above 1 where it breaks it; infinite for what never
        came."""
        if value is None:
            return 0.0 if self.is_latency else math.inf
        over, under = (value, self.limit) if self.is_latency else (self.limit, value)
        return over / under if under > 0 else (0.0 if over <= 0 else math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """All bounds at once."""

    clauses: tuple[Clause, ...]

    @classmethod
    def parse(cls, text: str) -> "Target":
        """From its text; BadInputError in one line says what is allowed."""
        clauses = tuple(_clause(part.strip()) for part in text.split(","))
        seen: set[str] = set()
        for clause in clauses:
            if clause.figure in seen:
                raise BadInputError(f"--slo: {clause.figure} stands there twice; expected each figure once")
            seen.add(clause.figure)
        return cls(clauses=clauses)

    @property
    def text(self) -> str:
        """As a user writes it."""
        return ",".join(clause.text for clause in self.clauses)

    def holds(self, figures: Figures) -> bool:
        """Whether these figures keep every bound."""
        return all(clause.holds(figures[clause.figure]) for clause in self.clauses)

    def used(self, figures: Figures) -> float:
        """The part of the tightest bound that these figures use."""
        return max(clause.used(figures[clause.figure]) for clause in self.clauses)

    def limit(self, figure: str) -> float | None:
        """The bound on this figure, None without one."""
        return next((clause.limit for clause in self.clauses if clause.figure == figure), None)

    @property
    def judged_by(self) -> Slo:
        """What attainment and goodput count by, per request: the TTFT and the TBT of the bounds, at the 95th
        percentile if there is one, else at the highest there is, else those of `traces.metrics.Slo`."""
        usual = Slo()
        return Slo(ttft_ms=self._typical("ttft", usual.ttft_ms), tbt_ms=self._typical("tbt", usual.tbt_ms))

    def _typical(self, kind: str, usual: float) -> float:
        limits = [self.limit(f"{kind}_{percentile}") for percentile in ("p95", "p99", "p50")]
        return next((limit for limit in limits if limit is not None), usual)

    @property
    def latency_kinds(self) -> tuple[str, ...]:
        """The kinds of latency that are bounded: of each, looser and tighter targets can be made."""
        bounded = {kind_of(clause.figure) for clause in self.clauses if clause.is_latency}
        return tuple(kind for kind in LATENCIES if kind in bounded)

    def scaled(self, kind: str, factor: float) -> "Target":
        """The same with the bounds on this kind of latency times a factor."""
        return Target(
            clauses=tuple(
                replace(clause, limit=clause.limit * factor)
                if clause.is_latency and kind_of(clause.figure) == kind
                else clause
                for clause in self.clauses
            )
        )

    def bound_of(self, kind: str) -> Clause:
        """The first bound on this kind of latency; StopIteration without one."""
        return next(one for one in self.clauses if one.is_latency and kind_of(one.figure) == kind)

    def below(self, floors_ms: Mapping[str, float]) -> Clause | None:
        """A bound on a kind of latency that is never below its floor there, so that nothing holds it."""
        of_kinds = [one for one in self.clauses if one.is_latency and kind_of(one.figure) in floors_ms]
        return next((one for one in of_kinds if one.limit < floors_ms[kind_of(one.figure)]), None)

    @property
    def hopeless_ttft_ms(self) -> float | None:
        """A 95th percentile of TTFT above which it is certain that a bound is broken, None if none is."""
        limits = [self.limit(f"ttft_{percentile}") for percentile in ("p95", "p99")]
        return min((limit for limit in limits if limit is not None), default=None)


def kind_of(figure: str) -> str:
    """`ttft` of `ttft_p95`."""
    return figure.partition("_")[0]


def figures_from(group: GroupSummary) -> dict[str, float | None]:
    """The figures of a summary by the names of FIGURES."""
    samples = {"ttft": group.ttft_ms, "tbt": group.itl_ms, "tpot": group.tpot_ms, "e2e": group.e2el_ms}
    found = {
        f"{kind}_{percentile}": _of(samples[kind], percentile)
        for kind in LATENCIES
        for percentile in PERCENTILES
    }
    return {**found, ATTAINMENT: group.attainment, GOODPUT: group.request_goodput}


def _of(sample: Distribution, percentile: str) -> float | None:
    return {"p50": sample.median, "p95": sample.p95, "p99": sample.p99}[percentile]


def _clause(text: str) -> Clause:
    match = _CLAUSE.fullmatch(text)
    if match is None:
        raise BadInputError(f"--slo: {text[:80]!r}; {_FORM}")
    figure, sign, unit = match["figure"], match["sign"], match["unit"]
    if figure not in FIGURES:
        known = f"{'|'.join(LATENCIES)} with _{'|_'.join(PERCENTILES)}, {ATTAINMENT}, {GOODPUT}"
        raise BadInputError(f"--slo: {figure[:40]!r} is no figure; expected of {known}")
    is_latency = figure in LATENCY_FIGURES
    if (sign[0] == "<") != is_latency:
        right = "< or <=" if is_latency else "> or >="
        raise BadInputError(f"--slo: {text[:80]!r}: expected {right} after {figure}")
    units = _units(figure)
    if unit not in units:
        right = " or ".join(name or "none" for name in units)
        raise BadInputError(f"--slo: {text[:80]!r}: unit {unit or 'none'}; expected {right} for {figure}")
    limit = float(match["number"]) * units[unit]
    if is_latency and not 0 < limit <= 1e12:
        raise BadInputError(f"--slo: {text[:80]!r}: expected a time above 0")
    if figure == ATTAINMENT and not 0 <= limit <= 1:
        raise BadInputError(f"--slo: {text[:80]!r}: expected a share from 0 to 1, or of 100 %")
    if figure == ATTAINMENT and sign == ">" and limit == 1:
        raise BadInputError(f"--slo: {text[:80]!r} can never be met; expected attainment>=1")
    return Clause(figure=figure, sign=sign, limit=limit)


def _units(figure: str) -> Mapping[str, float]:
    if figure in LATENCY_FIGURES:
        return _UNITS_MS
    return {"": 1.0, "%": 0.01} if figure == ATTAINMENT else {"": 1.0, "/s": 1.0}


def _plain(value: float) -> str:
    """Without an exponent, which the grammar has none of."""
    return f"{value:.12f}".rstrip("0").rstrip(".")
