"""`loraserve trace synth`: write a synthetic workload, a preset or one put together from laws."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraserve.cli.common import command, echo_json
from loraserve.errors import BadInputError

if TYPE_CHECKING:
    from traces.columns import TraceColumns
    from traces.synthesis import WorkloadSpec

Text = str | None
Number = float | None
Whole = int | None


@command
def synth(
    preset: Annotated[
        Text, typer.Argument(help="A preset to begin with; --list shows them. [default: loraserve-uniform]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write: .csv, .csv.gz, .jsonl or .parquet.")
    ] = None,
    rate: Annotated[Number, typer.Option(help="Mean requests per second.")] = None,
    duration: Annotated[Number, typer.Option(help="Seconds.")] = None,
    requests: Annotated[Whole, typer.Option(help="How many requests.")] = None,
    adapters: Annotated[Whole, typer.Option(help="How many adapters.")] = None,
    ranks: Annotated[Text, typer.Option(help="Their ranks: 8,16,32 or a law.")] = None,
    correlation: Annotated[
        Number, typer.Option(help="How rank goes with popularity: 1 popular are high, -1 low, 0 neither.")
    ] = None,
    arrivals: Annotated[Text, typer.Option(help="Law of arrivals, such as gamma:cv=4.")] = None,
    popularity: Annotated[Text, typer.Option(help="Law of popularity, such as zipf:1.2.")] = None,
    drift: Annotated[Text, typer.Option(help="How popularity changes, such as rotate:30.")] = None,
    lengths: Annotated[Text, typer.Option(help="Law of lengths, such as fixed:512,128.")] = None,
    max_prompt: Annotated[Whole, typer.Option(help="The most tokens of a prompt.")] = None,
    max_output: Annotated[Whole, typer.Option(help="The most tokens of an output.")] = None,
    over: Annotated[Text, typer.Option(help="What longer ones do: clip or redraw.")] = None,
    base_share: Annotated[Number, typer.Option(help="Share of requests for the base model.")] = None,
    seed: Annotated[Whole, typer.Option(help="The same seed gives the same bytes. [default: 0]")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Print the presets and laws, and exit.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a synthetic workload to a file.

    A law is a name with values, `gamma:4` or `gamma:cv=4`; --list shows all of them. Of --rate,
    --duration and --requests give at most two; what is missing is the preset's rate, or its duration.
    """
    from traces.synthesis import Overrides, synthesise, workload_spec
    from traces.synthesis.workload import DEFAULT
    from traces.types import TraceError
    from traces.write import format_of, write_columns

    if list_all:
        _print_list(json_output)
        return
    if out is None:
        raise BadInputError("--out is missing; name the file to write, such as --out trace.csv")
    asked = Overrides(
        rate=rate,
        duration=duration,
        requests=requests,
        adapters=adapters,
        ranks=ranks,
        correlation=correlation,
        arrivals=arrivals,
        popularity=popularity,
        drift=drift,
        lengths=lengths,
        max_prompt=max_prompt,
        max_output=max_output,
        over=over,
        base_share=base_share,
        seed=seed,
    )
    try:
        format_of(out)
        spec = workload_spec(preset if preset is not None else DEFAULT, asked)
        columns = synthesise(spec)
        write_columns(columns, out)
    except TraceError as error:
        raise BadInputError(str(error)) from error
    except OSError as error:
        raise BadInputError(f"--out: {out}: cannot be written: {error.strerror}") from error
    summary = _summary(spec, columns)
    if json_output:
        echo_json({"out": str(out), "spec": spec.as_text(), **summary})
    else:
        typer.echo(_sentence(summary, out))


def _summary(spec: "WorkloadSpec", columns: "TraceColumns") -> dict[str, Any]:
    import numpy as np

    counts = np.bincount(columns.adapter + 1, minlength=len(columns.adapters) + 1)[1:]
    ranks = sorted({adapter.rank for adapter in columns.adapters if adapter.rank is not None})
    gaps_s = np.diff(columns.arrival_s)
    return {
        "requests": len(columns),
        "duration_s": columns.duration_s,
        "rate_per_s": spec.rate_per_s,
        "gap_cv": float(np.std(gaps_s) / np.mean(gaps_s)) if columns.duration_s > 0 else None,
        "adapters": len(columns.adapters),
        "ranks": ranks,
        "top_share": int(counts.max()) / len(columns),
        "base_share": 1 - int(counts.sum()) / len(columns),
        "prompt_tokens_mean": float(np.mean(columns.prompt_tokens)),
        "output_tokens_mean": float(np.mean(columns.output_tokens)),
    }


def _sentence(summary: dict[str, Any], out: Path) -> str:
    ranks = summary["ranks"]
    named = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
    return (
        f"{out}: {summary['requests']:,} requests in {summary['duration_s']:,.0f} s "
        f"({summary['rate_per_s']:g}/s), {summary['adapters']:,} adapters of rank {named}, "
        f"the busiest with {summary['top_share']:.1%}; means "
        f"{summary['prompt_tokens_mean']:.0f} prompt and {summary['output_tokens_mean']:.0f} output tokens"
    )


def _print_list(json_output: bool) -> None:
    from traces.synthesis import PRESETS
    from traces.synthesis.arrivals import ARRIVALS
    from traces.synthesis.drift import DRIFTS
    from traces.synthesis.lengths import LENGTHS
    from traces.synthesis.notation import usage
    from traces.synthesis.popularity import POPULARITY
    from traces.synthesis.ranks import RANKS

    laws = {
        "arrivals": usage(ARRIVALS),
        "popularity": usage(POPULARITY),
        "drift": usage(DRIFTS),
        "lengths": usage(LENGTHS),
        "ranks": usage(RANKS),
    }
    if json_output:
        echo_json({"presets": {name: one.summary for name, one in PRESETS.items()}, "laws": laws})
        return
    width = max(map(len, PRESETS))
    typer.echo("Presets:")
    for name, one in PRESETS.items():
        adapters, rate = one.rates[0]
        typer.echo(f"  {name:{width}}  {one.summary} ({adapters} adapters, {rate:g}/s, {one.duration_s:g} s)")
    typer.echo("  loraserve-powerlaw-A takes other exponents A as well, such as loraserve-powerlaw-0.5.")
    for option, lines in laws.items():
        typer.echo(f"Laws of --{option}:")
        for law, what in lines.items():
            typer.echo(f"  {law}\n      {what}")
