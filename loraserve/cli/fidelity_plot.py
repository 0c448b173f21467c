"""A picture of one load: the distributions of TTFT and TBT, live beside simulated."""

import io
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraserve.fidelity.report import LoadResult
    from traces.records import RequestRecord

MAX_POINTS = 1000
_SIZE_IN, _DOTS_PER_IN = (9.5, 7.0), 130


def draw(load: "LoadResult") -> bytes:
    """PNG bytes: above the cumulative shares, below the quantiles against each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from traces.metrics import itl_ms, ttft_ms

    figure = Figure(figsize=_SIZE_IN, dpi=_DOTS_PER_IN, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes: Any = figure.subplots(2, 2)
    kinds: tuple[tuple[str, Callable[[RequestRecord], list[float]]], ...] = (
        ("TTFT", lambda record: [ttft_ms(record)]),
        ("TBT", itl_ms),
    )
    for column, (name, values_of) in enumerate(kinds):
        live, simulated = _sample(load.live, values_of), _sample(load.simulated, values_of)
        _cumulative(axes[0][column], name, live, simulated)
        _quantiles(axes[1][column], name, live, simulated)
    figure.suptitle(f"Load {load.load:g} of saturation, {load.requests_per_s:.2f} requests/s")
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _sample(
    records: "Sequence[RequestRecord]", values_of: "Callable[[RequestRecord], list[float]]"
) -> list[float]:
    return sorted(value for record in records for value in values_of(record) if math.isfinite(value))


def _cumulative(axes: Any, name: str, live: list[float], simulated: list[float]) -> None:
    for values, label, style in ((live, "live", "-"), (simulated, "simulated", "--")):
        size = len(values)
        places = range(0, size, max(1, size // MAX_POINTS))
        axes.plot([values[at] for at in places], [(at + 1) / size for at in places], style, label=label)
    axes.set_xlabel(f"{name}, ms")
    axes.set_ylabel("share")
    axes.set_ylim(0, 1)
    axes.legend()


def _quantiles(axes: Any, name: str, live: list[float], simulated: list[float]) -> None:
    import numpy as np

    if not live or not simulated:
        return
    levels = np.linspace(0.01, 0.99, 99)
    theirs, ours = np.quantile(live, levels), np.quantile(simulated, levels)
    most = float(max(theirs.max(), ours.max()))
    axes.plot([0, most], [0, most], color="0.7")
    axes.plot(theirs, ours, ".")
    axes.set_xlabel(f"live {name}, ms (percentiles 1 to 99)")
    axes.set_ylabel(f"simulated {name}, ms")
