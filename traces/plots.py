"""The plots of a run as PNG bytes, for light and for dark pages.

matplotlib is imported when the first plot is drawn, and only its object interface is used: no global
state, no display.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from traces.metrics import BASE_MODEL, UNKNOWN_RANK, Slo, attains, by_rank, itl_ms, ttft_ms
from traces.records import Outcome, RequestRecord

MAX_CURVE_POINTS = 2000
"""More points per curve than pixels across say nothing more."""

MAX_TIME_BINS = 60
_SHORT_LABEL = 14
_GROUPS = {BASE_MODEL: "base model", UNKNOWN_RANK: "rank unknown"}
_WIDTH_IN, _HEIGHT_IN, _DOTS_PER_IN = 5.8, 3.3, 180


@dataclass(frozen=True, slots=True, kw_only=True)
class Theme:
    """The colours of a page; `ramp` is the part of the viridis colour map that reads on it."""

    background: str
    text: str
    muted: str
    line: str
    accent: str
    second: str
    ramp: tuple[float, float]


LIGHT = Theme(
    background="#ffffff",
    text="#1f2328",
    muted="#667079",
    line="#dfe3e6",
    accent="#2f6f9f",
    second="#c26a1b",
    ramp=(0.0, 0.82),
)
DARK = Theme(
    background="#16191d",
    text="#e3e6e8",
    muted="#98a1a8",
    line="#343a40",
    accent="#6fb1e0",
    second="#e6a15c",
    ramp=(0.28, 1.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One plot: the stem of its file, what it shows, and how to draw it for a theme."""

    name: str
    caption: str
    draw: Callable[[Theme], bytes]


def plots_of(records: Sequence[RequestRecord], slo: Slo) -> tuple[Plot, ...]:
    """All plots of a run; the warm-up is left out, except over time."""
    ranks = by_rank(record for record in records if not record.warmup)
    ttft = {name: [ttft_ms(record) for record in group] for name, group in ranks.items()}
    gaps = {name: [gap for record in group for gap in itl_ms(record)] for name, group in ranks.items()}
    share = {
        name: sum(attains(record, slo) for record in group) / len(group) for name, group in ranks.items()
    }
    return (
        Plot(
            name="ttft_cdf",
            caption="Time to first token per rank: the share of requests that had their first token by then."
            " A curve that stays below 100 % lacks the requests that failed.",
            draw=lambda theme: _cdf(ttft, slo.ttft_ms, "TTFT, ms", "requests", theme),
        ),
        Plot(
            name="tbt_cdf",
            caption="Time between tokens per rank: the share of all gaps that were no longer.",
            draw=lambda theme: _cdf(gaps, slo.tbt_ms, "gap between tokens, ms", "gaps", theme),
        ),
        Plot(
            name="attainment",
            caption="Share of the requests of each rank that met every target.",
            draw=lambda theme: _attainment(share, theme),
        ),
        Plot(
            name="over_time",
            caption="Load over the run, warm-up included: requests as they were due and as they completed,"
            " and output tokens as they arrived.",
            draw=lambda theme: _over_time(records, theme),
        ),
    )


def rank_label(name: str) -> str:
    """A rank group as a person reads it; any other name as it is."""
    if name in _GROUPS:
        return _GROUPS[name]
    return f"rank {name}" if name.isdigit() else name


def styled(theme: Theme) -> AbstractContextManager[Any]:
    """How everything drawn in this context looks."""
    import matplotlib

    context: AbstractContextManager[Any] = matplotlib.rc_context(
        {
            "font.size": 9.5,
            "font.family": "sans-serif",
            "text.color": theme.text,
            "axes.labelcolor": theme.muted,
            "axes.edgecolor": theme.line,
            "axes.facecolor": theme.background,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "figure.facecolor": theme.background,
            "grid.color": theme.line,
            "grid.linewidth": 0.7,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "ytick.left": False,
            "xtick.minor.bottom": False,
            "lines.linewidth": 1.9,
            "lines.solid_capstyle": "round",
            "legend.frameon": False,
        }
    )
    return context


def new_figure(height_in: float = _HEIGHT_IN) -> Any:
    """An empty matplotlib Figure of a plot's width."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH_IN, height_in), dpi=_DOTS_PER_IN, layout="constrained")


def png_of(figure: Any) -> bytes:
    """The figure as PNG."""
    buffer = io.BytesIO()
    # Without the version of matplotlib in it, the same run gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def rank_colours(names: Sequence[str], theme: Theme) -> dict[str, Any]:
    """Ranks are ordered, so they share one ramp; what has no rank is grey."""
    from matplotlib import colormaps

    ranks = [name for name in names if name not in (BASE_MODEL, UNKNOWN_RANK)]
    low, high = theme.ramp
    step = (high - low) / max(len(ranks) - 1, 1)
    ramp = {rank: colormaps["viridis"](low + index * step) for index, rank in enumerate(ranks)}
    return {name: ramp.get(name, theme.muted) for name in names}


def _cdf(
    samples: Mapping[str, Sequence[float]], target_ms: float, label: str, of: str, theme: Theme
) -> bytes:
    names = list(samples)
    curves = {name: _curve(sample) for name, sample in samples.items()}
    return curves_png(curves, rank_colours(names, theme), target_ms, label, of, theme)


def curves_png(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    colours: Mapping[str, Any],
    target_ms: float,
    label: str,
    of: str,
    theme: Theme,
) -> bytes:
    """Cumulative shares, `(ascending values above 0, shares)` by name, on a log axis with the target.

    A name is a rank group's or the label itself; `label` is the axis, `of` what is shared out.
    """
    from matplotlib.ticker import PercentFormatter

    shown = {name: curve for name, curve in curves.items() if len(curve[0])}
    with styled(theme):
        figure = new_figure()
        axes = figure.subplots()
        end_ms = 1.1 * max([target_ms, *(values[-1] for values, _ in shown.values())])
        for name, (values, shares) in shown.items():
            axes.step(
                [values[0], *values, end_ms],
                [0.0, *shares, shares[-1]],
                where="post",
                color=colours[name],
                label=rank_label(name),
                linestyle="--" if name in (BASE_MODEL, UNKNOWN_RANK) else "-",
            )
        if shown:
            _log_axis_with_target(axes, target_ms, end_ms, theme)
            legend_of(figure, list(shown))
        else:
            nothing_to_show(axes, theme)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_xlabel(label)
        axes.set_title(f"Share of {of} within", loc="left", fontsize=9.5, color=theme.muted)
        return png_of(figure)


def legend_of(figure: Any, labels: Sequence[str]) -> None:
    """The legend beside the axes, or below them where labels are long."""
    if max(map(len, labels), default=0) <= _SHORT_LABEL:
        figure.legend(loc="outside right center", handlelength=1.4)
    else:
        figure.legend(loc="outside lower center", handlelength=1.4, ncols=2, fontsize=8.5)


def _log_axis_with_target(axes: Any, target_ms: float, end_ms: float, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(right=end_ms)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.axvline(target_ms, color=theme.second, linewidth=1.2, linestyle=":")
    axes.annotate(
        f" target {target_ms:,g} ms",
        (target_ms, 0.03),
        xycoords=("data", "axes fraction"),
        color=theme.second,
        ha="right",
        rotation=90,
        fontsize=8.5,
    )


def _curve(sample: Sequence[float]) -> tuple[list[float], list[float]]:
    """Values and cumulative shares, thinned to what a picture can show; infinities only lower the top."""
    ordered = sorted(value for value in sample if math.isfinite(value))
    if not ordered:
        return [], []
    last = len(ordered) - 1
    count = min(len(ordered), MAX_CURVE_POINTS)
    places = sorted({round(index * last / max(count - 1, 1)) for index in range(count)} | {last})
    # A log axis has no zero; messages that came in one read are drawn at a microsecond.
    return [max(ordered[place], 1e-3) for place in places], [(place + 1) / len(sample) for place in places]


def _attainment(shares: Mapping[str, float], theme: Theme) -> bytes:
    from matplotlib.ticker import PercentFormatter

    with styled(theme):
        figure = new_figure(height_in=max(_HEIGHT_IN, 0.6 + 0.3 * len(shares)))
        axes = figure.subplots()
        names = list(shares)
        colours = rank_colours(names, theme)
        axes.barh([rank_label(name) for name in names], [1.0] * len(names), color=theme.line, height=0.56)
        axes.barh(
            [rank_label(name) for name in names],
            list(shares.values()),
            color=[colours[name] for name in names],
            height=0.56,
        )
        for place, share in enumerate(shares.values()):
            axes.annotate(f"{share:.1%}", (1.02, place), va="center", annotation_clip=False)
        if not names:
            axes.set_yticks([])
            nothing_to_show(axes, theme)
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.tick_params(axis="y", labelcolor=theme.text)
        axes.set_title("Share of requests inside every target", loc="left", fontsize=9.5, color=theme.muted)
        return png_of(figure)


def _over_time(records: Sequence[RequestRecord], theme: Theme) -> bytes:
    end_s = max((record.end_s for record in records), default=0.0)
    bins = min(MAX_TIME_BINS, max(1, math.ceil(end_s)))
    width_s = (end_s or 1.0) / bins
    due, done, tokens = [0.0] * bins, [0.0] * bins, [0.0] * bins
    for record in records:
        due[_bin(record.scheduled_s, width_s, bins)] += 1 / width_s
        if record.outcome is Outcome.OK:
            done[_bin(record.end_s, width_s, bins)] += 1 / width_s
        for time_s, count in zip(record.message_times_s, record.message_tokens, strict=True):
            tokens[_bin(time_s, width_s, bins)] += count / width_s
    edges_s = [index * width_s for index in range(bins + 1)]
    with styled(theme):
        figure = new_figure()
        upper, lower = figure.subplots(2, 1, sharex=True)
        upper.stairs(due, edges_s, color=theme.muted, linewidth=1.4, label="due")
        upper.stairs(done, edges_s, color=theme.accent, linewidth=1.9, label="completed")
        lower.stairs(tokens, edges_s, color=theme.accent, alpha=0.25, fill=True)
        lower.stairs(tokens, edges_s, color=theme.accent, linewidth=1.4)
        upper.legend(loc="upper right", ncols=2, bbox_to_anchor=(1, 1.28), handlelength=1.2)
        for axes, title in ((upper, "Requests per second"), (lower, "Output tokens per second")):
            axes.set_title(title, loc="left", fontsize=9.5, color=theme.muted)
            axes.set_ylim(bottom=0)
            axes.grid(visible=False, axis="x")
            axes.set_xlim(0, edges_s[-1])
        lower.set_xlabel("seconds since the start")
        return png_of(figure)


def _bin(time_s: float, width_s: float, bins: int) -> int:
    return min(max(int(time_s / width_s), 0), bins - 1)


def nothing_to_show(axes: Any, theme: Theme) -> None:
    """Say so on empty axes."""
    axes.annotate("nothing to show", (0.5, 0.5), xycoords="axes fraction", color=theme.muted, ha="center")
