"""`loraserve profile`: measures what one replica can do and what its steps cost, and writes its profile."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraserve.cli.common import command, quiet_engine, until_interrupted
from loraserve.errors import BadInputError, WorkFailedError

if TYPE_CHECKING:
    from loraserve.config import Config
    from loraserve.profiling.run import Measured, ProfileOptions
    from loraserve.profiling.subject import Subject

DEFAULT_RANKS = "8,16,32,64,128"


@command
def profile(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The TOML configuration; its engine is measured.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="emulated or vllm, instead of the configuration's.")
    ] = None,
    lora_execution: Annotated[
        str | None, typer.Option(help="rank-true, padded or stock, instead of the configuration's.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The model's folder, instead of the configuration's.")
    ] = None,
    ranks: Annotated[
        str, typer.Option(help="Ranks to measure, with commas between; adapters are made.")
    ] = DEFAULT_RANKS,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=DIR, an adapter to measure with instead; repeated.")
    ] = None,
    slo_ttft_ms: Annotated[
        float | None, typer.Option(help="95 % of first tokens come within this. [default: slo.ttft_ms]")
    ] = None,
    slo_tbt_ms: Annotated[
        float | None, typer.Option(help="95 % of gaps between tokens are within this. [default: slo.tbt_ms]")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Mean prompt of the load.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=2, help="Mean output of the load.")] = 32,
    name: Annotated[str | None, typer.Option(help="The profile's name. [default: from the engine]")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write. [default: NAME.toml here]")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer batches, shorter probes, operating points to 15 %.")
    ] = False,
    limit_s: Annotated[
        float | None, typer.Option(min=1.0, help="Begin no probe after so many seconds; write what there is.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, prompts and lengths.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Measure one replica and write its profile.

    First batches that vary one cost after the other (decoding rows, prompt tokens, context, adapters,
    ranks alone and mixed): the latency model is fitted to their steps, once for each kernel, and the one
    with the least error is recommended. Then load: for each rank alone, and for all in turn, the highest
    tokens/s (prompt and output) of which the SLO holds, by doubling, then bisection. The emulated engine
    is measured in virtual time. The file holds every probe; `simulate --profile FILE` uses it.
    """
    configured = _config(config, engine, lora_execution, model)
    options = _options(
        configured, slo_ttft_ms, slo_tbt_ms, prompt_tokens, output_tokens, quick=quick, seed=seed
    )
    if limit_s is not None:
        options = dataclasses.replace(options, limit_s=limit_s)
    wanted = _ranks(ranks)
    if not adapter:
        from loraserve.profiling.subject import check_ranks

        check_ranks(configured, wanted)
    quiet_engine()
    _measure(configured, options, wanted, adapter or [], name, out, json_output=json_output)


def _config(path: Path | None, engine: str | None, execution: str | None, model: Path | None) -> "Config":
    from loraserve.config import load_config

    overrides: dict[str, object] = {}
    if engine is not None:
        overrides["engine.kind"] = engine
    if execution is not None:
        overrides["engine.lora_execution"] = execution
    if model is not None:
        overrides["model.path"] = str(model)
    config = load_config(path, overrides)
    if config.engine.auto:
        raise BadInputError(f"engine.{config.engine.auto[0]}: auto; give a number to measure with")
    if config.engine.lora_execution == "off":
        raise BadInputError(
            "engine.lora_execution: off; expected rank-true, padded or stock to measure ranks"
        )
    if config.engine.kind == "vllm":
        _refuse_other_execution(config.engine.lora_execution)
    return config


def _refuse_other_execution(execution: str) -> None:
    """An engine that falls back to vLLM's own execution would be measured under a wrong name."""
    from loraserve.engines.vllm_lora.support import untested, vllm_version

    reason = untested(vllm_version()) if vllm_version() else ""
    if reason and execution != "stock":
        raise WorkFailedError(f"{reason}; --lora-execution stock can be measured")


def _options(
    config: "Config",
    ttft_ms: float | None,
    tbt_ms: float | None,
    prompt_tokens: int,
    output_tokens: int,
    *,
    quick: bool,
    seed: int,
) -> "ProfileOptions":
    from loraserve.profiling.run import QUICK, Effort, ProfileOptions
    from placement.profile import Slo

    longest = prompt_tokens + prompt_tokens // 2 + output_tokens + output_tokens // 2
    if longest > config.engine.max_model_len_tokens:
        raise BadInputError(
            f"--prompt-tokens {prompt_tokens} and --output-tokens {output_tokens}: requests of up to "
            f"{longest} tokens, but engine.max_model_len_tokens is {config.engine.max_model_len_tokens}"
        )
    try:
        slo = Slo(ttft_ms=ttft_ms or config.slo.ttft_ms, tbt_ms=tbt_ms or config.slo.tbt_ms)
    except ValueError as error:
        raise BadInputError(f"--slo: {error}") from error
    return ProfileOptions(
        slo=slo,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        effort=QUICK if quick else Effort(),
        quick=quick,
        seed=seed,
    )


def _ranks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(one) for one in text.split(","))
    except ValueError as error:
        raise BadInputError(f"--ranks: got {text!r}; expected numbers with commas between") from error


def _measure(
    config: "Config",
    options: "ProfileOptions",
    ranks: tuple[int, ...],
    adapters: list[str],
    name: str | None,
    out: Path | None,
    *,
    json_output: bool,
) -> None:
    import asyncio
    import tempfile

    from loraserve.cli import profile_output
    from loraserve.profiling.files import write_profile
    from loraserve.profiling.made import default_name, make_profile
    from loraserve.profiling.subject import prepare

    with tempfile.TemporaryDirectory(prefix="loraserve-profile-") as folder:
        subject = prepare(config, ranks, adapters, Path(folder), seed=options.seed)
        called = name or default_name(config, subject)
        path = out if out is not None else Path(f"{called}.toml")
        _check_writable(path)
        profile_output.show_estimate(config, subject, options, path)
        try:
            measured = asyncio.run(_run(config, subject, options))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
    conditions = profile_output.conditions(options, measured)
    try:
        made = make_profile(called, config, subject, options, measured, conditions)
    except ValueError as error:
        raise BadInputError(f"--name: {error}") from error
    write_profile(path, made)
    if json_output:
        profile_output.print_json(made, measured, path)
    else:
        profile_output.print_tables(made, measured, path)


async def _run(config: "Config", subject: "Subject", options: "ProfileOptions") -> "Measured":
    """With a progress display; Ctrl-C and SIGTERM end the engine, then the program."""
    from loraserve.bench.idle import Bystanders
    from loraserve.cli.progress import show_progress
    from loraserve.profiling.run import Progress, run_profile

    progress = Progress()
    work = run_profile(config, subject, options, progress, watch=lambda pids: Bystanders(pids).share)
    with show_progress("profile", progress):
        return await until_interrupted(work)


def _check_writable(path: Path) -> None:
    """Before the run: minutes of measurements must not end in an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise BadInputError(f"--out: {path}: is a folder; expected a file")
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise BadInputError(f"--out: {path}: cannot be written: {error.strerror}") from error
