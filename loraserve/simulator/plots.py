"""The plots of simulations as PNG bytes: several side by side, and one over time.

matplotlib is imported when the first plot is drawn, as in `traces.plots`, whose style this is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loraserve.simulator.figures import Curve, Floats, RunFigures
from traces.plots import (
    Plot,
    Theme,
    curves_png,
    legend_of,
    new_figure,
    nothing_to_show,
    png_of,
    rank_colours,
    rank_label,
    styled,
)
from traces.runs.run_metrics import ALL

MAX_REPLICA_LABELS = 16
_LEAST_MS = 1e-3
_CATEGORIES = {False: "tab10", True: "tab20"}
_TITLE: Mapping[str, Any] = {"loc": "left", "fontsize": 9.5}


def comparison_plots(runs: Mapping[str, RunFigures]) -> tuple[Plot, ...]:
    """The plots in which each of these runs, by its label, is a curve."""
    slo = next(iter(runs.values())).summary.slo
    ttft = {label: _points(run.pictures.ttft[ALL]) for label, run in runs.items()}
    tbt = {label: _points(run.pictures.tbt[ALL]) for label, run in runs.items()}

    def curves(theme: Theme, of_run: Mapping[str, Any], target_ms: float, label: str, of: str) -> bytes:
        return curves_png(of_run, _run_colours(list(runs)), target_ms, label, of, theme)

    return (
        Plot(
            name="ttft",
            caption="Time to first token: the share of requests that had their first token by then. A curve"
            " that stays below 100 % lacks the requests that failed.",
            draw=lambda theme: curves(theme, ttft, slo.ttft_ms, "TTFT, ms", "requests"),
        ),
        Plot(
            name="tbt",
            caption="Time between tokens: the share of all gaps that were no longer.",
            draw=lambda theme: curves(theme, tbt, slo.tbt_ms, "gap between tokens, ms", "gaps"),
        ),
        Plot(
            name="attainment",
            caption="Share of the requests of each rank that met every target.",
            draw=lambda theme: _attainment(runs, theme),
        ),
        Plot(
            name="over_time",
            caption="Requests completed per second, warm-up included; dotted: those that were due.",
            draw=lambda theme: _over_time(runs, theme),
        ),
    )


def run_plots(run: RunFigures) -> tuple[Plot, ...]:
    """The plots of one run."""
    slo, pictures = run.summary.slo, run.pictures
    ttft = {name: _points(curve) for name, curve in pictures.ttft.items() if name != ALL}
    tbt = {name: _points(curve) for name, curve in pictures.tbt.items() if name != ALL}

    def curves(theme: Theme, by_rank: Mapping[str, Any], target_ms: float, label: str, of: str) -> bytes:
        return curves_png(by_rank, rank_colours(list(by_rank), theme), target_ms, label, of, theme)

    return (
        Plot(
            name="ttft_by_rank",
            caption="Time to first token per rank.",
            draw=lambda theme: curves(theme, ttft, slo.ttft_ms, "TTFT, ms", "requests"),
        ),
        Plot(
            name="tbt_by_rank",
            caption="Time between tokens per rank.",
            draw=lambda theme: curves(theme, tbt, slo.tbt_ms, "gap between tokens, ms", "gaps"),
        ),
        Plot(
            name="utilisation",
            caption="The share of time that each replica computed in.",
            draw=lambda theme: _busy_map(run, theme),
        ),
        Plot(
            name="ranks",
            caption="The largest rank in a step of each replica, meant over the time that it computed; empty"
            " where it rested or had base-model requests alone.",
            draw=lambda theme: _rank_map(run, theme),
        ),
    )


def _points(curve: Curve) -> tuple[Sequence[float], Sequence[float]]:
    # A log axis has no zero.
    return np.maximum(curve.value_ms, _LEAST_MS).tolist(), curve.share.tolist()


def _run_colours(labels: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    colours = colormaps[_CATEGORIES[len(labels) > 10]]
    return {label: colours(place % colours.N) for place, label in enumerate(labels)}


def _attainment(runs: Mapping[str, RunFigures], theme: Theme) -> bytes:
    from matplotlib.ticker import PercentFormatter

    ranks = list(dict.fromkeys(name for run in runs.values() for name in run.summary.per_rank))
    with styled(theme):
        figure = new_figure(height_in=max(3.3, 1.0 + 0.34 * len(ranks)))
        axes = figure.subplots()
        for place, (label, colour) in enumerate(_run_colours(list(runs)).items()):
            groups = runs[label].summary.per_rank
            # Runs side by side within their rank, so that equal shares do not hide each other.
            shift = (place - (len(runs) - 1) / 2) * min(0.14, 0.7 / len(runs))
            rows = [(at + shift, groups[name].attainment) for at, name in enumerate(ranks) if name in groups]
            axes.plot(
                [share for _, share in rows], [at for at, _ in rows], "o", ms=5.5, color=colour, label=label
            )
        if ranks:
            legend_of(figure, list(runs))
        else:
            nothing_to_show(axes, theme)
        axes.set_yticks(range(len(ranks)), [rank_label(name) for name in ranks])
        axes.invert_yaxis()
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.tick_params(axis="y", labelcolor=theme.text)
        axes.set_title("Share of requests inside every target", color=theme.muted, **_TITLE)
        return png_of(figure)


def _over_time(runs: Mapping[str, RunFigures], theme: Theme) -> bytes:
    with styled(theme):
        figure = new_figure()
        axes = figure.subplots()
        first = next(iter(runs.values())).pictures
        axes.stairs(
            *_coarse(first.due, first.edges_s), color=theme.muted, linewidth=1.1, linestyle=":", label="due"
        )
        for label, colour in _run_colours(list(runs)).items():
            pictures = runs[label].pictures
            rate, edges_s = _coarse(pictures.completed, pictures.edges_s)
            axes.stairs(rate, edges_s, color=colour, linewidth=1.5, label=label)
        legend_of(figure, list(runs))
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, max(float(run.pictures.edges_s[-1]) for run in runs.values()))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("seconds since the start")
        axes.set_title("Requests per second", color=theme.muted, **_TITLE)
        return png_of(figure)


def _coarse(rate: Floats, edges_s: Floats) -> tuple[Floats, Floats]:
    """The rates of each two bins together."""
    if len(rate) % 2:
        return rate, edges_s
    return rate.reshape(-1, 2).mean(axis=1), edges_s[::2]


def _busy_map(run: RunFigures, theme: Theme) -> bytes:
    from matplotlib.colors import Normalize
    from matplotlib.ticker import PercentFormatter

    scale = Normalize(0, 1)
    ticks = {"format": PercentFormatter(1.0, decimals=0)}
    return _map(run, run.pictures.busy, "cividis", scale, ticks, "Time spent computing", theme)


def _rank_map(run: RunFigures, theme: Theme) -> bytes:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter, NullLocator

    rank = np.where(run.pictures.rank > 0, run.pictures.rank, np.nan)
    known = [int(name) for name in run.summary.per_rank if name.isdigit()] or [8, 16]
    low, high = min(known), max(known)
    scale = LogNorm(low, high if high > low else low + 1)
    # One tick per rank, where those are few.
    ticks = {"format": FuncFormatter(lambda value, _: f"{value:g}"), "ticks": known[:: len(known) // 9 + 1]}
    return _map(
        run, rank, "viridis", scale, {**ticks, "minor": NullLocator()}, "Largest rank in a step", theme
    )


def _map(
    run: RunFigures,
    values: Floats,
    colours: str,
    scale: Any,
    ticks: Mapping[str, Any],
    title: str,
    theme: Theme,
) -> bytes:
    """Replicas down, time across."""
    rows = len(run.replica_ids)
    with styled(theme):
        figure = new_figure(height_in=max(2.0, min(5.0, 1.2 + 0.26 * rows)))
        axes = figure.subplots()
        end_s = float(run.pictures.edges_s[-1])
        image = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            cmap=colours,
            norm=scale,
            extent=(0.0, end_s, rows - 0.5, -0.5),
        )
        bar = figure.colorbar(image, ax=axes, format=ticks["format"], ticks=ticks.get("ticks"))
        bar.outline.set_visible(False)
        if "minor" in ticks:
            bar.ax.yaxis.set_minor_locator(ticks["minor"])
        axes.grid(visible=False)
        if rows <= MAX_REPLICA_LABELS:
            axes.set_yticks(range(rows), run.replica_ids)
        else:
            axes.set_ylabel(f"{rows:,} replicas")
        axes.tick_params(axis="y", labelcolor=theme.text)
        axes.set_xlabel("seconds since the start")
        axes.set_title(title, color=theme.muted, **_TITLE)
        return png_of(figure)
