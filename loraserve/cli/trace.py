"""`loraserve trace`: look at traces, convert and synthesise them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loraserve.cli.common import command, echo_json
from loraserve.cli.trace_synth import synth
from loraserve.errors import BadInputError

if TYPE_CHECKING:
    from traces.columns import TraceColumns
    from traces.fill import Fill

trace_app = typer.Typer(
    help="Look at traces, convert and synthesise them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

OTHERS = "'demo' for the bundled one, or preset:NAME"
Text = str | None
Number = float | None
Whole = int | None
BadRows = Annotated[Literal["refuse", "skip"], typer.Option(help="What a row that is no request does.")]
Format = Annotated[Text, typer.Option(help="The trace's format; found by content without it.")]
Limit = Annotated[Whole, typer.Option(min=1, help="Only the first so many requests.")]
Duration = Annotated[Number, typer.Option(help="Only the first so many seconds.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides what a format leaves open.")]
Spread = Annotated[
    Literal["random", "even"], typer.Option(help="Where in its minute an invocation lies (functions2019).")
]
Popularity = Annotated[Path | None, typer.Option(help="Shares of the adapters, a .npy file (toppings).")]


@trace_app.callback()
def _group() -> None:
    """Keeps `trace` a group however many commands it has."""


@trace_app.command("formats")
@command
def formats(json_output: Json = False) -> None:
    """List the formats that are read, and how each is known."""
    from traces.formats import FORMATS

    layouts = {one.name: one.layout for one in FORMATS.values()}
    layouts["parquet"] = (
        "arrival_s, prompt_tokens, output_tokens[, adapter, rank, hash_ids], or another's columns"
    )
    if json_output:
        echo_json(layouts)
        return
    width = max(map(len, layouts))
    for name, layout in layouts.items():
        typer.echo(f"{name:{width}}  {layout}")


@trace_app.command("stats")
@command
def stats(
    trace: Annotated[str, typer.Argument(help=f"A trace file, {OTHERS}.")],
    format: Format = None,
    on_bad_row: BadRows = "refuse",
    limit: Limit = None,
    duration: Duration = None,
    window: Annotated[
        Number, typer.Option(help="Seconds of a window for the drift of popularity. [default: by length]")
    ] = None,
    seed: Seed = 0,
    spread: Spread = "random",
    popularity: Popularity = None,
    out: Annotated[Path | None, typer.Option(help="Draw the trace into this PNG file.")] = None,
    json_output: Json = False,
) -> None:
    """Say what a trace is like: rates, lengths, adapters, bursts, repeated blocks."""
    from loraserve.cli import trace_output
    from traces.fill import Fill
    from traces.stats import trace_stats
    from traces.types import TraceError

    if out is not None and out.suffix != ".png":
        raise BadInputError(f"--out: {out} does not end in .png; the picture is a PNG file")
    try:
        fill = Fill(unknown=True, seed=seed, spread=spread, popularity=popularity)
        columns = _read(trace, fill, format, on_bad_row, limit, duration)
        found = trace_stats(columns, window_s=window)
    except TraceError as error:
        raise BadInputError(str(error)) from error
    if out is not None:
        _draw(columns, out)
    trace_output.print_stats(found, json_output=json_output)


@trace_app.command("convert")
@command
def convert(
    trace: Annotated[str, typer.Argument(help=f"The trace file to read, {OTHERS}.")],
    out: Annotated[
        Path, typer.Argument(help="The file to write: .csv, .csv.gz, .jsonl, .jsonl.gz or .parquet.")
    ],
    format: Format = None,
    on_bad_row: BadRows = "refuse",
    limit: Limit = None,
    duration: Duration = None,
    speedup: Annotated[Number, typer.Option(help="Make arrivals so many times faster.")] = None,
    rate: Annotated[Number, typer.Option(help="Make it so many requests per second on average.")] = None,
    prompt_tokens: Annotated[Whole, typer.Option(min=1, help="Where the format has no lengths.")] = None,
    output_tokens: Annotated[Whole, typer.Option(min=1, help="Where the format has no lengths.")] = None,
    lengths_from: Annotated[
        Path | None, typer.Option(help="Draw missing lengths from this trace, prompt and output together.")
    ] = None,
    seed: Seed = 0,
    spread: Spread = "random",
    popularity: Popularity = None,
    json_output: Json = False,
) -> None:
    """Write a trace in another format, cut and sped up as asked; OUT's ending chooses the format.

    .csv is the S-LoRA layout with ranks, .jsonl is Mooncake's, which keeps block hashes, .parquet keeps
    everything.
    """
    from loraserve.cli import trace_output
    from traces.fill import Fill
    from traces.read import read_columns
    from traces.write import format_of, write_columns

    with _bad_input(out):
        chosen = format_of(out)
        fill = Fill(
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            lengths_from=read_columns(lengths_from, on_bad_row="skip") if lengths_from else None,
            seed=seed,
            spread=spread,
            popularity=popularity,
        )
        columns = _read(trace, fill, format, on_bad_row, limit, duration)
        columns = _at_speed(columns, speedup, rate)
        write_columns(columns, out)
    trace_output.print_converted(columns, out, chosen, json_output=json_output)


def _read(
    source: str,
    fill: "Fill",
    format: str | None,
    on_bad_row: Literal["refuse", "skip"],
    limit: int | None,
    duration_s: float | None,
) -> "TraceColumns":
    from traces.columns import columns_of
    from traces.read import bundled_trace, read_columns
    from traces.synthesis import Overrides, is_preset, workload

    if is_preset(source):
        return workload(source, Overrides(seed=fill.seed)).cut(limit=limit, duration_s=duration_s)
    if source == "demo":
        return columns_of(bundled_trace()).cut(limit=limit, duration_s=duration_s)
    return read_columns(
        source, format=format, on_bad_row=on_bad_row, limit=limit, duration_s=duration_s, fill=fill
    )


@contextmanager
def _bad_input(out: Path) -> Iterator[None]:
    """What is wrong with a trace, or with writing it, as an error of the caller's input."""
    from traces.types import TraceError

    try:
        yield
    except TraceError as error:
        raise BadInputError(str(error)) from error
    except OSError as error:
        raise BadInputError(f"{out}: cannot be written: {error.strerror or error}") from error


def _at_speed(columns: "TraceColumns", speedup: float | None, rate: float | None) -> "TraceColumns":
    from traces.synthesis import at_rate, scale_rate

    if speedup is not None and rate is not None:
        raise BadInputError("--speedup and --rate both say how fast; give one of them")
    if speedup is not None:
        return scale_rate(columns, speedup)
    return columns if rate is None else at_rate(columns, rate)


def _draw(columns: "TraceColumns", out: Path) -> None:
    from traces.stats_plot import stats_png

    try:
        out.write_bytes(stats_png(columns))
    except OSError as error:
        raise BadInputError(f"--out: {out}: cannot be written: {error.strerror}") from error


trace_app.command("synth")(synth)
