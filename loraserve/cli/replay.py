"""`loraserve replay`: send a trace through a router on the trace's own clock, and say how it went."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loraserve.cli.common import EXIT_INTERRUPTED, command, resolve_addresses, run_async
from loraserve.errors import BadInputError, WorkFailedError

if TYPE_CHECKING:
    from loraserve.replay.runner import ReplayOptions, ReplayResult
    from traces.metrics import Slo

Text = str | None
Number = float | None
Whole = int | None


@command
def replay(
    trace: Annotated[str, typer.Argument(help="A trace file, 'demo' or 'preset:NAME'.")],
    speedup: Annotated[float, typer.Option(help="Send the arrivals so many times faster.")] = 1.0,
    limit: Annotated[Whole, typer.Option(min=1, help="Send only the first so many requests.")] = None,
    duration: Annotated[Number, typer.Option(help="Send only so many seconds of the trace.")] = None,
    warmup: Annotated[float, typer.Option(help="Leave requests of the first seconds out of figures.")] = 0.0,
    warmup_requests: Annotated[int, typer.Option(help="Leave the first requests out of figures.")] = 0,
    on_bad_row: Annotated[
        Literal["refuse", "skip"], typer.Option(help="What a row that is no request does.")
    ] = "refuse",
    format: Annotated[Text, typer.Option(help="The trace's format; found by content without it.")] = None,
    assign: Annotated[
        str,
        typer.Option(
            help="How requests get adapters: auto, from-trace, map, round-robin, uniform, zipf, power."
        ),
    ] = "auto",
    adapters: Annotated[str, typer.Option(help="Adapters to use, a,b,...; all registered without it.")] = "",
    parameter: Annotated[Number, typer.Option(help="The exponent of zipf or power.")] = None,
    base_share: Annotated[float, typer.Option(help="Share of drawn requests for the base model.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of adapters and prompts.")] = 0,
    max_prompt_tokens: Annotated[Whole, typer.Option(min=1, help="Cut longer prompts to this.")] = None,
    max_output_tokens: Annotated[Whole, typer.Option(min=1, help="Cut longer outputs to this.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Prompts use token ids below this.")] = 250,
    timeout: Annotated[float, typer.Option(help="Each request's deadline in seconds.")] = 600.0,
    max_in_flight: Annotated[int, typer.Option(help="Refuse locally beyond so many requests.")] = 8192,
    slo_ttft_ms: Annotated[float, typer.Option(help="The target for the time to the first token.")] = 2000.0,
    slo_tbt_ms: Annotated[float, typer.Option(help="The target for the time between tokens.")] = 150.0,
    out: Annotated[
        Path | None, typer.Option(help="Write records, plots and an HTML report into this folder.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    address: Annotated[
        list[str] | None,
        typer.Option(help="A router, HOST:PORT; may be repeated; else all of the running cluster."),
    ] = None,
    cluster: Annotated[str, typer.Option(help="Which cluster of this machine.")] = "default",
) -> None:
    """Replay a trace, open loop: arrivals never wait for answers."""
    from loraserve.replay.runner import ReplayOptions
    from loraserve.replay.workload import WorkloadOptions

    workload = WorkloadOptions(
        source=trace,
        format=format,
        on_bad_row=on_bad_row,
        limit=limit,
        duration_s=duration,
        assign=assign,
        adapters=tuple(name.strip() for name in adapters.split(",") if name.strip()),
        parameter=parameter,
        base_share=base_share,
        seed=seed,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
    )
    options = ReplayOptions(
        workload=workload,
        speedup=speedup,
        warmup_s=warmup,
        warmup_requests=warmup_requests,
        timeout_s=timeout,
        max_in_flight=max_in_flight,
        vocab_size=vocab_size,
        slo=_slo(slo_ttft_ms, slo_tbt_ms),
    )
    _run(options, resolve_addresses(address, cluster), out, json_output=json_output)


def _run(
    options: "ReplayOptions", addresses: tuple[str, ...], out: Path | None, *, json_output: bool
) -> None:
    from loraserve.cli import replay_output

    if out is not None:
        # Before the run: an hour of measurements must not end in a folder that cannot be made.
        _make_folder(out)
    result = run_async(lambda: _replay(options, addresses))
    files = replay_output.write_files(result, out) if out is not None else ()
    if json_output:
        replay_output.print_json(result, options, ",".join(addresses), files)
    else:
        replay_output.print_tables(result, options, files)
    if result.interrupted:
        raise SystemExit(EXIT_INTERRUPTED)
    if not any(record.outcome == "ok" for record in result.records):
        status = result.records[0].status if result.records else "nothing was sent"
        raise WorkFailedError(f"no request was answered in full; the first: {status}")


async def _replay(options: "ReplayOptions", addresses: tuple[str, ...]) -> "ReplayResult":
    """Run with a progress display; the first Ctrl-C ends the replay, a second one the program."""
    import asyncio
    import signal

    from loraserve.cli.replay_output import ProgressDisplay
    from loraserve.replay.runner import run_replay

    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def interrupt() -> None:
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        async with ProgressDisplay() as display:
            return await run_replay(addresses, options, stop=stop, on_start=display.follow)
    finally:
        interrupt()


def _slo(ttft_ms: float, tbt_ms: float) -> "Slo":
    from traces.metrics import Slo
    from traces.types import TraceError

    try:
        return Slo(ttft_ms=ttft_ms, tbt_ms=tbt_ms)
    except TraceError as error:
        raise BadInputError(f"--slo-ttft-ms, --slo-tbt-ms: {error}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"--out: {folder}: cannot be made: {error.strerror}") from error
