"""A picture of a workload: load over time, lengths, use of the adapters.

matplotlib is imported when it is drawn.
"""

from typing import Any

import numpy as np

from traces.columns import TraceColumns
from traces.plots import LIGHT, Theme, new_figure, png_of, styled

_BINS = 120
_MAX_POINTS = 2000


def stats_png(columns: TraceColumns, theme: Theme = LIGHT) -> bytes:
    """One PNG with a panel for each thing that the workload tells."""
    panels = [_load]
    if int(columns.prompt_tokens.min()) > 0:
        panels.append(_length_panel)
    if columns.adapters and bool((columns.adapter >= 0).any()):
        panels.append(_popularity)
    with styled(theme):
        figure = new_figure(height_in=2.4 * len(panels))
        for axes, panel in zip(np.atleast_1d(figure.subplots(len(panels))), panels, strict=True):
            panel(axes, columns, theme)
        return png_of(figure)


def _load(axes: Any, columns: TraceColumns, theme: Theme) -> None:
    width_s = max(columns.duration_s, 1.0) / _BINS
    counts, edges = np.histogram(columns.arrival_s, bins=_BINS, range=(0, width_s * _BINS))
    axes.stairs(counts / width_s, edges, fill=True, color=theme.accent)
    axes.set_xlabel("s")
    axes.set_title(f"Requests per second, in {width_s:,.3g} s", loc="left", fontsize=9.5, color=theme.muted)


def _length_panel(axes: Any, columns: TraceColumns, theme: Theme) -> None:
    shares = np.linspace(0, 1, min(len(columns), _MAX_POINTS) + 1)
    for label, tokens, colour in (
        ("prompt", columns.prompt_tokens, theme.accent),
        ("output", columns.output_tokens, theme.second),
    ):
        axes.step(np.quantile(tokens, shares), shares, where="post", label=label, color=colour)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("tokens")
    axes.legend(loc="lower right")
    axes.set_title("Share of requests with no more tokens", loc="left", fontsize=9.5, color=theme.muted)


def _popularity(axes: Any, columns: TraceColumns, theme: Theme) -> None:
    counts = np.sort(np.bincount(columns.adapter[columns.adapter >= 0]))[::-1]
    counts = counts[counts > 0]
    axes.plot(np.arange(1, len(counts) + 1), counts, marker=".", color=theme.accent)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("place of the adapter")
    axes.set_title("Requests per adapter", loc="left", fontsize=9.5, color=theme.muted)
