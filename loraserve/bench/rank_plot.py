"""The plot of `bench rank`: what a step costs over the adapter's rank, in each mode.

matplotlib is imported when it is drawn, and only its object interface is used.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from loraserve.bench.rank_figures import Spread
from loraserve.bench.rank_rows import MODES, Kind
from traces.plots import LIGHT, Theme, new_figure, styled

FORMATS = ("png", "svg")
_HEIGHT_IN = 5.2
_LABELS = {
    "off": "without LoRA",
    "rank-true": "rank-true",
    "padded": "padded to the highest rank",
    "stock": "vLLM's own",
}
_TITLES: Mapping[Kind, str] = {
    "prefill": "One prefill step, ms",
    "decode": "One decode step, ms",
}
# What has no version or time in it gives the same bytes for the same run.
_METADATA: Mapping[str, Mapping[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}}


def draw(times: Mapping[str, Mapping[str, Spread]], ranks: Sequence[int], kind: str) -> bytes:
    """The plot as a file's bytes, `kind` one of `FORMATS`; bars span the middle half of the repetitions."""
    import matplotlib

    with styled(LIGHT), matplotlib.rc_context({"svg.hashsalt": "loraserve", "svg.fonttype": "none"}):
        figure = new_figure(_HEIGHT_IN)
        upper, lower = figure.subplots(2, 1, sharex=True)
        _panel(upper, times, ranks, "prefill", LIGHT)
        _panel(lower, times, ranks, "decode", LIGHT)
        lower.set_xlabel("the adapter's rank")
        handles = upper.get_legend_handles_labels()
        if handles[0]:
            figure.legend(*handles, loc="outside lower center", ncols=2, handlelength=1.4)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=_METADATA[kind])
        return buffer.getvalue()


def _panel(
    axes: Any, times: Mapping[str, Mapping[str, Spread]], ranks: Sequence[int], kind: Kind, theme: Theme
) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_title(_TITLES[kind], loc="left", fontsize=9.5, color=theme.muted)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    colours = {"rank-true": theme.accent, "padded": theme.second, "stock": theme.text, "off": theme.muted}
    for mode in MODES:
        rows = times.get(mode, {})
        if mode == "off" and f"{kind}_base" in rows:
            base_ms = rows[f"{kind}_base"].median_ms
            axes.axhline(base_ms, color=colours[mode], linestyle="--", linewidth=1.2, label=_LABELS[mode])
        points = [(rank, rows[name]) for rank in ranks if (name := f"{kind}_r{rank}") in rows]
        if points:
            axes.errorbar(
                [rank for rank, _ in points],
                [one.median_ms for _, one in points],
                yerr=[
                    [one.median_ms - one.p25_ms for _, one in points],
                    [one.p75_ms - one.median_ms for _, one in points],
                ],
                color=colours[mode],
                marker="o",
                markersize=4,
                label=_LABELS[mode],
            )
    axes.xaxis.set_major_locator(FixedLocator(list(ranks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
