"""`loraserve capacity`: the fewest replicas that hold an SLO on a trace, and what they cost."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraserve.cli.common import EXIT_FAILED, command
from loraserve.cli.given import names_of, seeds_of, staged_out
from loraserve.cli.shared_options import taking_options
from loraserve.cli.simulate import simulate
from loraserve.errors import BadInputError

if TYPE_CHECKING:
    from loraserve.capacity.prices import Price
    from loraserve.capacity.solve import CapacityOptions
    from loraserve.capacity.trials import Setting

DEFAULT_PROFILE = "a100-llama2-7b-bgmv-42"
MAX_REPLICAS, MAX_SEEDS = 1024, 100

WORKLOAD: Mapping[str, str] = {
    "rate": "rate_per_s",
    "speedup": "speedup",
    "adapters": "adapters",
    "ranks": "ranks",
    "correlation": "correlation",
    "assign": "assign",
    "parameter": "parameter",
    "base_share": "base_share",
    "lengths": "lengths",
    "limit": "limit",
    "duration": "duration_s",
    "requests": "requests",
    "format": "format",
    "on_bad_row": "on_bad_row",
}
"""The options of `simulate` that say what is sent, and the fields of `SimulatedWorkload`."""
CLUSTER: Mapping[str, str] = {
    "kernel": "kernel",
    "routers": "num_routers",
    "epoch": "epoch_s",
    "window": "window_s",
    "report_interval": "report_interval_s",
    "network_delay": "network_delay_s",
    "max_waiting": "max_waiting",
    "pool_adapters": "pool_adapters",
    "on_demand": "on_demand",
}
"""Those that say what it is sent to, and the fields of `ClusterOptions`."""
SHARED = (*WORKLOAD, *CLUSTER, "add_adapters", "scale", "lose", "warmup", "jobs")


@command
@taking_options(simulate, SHARED)
def capacity(
    trace: Annotated[str, typer.Argument(help="A trace file, 'demo' for the bundled one, or preset:NAME.")],
    slo: Annotated[
        str,
        typer.Option(
            help="What has to hold: bounds with commas between, on ttft, tbt, tpot or e2e with _p50, _p95 or"
            " _p99, on attainment, on goodput."
        ),
    ] = "ttft_p95<2s,tbt_p95<150ms",
    policy: Annotated[
        str,
        typer.Option(
            help="Policies, a,b,..., each with the routing and the forecast meant for it; or"
            " POLICY/ROUTING[/FORECAST]."
        ),
    ] = "optimal",
    profile: Annotated[
        str, typer.Option(help="What a replica can do: a shipped profile, or a file of loraserve profile.")
    ] = DEFAULT_PROFILE,
    seeds: Annotated[str, typer.Option(help="Seeds, 0,1,...; all have to hold.")] = "0,1,2",
    most: Annotated[int, typer.Option(help="Look at no more replicas than that.")] = 64,
    max_lora_ranks: Annotated[
        str,
        typer.Option(
            help="Where the kernel is padded_config: auto proposes mixes; 128 sets every replica to it;"
            " 16x3,128x1 is tried as it is."
        ),
    ] = "auto",
    price: Annotated[float | None, typer.Option(help="What a GPU costs per hour, in any currency.")] = None,
    gpus_per_replica: Annotated[int, typer.Option(help="GPUs of a replica.")] = 1,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the figures, plots and a page into this folder.")
    ] = None,
    **options: Any,
) -> None:
    """How many replicas does this need? Finds the fewest that hold an SLO with every seed, in the simulator.

    The search is shown. With a price or a folder the answer is also found for looser and tighter targets;
    with --add-adapters, --scale or --lose also for the trace as it would be then. Exit code 1: not even the
    most replicas hold.
    """
    from loraserve.capacity.mixes import Asked
    from loraserve.capacity.slo import Target
    from loraserve.capacity.solve import CapacityOptions
    from loraserve.experiments.contenders import contenders
    from loraserve.simulator.what_if import WhatIf

    asked = CapacityOptions(
        setting=_setting(trace, profile, options),
        target=Target.parse(slo),
        contenders=contenders(names_of(policy, "--policy")),
        seeds=seeds_of(seeds, MAX_SEEDS),
        most=_whole(most, "--most", MAX_REPLICAS),
        asked=Asked.parse(max_lora_ranks),
        what_if=WhatIf.parse(
            add=options["add_adapters"] or (), scale=options["scale"] or (), lose=options["lose"]
        ),
        price=_price(price, gpus_per_replica),
        has_curve=price is not None or out is not None,
        jobs=options["jobs"],
    )
    _run(asked, out, json_output=json_output)


def _run(options: "CapacityOptions", out: Path | None, *, json_output: bool) -> None:
    from loraserve.capacity.solve import prepare, solve
    from loraserve.cli import capacity_output

    problem = prepare(options)
    page = None
    with staged_out(out) as stage:
        with capacity_output.SearchProgress(problem) as progress:
            found = solve(problem, progress.ended, progress.going)
        if stage is not None and out is not None:
            capacity_output.write_files(found, stage)
            page = out / capacity_output.PAGE
    if json_output:
        capacity_output.print_json(found, options, page)
    else:
        capacity_output.print_answer(found, page)
    if not found.all_found:
        capacity_output.say_none(found, options.most)
        raise typer.Exit(EXIT_FAILED)


def _setting(trace: str, profile: str, options: Mapping[str, Any]) -> "Setting":
    from loraserve.capacity.trials import Setting
    from loraserve.profiling.files import find_simulatable
    from loraserve.simulator.figures import Judging
    from loraserve.simulator.from_profile import ClusterOptions
    from loraserve.simulator.workload import SimulatedWorkload

    warmup_s = options["warmup"]
    if not 0 <= warmup_s < 1e7:
        raise BadInputError(f"--warmup: {warmup_s}; expected seconds from 0 to 1e7")
    return Setting(
        workload=SimulatedWorkload(
            source=trace, **{field: options[name] for name, field in WORKLOAD.items()}
        ),
        profile=find_simulatable(profile),
        cluster=ClusterOptions(**{field: options[name] for name, field in CLUSTER.items()}),
        judging=Judging(warmup_s=warmup_s),
    )


def _price(price: float | None, gpus_per_replica: int) -> "Price | None":
    from loraserve.capacity.prices import Price

    gpus = _whole(gpus_per_replica, "--gpus-per-replica", MAX_REPLICAS)
    if price is None:
        return None
    if not (math.isfinite(price) and 0 < price <= 1e9):
        raise BadInputError(f"--price: {price:g}; expected a price per GPU hour above 0")
    return Price(per_gpu_hour=price, gpus_per_replica=gpus)


def _whole(value: int, option: str, most: int) -> int:
    if not 1 <= value <= most:
        raise BadInputError(f"{option}: {value}; expected from 1 to {most}")
    return value
