"""How policies look in every plot of a report, and figures of panels side by side.

A policy keeps its colour, marker and line in all experiments. The colours are told apart by those who see
fewer of them (after Okabe and Ito, 2008), the markers and lines in grey.
"""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from traces.plots import Theme, styled

MAX_PANELS = 12
PANELS_ACROSS = 3
_DOTS_PER_IN = 125
_PANEL_IN, _GAP_IN = 2.7, 0.55
_LEFT_IN, _RIGHT_IN, _TOP_IN, _BOTTOM_IN = 0.7, 0.15, 0.5, 0.55
_LEGEND_ROW_IN, _LEGEND_LETTER_IN, _LEGEND_SIGN_IN = 0.2, 0.066, 0.55
_COLOURS = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """A policy's colour, marker and line."""

    light: str
    dark: str
    marker: str
    line: Any

    def colour(self, theme: Theme) -> str:
        """On this page."""
        return self.light if theme.background == "#ffffff" else self.dark


_DASHED, _DOTTED, _MIXED = (0, (5, 1.6)), (0, (1.2, 1.3)), (0, (5, 1.5, 1.2, 1.5))
_LOOKS = {
    "optimal": Look(light="#0067a8", dark="#58b0f0", marker="o", line="-"),
    "optimal-from-scratch": Look(light="#4791c4", dark="#2f78ab", marker="o", line=_DASHED),
    "loraserve": Look(light="#d2520a", dark="#f2793a", marker="s", line="-"),
    "least-loaded": Look(light="#00876a", dark="#1fbf98", marker="^", line="-"),
    "everywhere-marginal": Look(light="#3fa287", dark="#7fdcc6", marker="v", line=_DASHED),
    "slora-random": Look(light="#6a6f75", dark="#aab2b9", marker="D", line=_DOTTED),
    "slora-contiguous": Look(light="#8b9299", dark="#7c848b", marker="d", line=_MIXED),
    "rendezvous": Look(light="#c0609a", dark="#e08fbd", marker="P", line="-"),
    "dlora": Look(light="#b98000", dark="#f0b429", marker="X", line="-"),
    "dlora-migrating": Look(light="#946700", dark="#ffcf66", marker=">", line=_DASHED),
    "toppings": Look(light="#5f3dc4", dark="#a48bf5", marker="*", line=_DASHED),
    "rank-backlog": Look(light="#8a4b2a", dark="#c98f6b", marker="p", line=_MIXED),
}
_OTHERS = (
    Look(light="#1f2328", dark="#e3e6e8", marker="<", line="-"),
    Look(light="#a01c48", dark="#ff7a9c", marker="8", line=_DASHED),
    Look(light="#4d7c0f", dark="#a3d65c", marker="h", line=_DOTTED),
    Look(light="#0e7490", dark="#67d5ea", marker="H", line=_MIXED),
)


def looks_of(policies: Sequence[str]) -> dict[str, Look]:
    """The look of each; those without a name of their own take what is left, in their order."""
    unnamed = [policy for policy in policies if policy not in _LOOKS]
    others = {policy: _OTHERS[place % len(_OTHERS)] for place, policy in enumerate(unnamed)}
    return {policy: _LOOKS.get(policy) or others[policy] for policy in policies}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panels:
    """An empty figure of panels, `axes` in reading order."""

    figure: Any
    axes: tuple[Any, ...]
    across: int
    theme: Theme

    def is_lowest(self, place: int) -> bool:
        """Whether there is no panel below this one."""
        return place + self.across >= len(self.axes)

    def png(self, colours: int = _COLOURS) -> bytes:
        """The figure as a PNG of few colours, the same bytes for the same figure."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from PIL import Image

        canvas = FigureCanvasAgg(self.figure)
        canvas.draw()
        image = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
        buffer = io.BytesIO()
        few = image.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        few.save(buffer, format="png", optimize=True)
        return buffer.getvalue()


@contextmanager
def panels(
    count: int,
    theme: Theme,
    *,
    height_in: float = 1.75,
    across: int | None = None,
    width_in: float = _PANEL_IN,
    left_in: float = _LEFT_IN,
    right_in: float = _RIGHT_IN,
    legend: Sequence[str] = (),
) -> Iterator[Panels]:
    """So many panels of this size, a few of them larger; room for a legend of these below. Laid out by hand:
    matplotlib's own layouts draw everything several times."""
    import matplotlib
    from matplotlib.figure import Figure

    across = min(across or PANELS_ACROSS, count)
    down = math.ceil(count / across)
    gap_in = _GAP_IN
    if across < PANELS_ACROSS and width_in == _PANEL_IN:
        width_in, height_in = (4.3, 2.3) if across == 1 else (3.3, 1.9)
    whole_in = left_in + right_in + across * width_in + (across - 1) * gap_in
    legend_in = _LEGEND_ROW_IN * math.ceil(len(legend) / _columns(whole_in, legend))
    row_in = height_in + _TOP_IN
    tall_in = down * row_in + _BOTTOM_IN + legend_in
    # Names are anybody's: a dollar sign in one begins no formula.
    with styled(theme), matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(whole_in, tall_in), dpi=_DOTS_PER_IN)
        axes = []
        for place in range(count):
            column, row = place % across, place // across
            box = (
                (left_in + column * (width_in + gap_in)) / whole_in,
                1 - (row * row_in + _TOP_IN * 0.7 + height_in) / tall_in,
                width_in / whole_in,
                height_in / tall_in,
            )
            axes.append(figure.add_axes(box))
        yield Panels(figure=figure, axes=tuple(axes), across=across, theme=theme)


def legend_below(made: Panels, handles: Sequence[Any]) -> None:
    """One legend for all panels."""
    width_in = made.figure.get_size_inches()[0]
    made.figure.legend(
        handles=list(handles),
        loc="lower center",
        ncols=_columns(width_in, [str(handle.get_label()) for handle in handles]),
        fontsize=8.5,
        handlelength=2.2,
        columnspacing=1.4,
        labelspacing=0.35,
        borderaxespad=0.3,
    )


def _columns(width_in: float, labels: Sequence[str]) -> int:
    """How many labels of a legend fit side by side."""
    widest_in = max((_LEGEND_LETTER_IN * len(label) for label in labels), default=0.0) + _LEGEND_SIGN_IN
    return max(1, min(len(labels), int(width_in / widest_in)))


def policy_handles(looks: dict[str, Look], theme: Theme) -> list[Any]:
    """What a legend shows of policies."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=look.colour(theme), marker=look.marker, ms=5, linestyle=look.line, label=policy)
        for policy, look in looks.items()
    ]


def heading(axes: Any, text: str, theme: Theme) -> None:
    """A panel's title."""
    axes.set_title(text, loc="left", fontsize=9.5, color=theme.text, pad=7)
