"""What `loraserve forecast` prints and writes: a table, one JSON object, a file of epochs and a plot."""

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from loraserve.cli.common import echo_json, plain
from loraserve.cli.tables import show
from loraserve.errors import BadInputError

if TYPE_CHECKING:
    from loraserve.cli.forecast_runs import Forecasts

FIGURES, EPOCHS, PLOT = "forecast.json", "epochs.csv", "forecast.png"

_COLUMNS = ("forecaster", "WAPE", "MAE tok/s", "bias", "under", "coverage", "total WAPE")
_LEGEND = (
    "WAPE |forecast - came| over what came, by adapter; bias: forecast too much (+) or too little (-);\n"
    "under: tokens that were not forecast; coverage: adapters' epochs with no more than was forecast."
)


def print_table(found: "Forecasts", out: Path | None) -> None:
    """One row per forecaster, the best WAPE first."""
    columns, options = found.columns, found.options
    print(
        f"{columns.source}: {len(columns.adapters)} adapters, {len(found.epoch_ends_s)} forecasts of"
        f" {options.epoch_s:g} s each, from windows of {options.window_s:g} s"
    )
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(_COLUMNS):
        table.add_column(name, justify="right" if place else "left")
    figures = found.figures
    for name in sorted(figures, key=lambda name: (figures[name].wape is None, figures[name].wape)):
        one = figures[name]
        table.add_row(
            name,
            _share(one.wape),
            "-" if one.mae_tokens_per_s is None else f"{one.mae_tokens_per_s:.4g}",
            _share(one.bias, sign="+"),
            _share(one.under_share),
            _share(one.coverage),
            _share(one.total_wape),
        )
    show(table)
    print(_LEGEND)
    if out is not None:
        print(f"plot: {out / PLOT}")


def print_json(found: "Forecasts", out: Path | None) -> None:
    """The same figures by forecaster, and what was forecast."""
    echo_json(_tree(found) | {"plot": None if out is None else out / PLOT})


def write_files(found: "Forecasts", out: Path) -> None:
    """All of them or none; BadInputError if the folder cannot be written."""
    from loraserve.simulator.report import staged

    try:
        with staged(out) as stage:
            text = json.dumps(plain(_tree(found)), indent=2, allow_nan=False)
            (stage / FIGURES).write_text(text + "\n", encoding="utf-8")
            _write_epochs(found, stage / EPOCHS)
            (stage / PLOT).write_bytes(forecast_png(found))
    except OSError as error:
        raise BadInputError(f"--out: {out}: cannot be written: {error.strerror or error}") from error


def _tree(found: "Forecasts") -> dict[str, Any]:
    columns = found.columns
    return {
        "trace": columns.source,
        "requests": len(columns),
        "adapters": len(columns.adapters),
        "epochs": len(found.epoch_ends_s),
        "options": found.options,
        "forecasters": found.figures,
    }


def _write_epochs(found: "Forecasts", path: Path) -> None:
    """Tokens per second of all adapters in each epoch: what came, and what each forecaster expected."""
    came = next(iter(found.errors.values())).totals
    totals = [errors.forecast_totals for errors in found.errors.values()]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["end_s", "came_tokens_per_s", *found.errors])
        writer.writerows(zip(found.epoch_ends_s, came, *totals, strict=True))


def forecast_png(found: "Forecasts") -> bytes:
    """The demand of all adapters over time, with every forecast of it, and each forecaster's error."""
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    from traces.plots import LIGHT, new_figure, png_of, styled

    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    title = {"loc": "left", "fontsize": 9.5, "color": LIGHT.muted}
    with styled(LIGHT):
        figure = new_figure(height_in=5.4)
        over_time, errors_of = figure.subplots(2, height_ratios=(3, 2))
        ends = found.epoch_ends_s
        came = next(iter(found.errors.values())).totals
        over_time.plot(ends, came, color=LIGHT.text, label="came", linewidth=2.4)
        for place, (name, errors) in enumerate(found.errors.items()):
            colour = colours[place % len(colours)]
            over_time.plot(ends, errors.forecast_totals, color=colour, label=name, linewidth=1.2)
        over_time.set_ylim(bottom=0)
        over_time.set_xlabel("s")
        over_time.set_title("Tokens per second of all adapters", **title)
        names = list(found.errors)
        wapes = [found.figures[name].wape or 0.0 for name in names]
        errors_of.barh(names, wapes, color=[colours[place % len(colours)] for place in range(len(names))])
        errors_of.invert_yaxis()
        errors_of.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        errors_of.set_title("WAPE by adapter", **title)
        figure.legend(loc="outside right center", handlelength=1.4)
        return png_of(figure)


def _share(value: float | None, *, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.1%}"
