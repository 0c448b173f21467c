"""The tables of a report as values, before they are drawn for a terminal, a page or a Markdown file."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loraserve.experiments.report.aggregate import (
    FIGURES,
    Aggregate,
    Curve,
    Setting,
    Spread,
    rate_text,
)
from loraserve.experiments.report.claims import ClaimCase, ClaimFound, case_name, value_text

NOTHING = "–"
NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One figure: its median, the range over seeds where there is one, and whether none of its row is
    better."""

    text: str
    range: str = ""
    is_best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of a table; those of one `group` stand together."""

    name: str
    cells: tuple[Cell, ...]
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table; each row has as many cells as there are `columns`. Cells of `is_text` are read, not
    compared."""

    anchor: str
    title: str
    note: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    is_text: bool = False


def grids(data: Aggregate) -> tuple[Grid, ...]:
    """The tables of figures that this experiment has."""
    made = [highest_grid(data), fewest_grid(data)]
    known = {"ttft_p95_ms", *(name for name, _, _ in _AT_MIDDLE_RATE)}
    for name in ("ttft_p95_ms", *(name for name in data.asked_for if name not in known)):
        anchor = "ttft" if name == "ttft_p95_ms" else AT_RATES + name
        made.append(figure_grid(data, name, FIGURES[name].title, anchor))
    middle = data.middle_rate
    if middle is not None:
        made += [figure_grid(data, *one, only=middle) for one in _AT_MIDDLE_RATE]
    return tuple(grid for grid in made if grid.rows)


AT_RATES = "at-rates-"
"""The anchors of tables of figures that claims and published lines are about begin with it."""
_AT_MIDDLE_RATE = (
    ("tbt_p95_ms", "TBT p95, ms", "tbt"),
    ("attainment", "Attainment", "attainment"),
    ("resident_bytes", "Resident adapters per replica, MiB", "resident"),
    ("bytes_moved", "Adapters moved, MiB", "moved"),
)


def highest_grid(data: Aggregate) -> Grid:
    """The highest rates inside the SLO."""

    def cell(curve: Curve) -> tuple[Spread | None, str]:
        spread = curve.highest
        return spread, NEVER if spread is not None and not spread.median else _text(spread)

    rows = [
        Row(
            group=data.setting_name(setting),
            name=trace,
            cells=_cells(data, trace, setting, cell, more_is_better=True),
        )
        for setting in data.runs()
        for trace in data.traces
        if any(
            (curve := data.curve(trace, setting, policy)) and curve.highest is not None
            for policy in data.policies
        )
    ]
    return Grid(
        anchor="highest",
        title="Highest rate inside the SLO, requests/s",
        note=f"{_slo(data)}{_over_seeds(data)} “{NEVER}”: no rate that was tried held.",
        corner="Workload",
        columns=data.policies,
        rows=tuple(rows),
    )


def fewest_grid(data: Aggregate) -> Grid:
    """The fewest replicas inside the SLO."""
    most = data.result.experiment.find.most_replicas
    rows: list[Row] = []
    for setting in data.searches():
        for trace in data.traces:
            curves = [data.curve(trace, setting, policy) for policy in data.policies]
            first = next((curve for curve in curves if curve is not None and curve.fewest), None)
            for at, one in enumerate(first.fewest if first else ()):

                def cell(curve: Curve, at: int = at) -> tuple[Spread | None, str]:
                    spread = curve.fewest[at].replicas if at < len(curve.fewest) else None
                    return spread, replicas_text(spread.median, most) if spread else NOTHING

                name = f"{trace}, {rate_text(one.asked, one.rate_per_s)}"
                cells = _cells(data, trace, setting, cell, most=most)
                rows.append(Row(group=data.setting_name(setting), name=name, cells=cells))
    return Grid(
        anchor="fewest",
        title="Fewest replicas inside the SLO",
        note=f"{_slo(data)}{_over_seeds(data)} “> {most}”: not on {most} either, the most that were tried.",
        corner="Workload",
        columns=data.policies,
        rows=tuple(rows),
    )


def figure_grid(data: Aggregate, name: str, title: str, anchor: str, *, only: str | None = None) -> Grid:
    """One figure at the experiment's rates, or at one of them only."""
    figure = FIGURES[name]
    rows: list[Row] = []
    for setting in data.runs():
        for trace in data.traces:
            curves = [data.curve(trace, setting, policy) for policy in data.policies]
            first = next((curve for curve in curves if curve is not None), None)
            for at, one in enumerate(first.points if first else ()):
                if only not in (None, one.asked):
                    continue

                def cell(curve: Curve, at: int = at) -> tuple[Spread | None, str]:
                    spread = curve.points[at].figures[name] if at < len(curve.points) else None
                    return spread, _text(spread, is_share=figure.is_share)

                name_of_row = f"{trace}, {rate_text(one.asked, one.rate_per_s)}"
                cells = _cells(data, trace, setting, cell, more_is_better=figure.more_is_better)
                rows.append(Row(group=data.setting_name(setting), name=name_of_row, cells=cells))
    infinite = " ∞: too many requests failed for a finite figure." if figure.is_log else ""
    return Grid(
        anchor=anchor,
        title=title,
        note=f"{_over_seeds(data).strip()}{infinite}".strip(),
        corner="Workload and rate",
        columns=data.policies,
        rows=tuple(rows),
    )


def claims_grid(data: Aggregate, found: Sequence[ClaimFound]) -> Grid:
    """What was published beside what was found, a row each."""
    rows = []
    for place, one in enumerate(found):
        claim, best = one.claim, one.best
        cells = (
            one.verdict,
            f"{claim.paper:g}" if claim.paper is not None else NOTHING,
            _best_text(one),
            value_text(one.typical) if one.typical is not None else NOTHING,
            case_name(data, best) if best is not None else NOTHING,
            f"{claim.policy} over {claim.over}" if claim.over else claim.policy,
        )
        name = f"{place + 1}. {claim.text}" + (f" ({claim.source})" if claim.source else "")
        rows.append(Row(name=name, cells=tuple(Cell(text=text) for text in cells)))
    return Grid(
        anchor="claims",
        title="What was published, and what was found here",
        note="Ratios are above 1 where the first policy is better. “Best” is the best case, “middle” the"
        f" median of all cases.{_over_seeds(data)}",
        corner="Published",
        columns=("Verdict", "Paper", "Best", "Middle", "Best on", "Policies"),
        rows=tuple(rows),
        is_text=True,
    )


def _best_text(one: ClaimFound) -> str:
    best = one.best
    if best is None or best.value is None:
        return NOTHING
    text = value_text(best.value.median, is_bound=best.is_bound)
    return f"{text} {one.unit}".strip()


def cases_grid(data: Aggregate, found: ClaimFound) -> Grid:
    """The cases of a claim: a row per trace, a column per setting, in each the rate that is best for it."""
    settings = tuple(dict.fromkeys(case.setting for case in found.cases))
    traces = tuple(dict.fromkeys(case.trace for case in found.cases))
    rows = []
    for trace in traces:
        of = [
            [case for case in found.cases if (case.trace, case.setting) == (trace, setting)]
            for setting in settings
        ]
        rows.append(Row(name=trace, cells=tuple(_case_cell(found, cases) for cases in of)))
    what = "How many times better" if found.claim.over else found.unit
    return Grid(
        anchor="",
        title="",
        note=f"{what}, at the rate where it is most, with the least and the most of the seeds."
        if any(case.rate for case in found.cases)
        else f"{what}, with the least and the most of the seeds.",
        corner="Workload",
        columns=tuple(data.setting_name(setting) or "Here" for setting in settings),
        rows=tuple(rows),
    )


def _case_cell(found: ClaimFound, cases: Sequence[ClaimCase]) -> Cell:
    best = found.best_of(cases)
    if best is None or best.value is None:
        return Cell(text=NOTHING, range="; ".join(dict.fromkeys(case.note for case in cases)))
    low, high = value_text(best.value.lowest), value_text(best.value.highest)
    parts = [f"{low} to {high}" if low != high else "", best.rate and f"at {best.rate}", best.note]
    return Cell(
        text=value_text(best.value.median, is_bound=best.is_bound),
        range=", ".join(part for part in parts if part),
        is_best=best is found.best,
    )


def figure_text(value: float) -> str:
    """A figure of three digits or more, '∞' for what never came."""
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"


def _text(spread: Spread | None, *, is_share: bool = False) -> str:
    if spread is None:
        return NOTHING
    return share_text(spread.median) if is_share else figure_text(spread.median)


def share_text(value: float) -> str:
    """A share as per cent."""
    return f"{value:.1%}"


def replicas_text(value: float, most: int) -> str:
    """A number of replicas over seeds, which need not be whole."""
    return f"> {most}" if math.isinf(value) else f"{value:g}"


def _cells(
    data: Aggregate,
    trace: str,
    setting: Setting,
    cell: Callable[[Curve], tuple[Spread | None, str]],
    *,
    more_is_better: bool = False,
    most: int | None = None,
) -> tuple[Cell, ...]:
    curves = [data.curve(trace, setting, policy) for policy in data.policies]
    found = [cell(curve) if curve is not None else (None, NOTHING) for curve in curves]
    medians = [spread.median for spread, _ in found if spread is not None]
    best = (max if more_is_better else min)(medians, default=None)
    # What reads the same is as good, and where all are the same none is the best.
    same = {text for spread, text in found if spread is not None and spread.median == best}
    is_distinct = len({text for spread, text in found if spread is not None}) > 1
    return tuple(
        Cell(text=text, range=_range(spread, text, most), is_best=is_distinct and text in same)
        for spread, text in found
    )


def _range(spread: Spread | None, text: str = "", most: int | None = None) -> str:
    if spread is None or spread.lowest == spread.highest:
        return ""
    if text.endswith("%"):
        low, high = share_text(spread.lowest), share_text(spread.highest)
    elif most is not None:
        low, high = replicas_text(spread.lowest, most), replicas_text(spread.highest, most)
    else:
        low, high = figure_text(spread.lowest), figure_text(spread.highest)
    return f"{low} to {high}" if low != high else ""


def _slo(data: Aggregate) -> str:
    slo = data.result.experiment.slo
    return f"TTFT p95 within {slo.ttft_ms:g} ms and TBT p95 within {slo.tbt_ms:g} ms."


def _over_seeds(data: Aggregate) -> str:
    if data.num_seeds == 1:
        return " One seed."
    return f" Medians over {data.num_seeds} seeds, with the least and the most where they differ."
