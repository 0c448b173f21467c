"""Figures of runs against the rate or against replicas: a panel per trace, a line per policy, a band over
seeds."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from loraserve.experiments.report.aggregate import FIGURES, Aggregate, Setting, Spread
from loraserve.experiments.report.looks import (
    MAX_PANELS,
    Look,
    heading,
    legend_below,
    looks_of,
    panels,
    policy_handles,
)
from loraserve.experiments.spec import PublishedSection
from traces.plots import Theme

Series = Sequence[tuple[float, Spread]]
_LEAST = 1e-2


def against_rate(data: Aggregate, settings: Sequence[Setting], name: str, theme: Theme) -> bytes:
    """A figure against the rate: a panel per trace in one setting, or per setting on one trace."""
    lines = {
        (trace if len(settings) == 1 else data.setting_name(setting)): {
            policy: _over_rates(data, trace, setting, policy, name)
            for policy in data.policies
            if data.curve(trace, setting, policy) is not None
        }
        for setting in settings
        for trace in drawn_traces(data)
    }
    return _draw(data, lines, name, "requests/s", "rate_per_s", theme)


def against_replicas(data: Aggregate, setting: Setting, asked: str, name: str, theme: Theme) -> bytes:
    """A figure at one rate against replicas, for a kernel and a profile."""
    settings = sorted(
        (one for one in data.runs() if (one.kernel, one.profile) == (setting.kernel, setting.profile)),
        key=lambda one: one.replicas,
    )
    lines: dict[str, dict[str, Series]] = {}
    for trace in drawn_traces(data):
        lines[trace] = {}
        for policy in data.policies:
            curves = [(one, data.curve(trace, one, policy)) for one in settings]
            lines[trace][policy] = [
                (float(one.replicas), spread)
                for one, curve in curves
                if curve is not None
                for point in curve.points
                if point.asked == asked and (spread := point.figures[name]) is not None
            ]
    return _draw(data, lines, name, "replicas", "replicas", theme)


def drawn_traces(data: Aggregate) -> tuple[str, ...]:
    """The traces that have a panel."""
    return data.traces[:MAX_PANELS]


def target_of(data: Aggregate, name: str) -> float | None:
    """The SLO's target of a figure."""
    slo = data.result.experiment.slo
    return {"ttft_p95_ms": slo.ttft_ms, "tbt_p95_ms": slo.tbt_ms}.get(name)


def _over_rates(data: Aggregate, trace: str, setting: Setting, policy: str, name: str) -> Series:
    curve = data.curve(trace, setting, policy)
    points = curve.points if curve is not None else ()
    there = [(point.rate_per_s, spread) for point in points if (spread := point.figures[name]) is not None]
    return sorted(there, key=lambda one: one[0])


def _draw(
    data: Aggregate,
    lines: Mapping[str, Mapping[str, Series]],
    name: str,
    below: str,
    over: str,
    theme: Theme,
) -> bytes:
    looks = looks_of(data.policies)
    published = [one for one in data.result.experiment.published if one.figure == name and one.over == over]
    target = target_of(data, name)
    handles = [*policy_handles(looks, theme), *_other_handles(published, target, theme)]
    with panels(len(lines), theme, legend=[str(one.get_label()) for one in handles]) as made:
        limits = _limits(name, lines, published, target)
        for place, (trace, of_policy) in enumerate(lines.items()):
            axes = made.axes[place]
            _axis(axes, name, limits)
            for policy, series in of_policy.items():
                _line(axes, series, looks[policy], limits[1], theme)
            for one, style in zip(published, _published_styles(), strict=False):
                xs, ys = zip(*sorted(one.points), strict=True)
                axes.plot(xs, ys, color=theme.text, linewidth=1.3, **style)
            if target is not None:
                axes.axhline(target, color=theme.second, linewidth=1.1, linestyle=":")
            heading(axes, trace, theme)
            axes.tick_params(labelsize=8.5)
            if made.is_lowest(place):
                axes.set_xlabel(below, fontsize=8.5)
        legend_below(made, handles)
        return made.png()


def _line(axes: Any, series: Series, look: Look, top: float, theme: Theme) -> None:
    finite = [(x, spread) for x, spread in series if not math.isinf(spread.median)]
    colour = look.colour(theme)
    if finite:
        xs = [x for x, _ in finite]
        low = [max(spread.lowest, _LEAST) for _, spread in finite]
        high = [min(spread.highest, top * 10) for _, spread in finite]
        if low != high:
            axes.fill_between(xs, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(
            xs,
            [spread.median for _, spread in finite],
            color=colour,
            linestyle=look.line,
            marker=look.marker,
            ms=4.2,
            markeredgewidth=0,
            linewidth=1.5,
        )
    late = [x for x, spread in series if math.isinf(spread.median)]
    # What never came stands at the top edge, hollow, and joined to nothing.
    axes.plot(late, [top] * len(late), look.marker, ms=5, mfc="none", mec=colour, clip_on=False)


def _limits(
    name: str,
    lines: Mapping[str, Mapping[str, Series]],
    published: Sequence[PublishedSection],
    target: float | None,
) -> tuple[float, float]:
    figure = FIGURES[name]
    if figure.is_share:
        return 0.0, 1.02
    values = [
        value
        for of_policy in lines.values()
        for series in of_policy.values()
        for _, spread in series
        for value in (spread.lowest, spread.median, spread.highest)
        if not math.isinf(value)
    ]
    values += [y for one in published for _, y in one.points]
    values += [target] if target is not None else []
    least, most = min(values, default=0.0), max(values, default=1.0)
    if not figure.is_log:
        return 0.0, 1.06 * most or 1.0
    least = max(least, _LEAST)
    return least / 1.25, max(most, least * 1.5) * 1.25


def _axis(axes: Any, name: str, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

    figure = FIGURES[name]
    if figure.is_log:
        axes.set_yscale("log")
        subs = (1.0,) if limits[1] / limits[0] > 2000 else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    elif figure.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(*limits)


def _published_styles() -> Iterator[dict[str, Any]]:
    for marker in ("x", "+", "1", "2", "3", "4", "|", "_"):
        yield {"marker": marker, "linestyle": "--", "ms": 5}


def _other_handles(published: Sequence[PublishedSection], target: float | None, theme: Theme) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=theme.text, linewidth=1.3, label=one.name, **style)
        for one, style in zip(published, _published_styles(), strict=False)
    ]
    if target is not None:
        label = f"target {target:,g} ms"
        handles.append(Line2D([], [], color=theme.second, linewidth=1.1, linestyle=":", label=label))
    return handles
