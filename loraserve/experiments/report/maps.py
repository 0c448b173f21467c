"""Maps of replicas and ranks over time, policies side by side."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from loraserve.experiments.report.aggregate import Aggregate, Setting
from loraserve.experiments.report.looks import heading, panels
from loraserve.experiments.results import RankMap
from traces.plots import Theme

MAX_MAPS = 6
_FAINTEST = 0.22
_BAR_IN = 0.75
_COLOURS = 255


def mapped_trace(data: Aggregate, setting: Setting) -> str | None:
    """The trace whose maps are drawn: the one on which the policies differ most in their highest rate, or
    else in TTFT p95; None if there is no map."""
    best, most = None, -1.0
    for trace in data.traces:
        if not mapped_policies(data, trace, setting):
            continue
        apart = _apart(data, trace, setting)
        if apart > most:
            best, most = trace, apart
    return best


def mapped_policies(data: Aggregate, trace: str, setting: Setting) -> list[str]:
    """The first policies with a map, in the experiment's order."""
    there = [
        policy
        for policy in data.policies
        if (curve := data.curve(trace, setting, policy)) is not None and curve.rank_map is not None
    ]
    return there[:MAX_MAPS]


def rank_maps(data: Aggregate, trace: str, setting: Setting, theme: Theme) -> bytes:
    """One panel per policy: replicas down, time across, the colour the largest rank in a step, the fainter
    the less of the time was computed in."""
    policies = mapped_policies(data, trace, setting)
    maps = {policy: _map(data, trace, setting, policy) for policy in policies}
    scale = _scale(list(maps.values()))
    rows = max(len(one.rank) for one in maps.values())
    height_in = max(0.7, min(3.2, 0.14 * rows + 0.2))
    with panels(len(maps), theme, height_in=height_in, right_in=_BAR_IN) as made:
        for place, (policy, one) in enumerate(maps.items()):
            axes = made.axes[place]
            axes.imshow(
                _colours(one, scale, theme),
                aspect="auto",
                interpolation="nearest",
                extent=(one.edges_s[0], one.edges_s[-1], len(one.rank) - 0.5, -0.5),
            )
            axes.grid(visible=False)
            axes.set_yticks(range(0, len(one.rank), len(one.rank) // 8 + 1))
            axes.tick_params(labelsize=8.5)
            if made.is_lowest(place):
                axes.set_xlabel("seconds since the start", fontsize=8.5)
            if place % made.across == 0:
                axes.set_ylabel("replica", fontsize=8.5)
            heading(axes, policy, theme)
        _bar(made, scale, theme)
        return made.png(_COLOURS)


def _map(data: Aggregate, trace: str, setting: Setting, policy: str) -> RankMap:
    curve = data.curve(trace, setting, policy)
    assert curve is not None  # `mapped_policies` has looked
    assert curve.rank_map is not None
    return curve.rank_map


def _scale(maps: Sequence[RankMap]) -> Any:
    from matplotlib.colors import LogNorm

    known = [rank for one in maps for row in one.rank for rank in row if rank]
    low, high = min(known, default=8.0), max(known, default=16.0)
    return LogNorm(low if low < high else high / 2, high)


def _colours(one: RankMap, scale: Any, theme: Theme) -> Any:
    from matplotlib.colors import to_rgb

    rank = np.array([[math.nan if value is None else value for value in row] for row in one.rank])
    has_rank = rank > 0
    shown = _ramp(theme)(scale(np.where(has_rank, rank, 1.0)))[..., :3]
    weight = np.where(has_rank, _FAINTEST + (1 - _FAINTEST) * np.array(one.busy), 0.0)[..., None]
    return shown * weight + np.array(to_rgb(theme.background)) * (1 - weight)


def _ramp(theme: Theme) -> Any:
    """The part of viridis that stands out on the page, so that a low rank is not taken for little work."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(*theme.ramp, 64)))


def _bar(made: Any, scale: Any, theme: Theme) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    width_in = made.figure.get_size_inches()[0]
    top = made.axes[0].get_position()
    box = ((width_in - _BAR_IN + 0.15) / width_in, top.y0, 0.11 / width_in, top.height)
    bar = made.figure.colorbar(
        ScalarMappable(norm=scale, cmap=_ramp(theme)),
        cax=made.figure.add_axes(box),
        ticks=LogLocator(base=2, numticks=8),
        format=FuncFormatter(lambda value, _: f"{value:g}"),
    )
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=theme.muted)
    bar.ax.set_title("rank", fontsize=8.5, color=theme.muted, loc="left", pad=4)


def _apart(data: Aggregate, trace: str, setting: Setting) -> float:
    curves = [data.curve(trace, setting, policy) for policy in data.policies]
    rates = [one.highest.median for one in curves if one is not None and one.highest is not None]
    if rates and min(rates) > 0:
        return max(rates) / min(rates)
    late = [
        min(spread.median, 1e9)
        for one in curves
        for point in (one.points if one is not None else ())
        if (spread := point.figures["ttft_p95_ms"]) is not None
    ]
    return max(late) / max(min(late), 1e-3) if late else 0.0
