"""`loraserve forecast`: how well forecasters would have told the demand of a trace."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from loraserve.cli.common import command
from loraserve.errors import BadInputError

Text = str | None
Number = float | None
Whole = int | None


@command
def forecast(
    trace: Annotated[str, typer.Argument(help="A trace file, 'demo' for the bundled one, or preset:NAME.")],
    forecasters: Annotated[Text, typer.Option(help="Which ones, a,b,... [default: all]")] = None,
    epoch: Annotated[float, typer.Option(help="Seconds from one forecast to the next.")] = 60.0,
    window: Annotated[
        Number, typer.Option(help="Seconds that demand is measured over. [default: an epoch]")
    ] = None,
    history: Annotated[
        Number, typer.Option(help="Seconds that loraserve looks back on. [default: five epochs]")
    ] = None,
    season: Annotated[float, typer.Option(help="Seconds of the season of seasonal.")] = 86_400.0,
    quantile: Annotated[
        float, typer.Option(help="The share of an adapter's epochs that quantile is to cover.")
    ] = 0.9,
    rate: Annotated[Number, typer.Option(help="Mean requests per second, instead of the trace's.")] = None,
    speedup: Annotated[Number, typer.Option(help="Or: make arrivals so many times faster.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides what is drawn.")] = 0,
    adapters: Annotated[Whole, typer.Option(help="Give requests so many adapters.")] = None,
    assign: Annotated[
        str, typer.Option(help="How requests get those adapters: round-robin, uniform, zipf, power.")
    ] = "auto",
    parameter: Annotated[Number, typer.Option(help="The exponent of zipf or power.")] = None,
    limit: Annotated[Whole, typer.Option(min=1, help="Take only the first so many requests.")] = None,
    duration: Annotated[Number, typer.Option(help="Take only so many seconds of the trace.")] = None,
    requests: Annotated[Whole, typer.Option(help="Repeat the trace until it has so many.")] = None,
    format: Annotated[Text, typer.Option(help="The trace's format; found by content without it.")] = None,
    on_bad_row: Annotated[
        Literal["refuse", "skip"], typer.Option(help="What a row that is no request does.")
    ] = "refuse",
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the figures, every epoch's totals and a plot into this folder.")
    ] = None,
) -> None:
    """Forecast a trace's demand, epoch by epoch, and say how far each forecaster was from what came.

    Demand is prompt and output tokens per second of each adapter, by when requests come.
    """
    from loraserve.cli import forecast_output
    from loraserve.cli.forecast_runs import ForecastProgress, check_names, measure
    from loraserve.cli.progress import show_progress
    from loraserve.simulator.workload import SimulatedWorkload
    from placement.demand import FORECASTERS, ForecastOptions

    names = tuple(FORECASTERS) if forecasters is None else _names(forecasters)
    check_names(names)
    workload = SimulatedWorkload(
        source=trace,
        format=format,
        on_bad_row=on_bad_row,
        limit=limit,
        duration_s=duration,
        requests=requests,
        rate_per_s=rate,
        speedup=speedup,
        adapters=adapters,
        assign=assign,
        parameter=parameter,
    )
    try:
        options = ForecastOptions(
            epoch_s=epoch,
            window_s=epoch if window is None else window,
            history_s=5 * epoch if history is None else history,
            season_s=season,
            quantile=quantile,
        )
    except ValueError as error:
        raise BadInputError(f"--{str(error).replace('_s:', ':')}") from error
    columns = workload.draw(seed)
    progress = ForecastProgress()
    with show_progress("forecast", progress):
        found = measure(columns, names, options, progress)
    if out is not None:
        forecast_output.write_files(found, out)
    if json_output:
        forecast_output.print_json(found, out)
    else:
        forecast_output.print_table(found, out)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise BadInputError(f"--forecasters: {text!r}; expected one or more names with commas between")
    return names
