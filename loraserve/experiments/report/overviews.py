"""Figures that hold all policies beside each other: the highest rates, the fewest replicas, what adapters
cost."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from loraserve.experiments.report.against import drawn_traces, target_of
from loraserve.experiments.report.aggregate import (
    FIGURES,
    Aggregate,
    Curve,
    FewestAt,
    Figure,
    Setting,
    Spread,
)
from loraserve.experiments.report.looks import Look, heading, legend_below, looks_of, panels
from traces.plots import Theme

COSTS = ("bytes_moved", "cold_misses", "resident_bytes")
_GROUP = 0.84
_LETTER_IN = 0.071
_LOG_FROM = 30.0
_HIGHEST = Figure(label="Requests/s", unit="", read=lambda point: point.rate_per_s, more_is_better=True)


Read = Callable[[Curve], Spread | None]


def highest_bars(data: Aggregate, settings: Sequence[Setting], theme: Theme) -> bytes:
    """The highest rate inside the SLO: a panel per setting, a group of bars per trace."""
    return _all_bars(data, settings, lambda curve: curve.highest, _HIGHEST, theme)


def figure_bars(data: Aggregate, settings: Sequence[Setting], name: str, theme: Theme) -> bytes:
    """A figure at the one rate there is, likewise."""
    figure = FIGURES[name]

    def read(curve: Curve) -> Spread | None:
        return curve.points[0].figures[name] if curve.points else None

    return _all_bars(data, settings, read, figure, theme, target=target_of(data, name))


def _all_bars(
    data: Aggregate,
    settings: Sequence[Setting],
    read: Read,
    figure: Figure,
    theme: Theme,
    *,
    target: float | None = None,
) -> bytes:
    looks, traces = looks_of(data.policies), drawn_traces(data)
    width_in = max(5.0, min(9.2, 0.085 * len(traces) * len(looks) + 1.2))
    with panels(len(settings), theme, across=1, width_in=width_in, legend=list(looks)) as made:
        for axes, setting in zip(made.axes, settings, strict=True):
            for place, (policy, look) in enumerate(looks.items()):
                spreads = {
                    at: spread
                    for at, trace in enumerate(traces)
                    if (curve := data.curve(trace, setting, policy)) is not None
                    and (spread := read(curve)) is not None
                }
                _bars(axes, spreads, look, (place, len(looks)), theme)
            names = traces if axes is made.axes[-1] else [""] * len(traces)
            axes.set_xticks(range(len(traces)), names, fontsize=8.5)
            if len(traces) > 6:
                axes.tick_params(axis="x", rotation=18)
            axes.tick_params(axis="x", length=0, labelcolor=theme.text)
            axes.grid(visible=False, axis="x")
            axes.set_xlim(-0.55, len(traces) - 0.45)
            _upwards(axes, figure)
            if target is not None:
                axes.axhline(target, color=theme.second, linewidth=1.1, linestyle=":")
            heading(axes, data.setting_name(setting) or figure.title, theme)
        legend_below(made, _patches(looks, theme))
        return made.png()


def _upwards(axes: Any, figure: Figure) -> None:
    """The axis of bars: from nothing, but where most are too short to be seen next to the longest."""
    from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

    heights = [bar.get_height() for bar in axes.patches if bar.get_height() > 0]
    if figure.is_share:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    elif figure.is_log and heights and max(heights) > _LOG_FROM * min(heights):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=9))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(_plain())
        axes.set_ylim(min(heights) / 2, max(heights) * 1.5)
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(_plain())


def _bars(axes: Any, spreads: Mapping[int, Spread], look: Look, place: tuple[int, int], theme: Theme) -> None:
    width = _GROUP / place[1]
    shift = (place[0] + 0.5) * width - _GROUP / 2
    colour = look.colour(theme)
    finite = {at + shift: one for at, one in spreads.items() if not math.isinf(one.median)}
    axes.bar(
        list(finite),
        [spread.median for spread in finite.values()],
        width * 0.92,
        color=colour,
        hatch=_hatch(look),
        edgecolor=theme.background,
        linewidth=0,
    )
    ranges = [
        (x, one) for x, one in finite.items() if one.lowest != one.highest and not math.isinf(one.highest)
    ]
    axes.vlines(
        [x for x, _ in ranges],
        [one.lowest for _, one in ranges],
        [one.highest for _, one in ranges],
        color=theme.text,
        linewidth=0.8,
    )
    # Nothing is there to be drawn for what never held, or never came.
    never = [at + shift for at, one in spreads.items() if one.median in (0.0, math.inf)]
    bottom = axes.get_xaxis_transform()
    axes.plot(never, [0] * len(never), "x", ms=4, color=colour, clip_on=False, transform=bottom)


def _hatch(look: Look) -> str:
    # Every other look has a broken line: the same ones are hatched, so that grey tells neighbours apart.
    return "" if look.line == "-" else "/////"


def _patches(looks: Mapping[str, Look], theme: Theme) -> list[Any]:
    from matplotlib.patches import Patch

    return [
        Patch(
            facecolor=look.colour(theme),
            hatch=_hatch(look),
            edgecolor=theme.background,
            linewidth=0,
            label=policy,
        )
        for policy, look in looks.items()
    ]


def fewest_probes(data: Aggregate, setting: Setting, at: int, theme: Theme) -> bytes:
    """What was tried for the fewest replicas at a rate: a panel per trace, a line per policy, a dot per
    number of replicas; filled where it held in every seed, half where in some."""
    looks, traces = looks_of(data.policies), drawn_traces(data)
    tried = [
        replicas
        for trace in traces
        for policy in looks
        if (one := _fewest(data, trace, setting, policy, at)) is not None
        for replicas in one.held
    ] or [1]
    height_in = max(1.0, 0.17 * len(looks) + 0.25)
    with panels(len(traces), theme, height_in=height_in, left_in=_names_in(looks), width_in=2.3) as made:
        for place, (axes, trace) in enumerate(zip(made.axes, traces, strict=True)):
            for row, (policy, look) in enumerate(looks.items()):
                one = _fewest(data, trace, setting, policy, at)
                if one is not None:
                    _probes(axes, one, row, look.colour(theme))
            _names(axes, list(looks) if place % made.across == 0 else [""] * len(looks), theme)
            axes.set_xlim(min(tried) - 0.8, max(tried) + 0.8)
            _whole_ticks(axes)
            heading(axes, trace, theme)
            if made.is_lowest(place):
                axes.set_xlabel("replicas", fontsize=8.5)
        return made.png()


def _fewest(data: Aggregate, trace: str, setting: Setting, policy: str, at: int) -> FewestAt | None:
    curve = data.curve(trace, setting, policy)
    return curve.fewest[at] if curve is not None and at < len(curve.fewest) else None


def _probes(axes: Any, one: FewestAt, row: int, colour: str) -> None:
    if not math.isinf(one.replicas.median):
        axes.plot([one.replicas.median], [row], "o", ms=10.5, mfc="none", mec=colour, mew=1.2)
    for replicas, (held, tried) in one.held.items():
        style = "full" if held == tried else "none" if not held else "left"
        axes.plot(
            [replicas], [row], "o", ms=5.2, color=colour, fillstyle=style, mew=0.9, markerfacecoloralt="none"
        )


def costs(data: Aggregate, setting: Setting, asked: str, theme: Theme) -> bytes:
    """Bytes moved, cold misses and resident bytes at a rate: a line per policy, its bar the median over
    traces, a dot for each."""
    looks = looks_of(data.policies)
    height_in = max(0.9, 0.22 * len(looks) + 0.2)
    with panels(len(COSTS), theme, height_in=height_in, left_in=_names_in(looks), width_in=2.3) as made:
        for place, (axes, name) in enumerate(zip(made.axes, COSTS, strict=True)):
            for row, (policy, look) in enumerate(looks.items()):
                values = _at(data, setting, policy, asked, name)
                if values:
                    colour = look.colour(theme)
                    axes.barh([row], [statistics.median(values)], 0.62, color=colour, alpha=0.45, linewidth=0)
                    axes.plot(values, [row] * len(values), look.marker, ms=3.6, color=colour, mew=0.4)
            _names(axes, list(looks) if place == 0 else [""] * len(looks), theme)
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter(_plain())
            heading(axes, FIGURES[name].title, theme)
        return made.png()


def _at(data: Aggregate, setting: Setting, policy: str, asked: str, name: str) -> list[float]:
    found = []
    for trace in data.traces:
        curve = data.curve(trace, setting, policy)
        for point in curve.points if curve is not None else ():
            spread = point.figures[name]
            if point.asked == asked and spread is not None:
                found.append(spread.median)
    return found


def _names_in(names: Iterable[str]) -> float:
    """Room for the longest of these."""
    return max(0.9, 0.15 + _LETTER_IN * max(map(len, names), default=0))


def _names(axes: Any, names: Sequence[str], theme: Theme) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.tick_params(axis="y", labelcolor=theme.text, length=0)
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _whole_ticks(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _plain() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:,g}")
