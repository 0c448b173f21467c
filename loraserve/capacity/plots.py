"""The plots of a search for capacity as PNG bytes: figures over replicas, and replicas over the target.

matplotlib is imported when the first plot is drawn, as in `traces.plots`, whose style this is.
"""

import math
from collections.abc import Sequence
from typing import Any

from loraserve.capacity.answers import Answer, Candidate, Found
from loraserve.capacity.slo import Clause
from loraserve.capacity.words import policy_text
from traces.plots import Plot, Theme, new_figure, png_of, styled


def plots_of(found: Found) -> tuple[Plot, ...]:
    """One for each bound, and one of cost against the target for each kind of latency that was varied."""
    plots = [_over_replicas(found, clause) for clause in found.target.clauses]
    drawn = {point.kind for answer in found.answers for point in answer.curve}
    plots += [_over_targets(found, kind) for kind in found.target.latency_kinds if kind in drawn]
    return tuple(plots)


def title_of(clause: Clause) -> str:
    """A figure as a person reads it: `TTFT p95, ms`."""
    kind, _, percentile = clause.figure.partition("_")
    if clause.is_latency:
        return f"{kind.upper()} {percentile}, ms"
    return "attainment" if clause.figure == "attainment" else "goodput, requests/s"


def _over_replicas(found: Found, clause: Clause) -> Plot:
    return Plot(
        name=f"by_replicas_{clause.figure}",
        caption=f"{title_of(clause)} over the number of replicas, the best mix of each: a line through the"
        " worst seeds, a dot for each seed, a triangle where a run was given up as it was sure to miss."
        " Dashed: the bound.",
        draw=lambda theme: _draw_replicas(found, clause, theme),
    )


def _draw_replicas(found: Found, clause: Clause, theme: Theme) -> bytes:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    with styled(theme):
        figure = new_figure()
        axes = figure.subplots()
        values = [clause.limit]
        for answer in found.answers:
            colour, line = _style(found, answer)
            shown = _best_of_each(found, answer)
            worst = [(one.replicas, _finite(one.worst(clause.figure))) for one in shown]
            drawn = [(number, value) for number, value in worst if value is not None]
            label = policy_text(answer.policy, answer.what_if)
            axes.plot(*_columns(drawn), line, color=colour, label=label)
            for one in shown:
                values += _draw_seeds(axes, one, clause, colour)
        axes.axhline(clause.limit, color=theme.second, linestyle="--", linewidth=1.2)
        if clause.is_latency and max(values) > 8 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif clause.is_latency:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("replicas")
        axes.set_ylabel(title_of(clause))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        return png_of(figure)


def _draw_seeds(axes: Any, one: Candidate, clause: Clause, colour: Any) -> list[float]:
    """The seeds of a candidate; gives the values drawn."""
    drawn = []
    for run in one.figures.values():
        if run.gave_up_ms is None:
            value, marker = _finite(run.figures[clause.figure]), "o"
        else:
            value, marker = (run.gave_up_ms if clause.figure == "ttft_p95" else None), "^"
        if value is not None and value > 0:
            axes.plot([one.replicas], [value], marker, color=colour, markersize=4 if marker == "o" else 6)
            drawn.append(value)
    return drawn


def _over_targets(found: Found, kind: str) -> Plot:
    cost = "" if found.price is None else ", and what they cost per hour"
    return Plot(
        name=f"cost_{kind}",
        caption=f"The fewest replicas that hold{cost}, over the bound on {kind.upper()}; the other bounds"
        " stay as they are. Dotted: the bound asked for. A cross: not even so many hold.",
        draw=lambda theme: _draw_targets(found, kind, theme),
    )


def _draw_targets(found: Found, kind: str, theme: Theme) -> bytes:
    from matplotlib.ticker import NullFormatter

    clause = found.target.bound_of(kind)
    with styled(theme):
        figure = new_figure()
        axes = figure.subplots()
        highest = 1
        bounds: list[float] = []
        for answer in found.answers:
            colour, line = _style(found, answer)
            points = [point for point in answer.curve if point.kind == kind]
            bounds = [point.factor * clause.limit for point in points] or bounds
            held = [(one.factor * clause.limit, one.replicas) for one in points if one.replicas is not None]
            missed = [(one.factor * clause.limit, one.tried) for one in points if one.replicas is None]
            label = policy_text(answer.policy, answer.what_if)
            axes.plot(*_columns(held), f"o{line}", color=colour, label=label, drawstyle="steps-post")
            axes.plot(*_columns(missed), "x", color=colour, markersize=7, clip_on=False)
            highest = max([highest, *(number for _, number in (*held, *missed))])
        axes.axvline(clause.limit, color=theme.muted, linestyle=":", linewidth=1.2)
        axes.set_xscale("log")
        axes.set_xticks(bounds, [f"{bound:,.0f}" if bound >= 10 else f"{bound:.3g}" for bound in bounds])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(0, highest * 1.15)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(f"bound on {title_of(clause)}")
        axes.set_ylabel("replicas")
        if found.price is not None:
            price = found.price.per_hour(1)
            other = axes.secondary_yaxis(
                "right", functions=(lambda number: number * price, lambda money: money / price)
            )
            other.set_ylabel("price per hour")
        axes.legend(loc="lower left")
        return png_of(figure)


def _best_of_each(found: Found, answer: Answer) -> list[Candidate]:
    """The candidate of each number of replicas that leaves most unused."""
    best: dict[int, Candidate] = {}
    for one in found.candidates:
        if (one.policy, one.what_if) == (answer.policy, answer.what_if):
            kept = best.get(one.replicas)
            if kept is None or (-one.num_held, one.used) < (-kept.num_held, kept.used):
                best[one.replicas] = one
    return [best[number] for number in sorted(best)]


def _style(found: Found, answer: Answer) -> tuple[Any, str]:
    from matplotlib import colormaps

    policies = list(dict.fromkeys(one.policy for one in found.answers))
    colour = colormaps["tab10"](policies.index(answer.policy) % 10)
    return colour, "--" if answer.what_if else "-"


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
