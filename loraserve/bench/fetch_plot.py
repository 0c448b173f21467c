"""The plot of `bench fetch`: how long an adapter takes to come, over its size, from each source.

matplotlib is imported when it is drawn, and only its object interface is used.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from loraserve.bench.fetch_figures import (
    LABELS,
    PEERS,
    SOURCES,
    FetchRow,
    SecondsSpread,
    Source,
    faster_from_bytes,
)
from loraserve.bench.fetch_subject import show_size
from traces.plots import LIGHT, Theme, new_figure, styled

FORMATS = ("png", "svg")
_HEIGHT_IN = 4.6
# What has no version or time in it gives the same bytes for the same run.
_METADATA: Mapping[str, Mapping[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}}
_STYLES: Mapping[Source, tuple[str, str]] = {
    "ucx": ("accent", "-"),
    "tcp": ("accent", "--"),
    "page_cache": ("second", "-"),
    "cold_disk": ("second", "--"),
    "origin": ("muted", "-."),
}


def draw_fetch(rows: Sequence[FetchRow], kind: str) -> bytes:
    """The plot as a file's bytes, `kind` one of `FORMATS`; bars span the middle half of the repetitions."""
    import matplotlib

    has_engine = any(row.active is not None for row in rows)
    with styled(LIGHT), matplotlib.rc_context({"svg.hashsalt": "loraserve", "svg.fonttype": "none"}):
        figure = new_figure(_HEIGHT_IN * (1.6 if has_engine else 1.0))
        axes = figure.subplots(1 + has_engine, 1, sharex=True, squeeze=False)[:, 0]
        _panel(
            axes[0], rows, "Until it is resident: a sealed, verified segment; seconds", LIGHT, is_active=False
        )
        _mark(axes[0], rows, LIGHT)
        if has_engine:
            _panel(
                axes[1], rows, "Until it is active in a slot of the engine; seconds", LIGHT, is_active=True
            )
        axes[-1].set_xlabel("the adapter's size")
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=2.4
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, metadata=_METADATA[kind])
        return buffer.getvalue()


def _panel(axes: Any, rows: Sequence[FetchRow], title: str, theme: Theme, *, is_active: bool) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axes.set_title(title, loc="left", fontsize=9.5, color=theme.muted)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for source in SOURCES:
        points = [
            (row.size_bytes, one) for row in rows if row.source == source and (one := _of(row, is_active))
        ]
        if points:
            points.sort(key=lambda point: point[0])
            colour, style = _STYLES[source]
            axes.errorbar(
                [size for size, _ in points],
                [one.median_s for _, one in points],
                yerr=[
                    [one.median_s - one.p25_s for _, one in points],
                    [one.p75_s - one.median_s for _, one in points],
                ],
                color=getattr(theme, colour),
                linestyle=style,
                marker="o",
                markersize=4,
                label=LABELS[source],
            )
    axes.xaxis.set_major_locator(FixedLocator(sorted({row.size_bytes for row in rows})))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show_size(int(value))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _of(row: FetchRow, is_active: bool) -> SecondsSpread | None:
    return row.active if is_active else row.resident


def _mark(axes: Any, rows: Sequence[FetchRow], theme: Theme) -> None:
    """From which size the best peer is faster than a folder on the disk, and than one in the page cache."""
    measured = {row.source for row in rows}
    peer = next((one for one in PEERS if one in measured), None)
    if peer is None:
        return
    for place, (local, name) in enumerate((("cold_disk", "the disk"), ("page_cache", "the page cache"))):
        found = faster_from_bytes(rows, peer, local)  # type: ignore[arg-type]
        if found is not None:
            axes.axvline(found, color=theme.line, linewidth=1.0, zorder=0)
            axes.annotate(
                f"{peer} beats {name} from here",
                (found, 0.97 - 0.07 * place),
                xycoords=("data", "axes fraction"),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=7.5,
                color=theme.muted,
                va="top",
            )
