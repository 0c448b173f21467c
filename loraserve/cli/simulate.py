"""`loraserve simulate`: what policies would do on a trace, in virtual time."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loraserve.cli import experiment
from loraserve.cli.common import command, ended_by_sigterm, given_options
from loraserve.cli.given import names_of, seeds_of, staged_out
from loraserve.errors import BadInputError

if TYPE_CHECKING:
    from loraserve.cli.simulate_runs import SimulateOptions
    from loraserve.simulator.figures import Judging

Text = str | None
Number = float | None
Whole = int | None
DEFAULT_PROFILE = "a100-llama2-7b-bgmv"
MAX_SEEDS = 10_000


@command
def simulate(
    context: typer.Context,
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE|EXPERIMENT",
            help="A trace file, 'demo' for the bundled one, or preset:NAME; or an experiment, a .toml file or"
            " experiment:NAME, which goes with --out, --jobs, --traces and --json alone.",
        ),
    ],
    policy: Annotated[str, typer.Option(help="Placement policies, a,b,...")] = "least-loaded",
    routing: Annotated[
        str, typer.Option(help="Routing policies, a,b,...; auto: each policy's own.")
    ] = "auto",
    replicas: Annotated[int, typer.Option(help="How many replicas.")] = 4,
    profile: Annotated[
        str, typer.Option(help="What a replica can do: a shipped profile, or a file of loraserve profile.")
    ] = DEFAULT_PROFILE,
    kernel: Annotated[
        Text,
        typer.Option(help="Charge ranks as padded_config, padded_batch or sum. [default: the profile's]"),
    ] = None,
    rate: Annotated[Number, typer.Option(help="Mean requests per second, instead of the trace's.")] = None,
    speedup: Annotated[
        Number,
        typer.Option(
            help="Or: send the arrivals so many times faster; epochs and failures come in that time."
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, 0,1,...; each draws anew what is drawn.")] = "0",
    adapters: Annotated[Whole, typer.Option(help="Give requests so many adapters.")] = None,
    ranks: Annotated[Text, typer.Option(help="The adapters' ranks: 8,16,32 or a law of trace synth.")] = None,
    correlation: Annotated[
        Number,
        typer.Option(help="How --ranks go with popularity: 1 the popular ones high, -1 low, 0 not at all."),
    ] = None,
    assign: Annotated[
        str, typer.Option(help="How requests get those adapters: round-robin, uniform, zipf, power.")
    ] = "auto",
    parameter: Annotated[Number, typer.Option(help="The exponent of zipf or power.")] = None,
    base_share: Annotated[float, typer.Option(help="Share of those requests for the base model.")] = 0.0,
    lengths: Annotated[
        Text,
        typer.Option(
            help="A law of lengths of trace synth, such as fixed:512,128 or resample:FILE, instead of the"
            " trace's. [default: azure, where the trace has none]"
        ),
    ] = None,
    limit: Annotated[Whole, typer.Option(min=1, help="Take only the first so many requests.")] = None,
    duration: Annotated[
        Number,
        typer.Option(
            help="Take only so many seconds of the trace, in its own time: before --speedup, --rate."
        ),
    ] = None,
    requests: Annotated[Whole, typer.Option(help="Repeat the trace until it has so many.")] = None,
    warmup: Annotated[float, typer.Option(help="Leave requests of the first seconds out of figures.")] = 0.0,
    format: Annotated[Text, typer.Option(help="The trace's format; found by content without it.")] = None,
    on_bad_row: Annotated[
        Literal["refuse", "skip"], typer.Option(help="What a row that is no request does.")
    ] = "refuse",
    routers: Annotated[int, typer.Option(help="How many routers share the requests.")] = 1,
    epoch: Annotated[float, typer.Option(help="Seconds from one plan to the next.")] = 60.0,
    window: Annotated[
        Number, typer.Option(help="Seconds that demand is measured over. [default: an epoch]")
    ] = None,
    forecast: Annotated[
        Text, typer.Option(help="Who forecasts demand, see loraserve forecast. [default: adaptive]")
    ] = None,
    report_interval: Annotated[float, typer.Option(help="Seconds between a replica's reports.")] = 0.1,
    network_delay: Annotated[float, typer.Option(help="Seconds from router to replica.")] = 0.0005,
    max_waiting: Annotated[int, typer.Option(help="A replica with so many waiting is full.")] = 256,
    pool_adapters: Annotated[
        Whole, typer.Option(min=1, help="Adapters that a replica's host pool holds. [default: all]")
    ] = None,
    on_demand: Annotated[
        bool, typer.Option("--on-demand", help="Fetch copies when a request needs them, not as planned.")
    ] = False,
    max_lora_ranks: Annotated[
        Literal["fixed", "planned"],
        typer.Option(help="Whether plans choose each replica's max_lora_rank, and restart it."),
    ] = "fixed",
    restart: Annotated[float, typer.Option(help="Seconds that such a restart takes.")] = 60.0,
    migration: Annotated[
        Literal["off", "dlora"], typer.Option(help="Move requests of overloaded replicas between epochs.")
    ] = "off",
    failure: Annotated[
        list[str] | None, typer.Option("--fail", help="'replica-1@100s for 30s'; may be repeated.")
    ] = None,
    add_adapters: Annotated[
        list[str] | None,
        typer.Option(
            help="What if there were more: '50x64', 50 of rank 64, each as popular as the mean; '50x64@0.2',"
            " with a fifth of the traffic on top. May be repeated."
        ),
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(
            help="What if the adapters of these names, or base, had so many times the traffic: 'support-*=2'."
            " May be repeated."
        ),
    ] = None,
    lose: Annotated[
        Text,
        typer.Option(
            help="What if so many replicas died for good: '1@100s', '1@30%', or '1', a third into the trace."
        ),
    ] = None,
    slo_ttft_ms: Annotated[float, typer.Option(help="The target for the time to the first token.")] = 2000.0,
    slo_tbt_ms: Annotated[float, typer.Option(help="The target for the time between tokens.")] = 150.0,
    per_rank: Annotated[bool, typer.Option("--per-rank", help="Show the figures of each rank.")] = False,
    per_adapter: Annotated[
        bool,
        typer.Option("--per-adapter", help="Put those of each adapter into JSON and files; takes longer."),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write records, plots and a page that compares into this folder.")
    ] = None,
    jobs: Annotated[
        Whole, typer.Option(min=1, help="Simulate so many at a time. [default: one per core]")
    ] = None,
    ray: Annotated[
        Text, typer.Option(help="Simulate as tasks of the Ray cluster at HOST:PORT, or auto.")
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(help="Where an experiment's trace files are. [default: beside the experiment]"),
    ] = None,
) -> None:
    """Simulate policies on a trace: every policy with every routing and seed is one run.

    The simulator runs the live cluster's own decisions around a model of its replicas. An experiment names
    traces, policies, rates, replicas and more in a file; it goes on where it was interrupted, and ends with a
    report.
    """
    if experiment.is_named(trace):
        experiment.refuse_options(trace, given_options(context))
        with ended_by_sigterm():
            experiment.simulate_experiment(
                experiment.ExperimentOptions(
                    source=trace, out=out, traces=traces, jobs=jobs, json_output=json_output
                )
            )
        return
    if traces is not None:
        raise BadInputError(f"--traces: {trace} is no experiment; expected a .toml file or experiment:NAME")
    from loraserve.cli.simulate_runs import SimulateOptions
    from loraserve.simulator.from_profile import ClusterOptions, parse_failures
    from loraserve.simulator.what_if import WhatIf
    from loraserve.simulator.workload import SimulatedWorkload
    from placement.demand import DEFAULT_FORECASTER

    options = SimulateOptions(
        workload=SimulatedWorkload(
            source=trace,
            format=format,
            on_bad_row=on_bad_row,
            limit=limit,
            duration_s=duration,
            requests=requests,
            rate_per_s=rate,
            speedup=speedup,
            adapters=adapters,
            ranks=ranks,
            correlation=correlation,
            assign=assign,
            parameter=parameter,
            base_share=base_share,
            lengths=lengths,
        ),
        cluster=ClusterOptions(
            num_replicas=replicas,
            kernel=kernel,
            num_routers=routers,
            epoch_s=epoch,
            window_s=window,
            forecast=forecast or DEFAULT_FORECASTER,
            report_interval_s=report_interval,
            network_delay_s=network_delay,
            max_waiting=max_waiting,
            pool_adapters=pool_adapters,
            on_demand=on_demand,
            max_lora_ranks=max_lora_ranks,
            restart_s=restart,
            migration=migration,
            failures=parse_failures(failure or ()),
        ),
        judging=_judging(slo_ttft_ms, slo_tbt_ms, warmup, per_adapter=per_adapter),
        profile=profile,
        policies=names_of(policy, "--policy"),
        routings=names_of(routing, "--routing"),
        seeds=seeds_of(seeds, MAX_SEEDS),
        jobs=jobs,
        ray_address=ray,
        what_if=WhatIf.parse(add=add_adapters or (), scale=scale or (), lose=lose),
    )
    _run(options, out, per_rank=per_rank, json_output=json_output)


def _run(options: "SimulateOptions", out: Path | None, *, per_rank: bool, json_output: bool) -> None:
    from loraserve.cli import simulate_output
    from loraserve.cli.simulate_runs import prepare, simulate_all

    plan = prepare(options)
    page = None
    with staged_out(out) as stage:
        with simulate_output.SweepProgress(plan.num_requests) as progress:
            runs = simulate_all(plan, options, stage, progress)
        simulate_output.warn(options, runs)
        if stage is not None and out is not None:
            simulate_output.write_files(plan, options, runs, stage)
            page = out / simulate_output.PAGE
    if json_output:
        simulate_output.print_json(plan, options, runs, page)
    else:
        simulate_output.print_tables(plan, options, runs, page, per_rank=per_rank)


def _judging(ttft_ms: float, tbt_ms: float, warmup_s: float, *, per_adapter: bool) -> "Judging":
    from loraserve.simulator.figures import Judging
    from traces.metrics import Slo
    from traces.types import TraceError

    if not 0 <= warmup_s < 1e7:
        raise BadInputError(f"--warmup: {warmup_s}; expected seconds from 0 to 1e7")
    try:
        slo = Slo(ttft_ms=ttft_ms, tbt_ms=tbt_ms)
    except TraceError as error:
        raise BadInputError(f"--slo-ttft-ms, --slo-tbt-ms: {error}") from error
    return Judging(slo=slo, warmup_s=warmup_s, per_adapter=per_adapter)
