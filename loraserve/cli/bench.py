"""`loraserve bench`: what things cost on this machine; here `bench rank`, what a rank costs in an engine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraserve.cli.bench_fetch import fetch
from loraserve.cli.common import command, quiet_engine, until_interrupted
from loraserve.errors import BadInputError, WorkFailedError

if TYPE_CHECKING:
    from loraserve.bench.rank_rows import Mode
    from loraserve.bench.rank_run import RankOptions, RankResult
    from loraserve.bench.rank_subject import Recipe, Subject

bench_app = typer.Typer(
    help="Measure what things cost on this machine.", no_args_is_help=True, rich_markup_mode=None
)

DEFAULT_RANKS = (8, 32, 64, 128)

bench_app.command("fetch")(fetch)


@bench_app.callback()
def bench() -> None:
    """Measure what things cost on this machine."""


@bench_app.command("rank")
@command
def rank(
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer batches and repetitions: two minutes instead of six.")
    ] = False,
    mode: Annotated[
        list[str] | None,
        typer.Option(help="off, rank-true, padded or stock; may be repeated; all without it."),
    ] = None,
    rank: Annotated[
        list[int] | None,
        typer.Option(help="A rank of the generated adapters; may be repeated. [default: 8 32 64 128]"),
    ] = None,
    hidden: Annotated[int, typer.Option(help="The generated model's hidden size.")] = 1024,
    layers: Annotated[int, typer.Option(help="The generated model's layers.")] = 8,
    model: Annotated[
        Path | None, typer.Option(help="Measure this model's folder instead, with --adapter.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME=DIR, an adapter for --model; repeated.")
    ] = None,
    max_lora_rank: Annotated[int, typer.Option(help="The engine's highest rank.")] = 128,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "bfloat16",
    engine: Annotated[str, typer.Option(help="vllm or emulated.")] = "vllm",
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and prompts.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the records and a plot (PNG, SVG) into this folder.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Measure what a rank costs: without LoRA, rank-true, padded, and as vLLM does it itself.

    One engine after the other, each computing the same batches again and again: a prefill step of 256
    tokens, and decode steps of 8 sequences; with one adapter of each rank, with several of the lowest
    or of the highest rank (low, high), with both in one batch (mixed), and without adapters (base).

    \b
    Figures; KIND is prefill or decode, R a rank:
      t(MODE, ROW)  median time of a row: prefill of one prompt from handing over the request to its
                    first token, all included; of several prompts the gap that they make between two
                    tokens of a request without adapter; decode the gap between tokens, all running
      a(MODE, ROW)  t(MODE, ROW) - t(off, the same shape without adapters): what LoRA adds
      KIND_ratio_rR              t(stock) / t(rank-true)
      KIND_ratio_limit_rR        t(stock) / t(off, base): the same if adapters cost nothing at all
      KIND_over_padded_rR        a(padded) / a(rank-true)
      KIND_step_over_padded_rR   t(padded) / t(rank-true)
      KIND_over_no_lora_rR       t(rank-true) / t(off)
      base_over_no_lora_KIND     the same for requests without an adapter
      mixed_over_sum_KIND        a(mixed) / (a(its low part alone) + a(its high part alone)), rank-true
      mixed_step_over_sum_KIND   t(mixed) / (t(off) + the same sum), rank-true
      others_cpu                 share of the processors' time that went to other work, for each engine;
                                 above 0.1 the run is void: give it an idle machine
    """
    options = _options(mode, quick=quick, engine=engine, dtype=dtype, max_lora_rank=max_lora_rank, seed=seed)
    recipe = _recipe(rank, hidden, layers, seed, max_lora_rank) if model is None else None
    if recipe is not None and adapter:
        raise BadInputError("--adapter: an adapter of which model? Give its folder with --model")
    if recipe is None and rank:
        raise BadInputError("--rank: with --model the ranks are those of the adapters; remove it")
    if out is not None:
        _make_folder(out)  # before the run: minutes of measurements must not end in an error
    quiet_engine()
    result = _measure(options, recipe, model, adapter or [])
    from loraserve.cli import bench_output

    files = bench_output.write_files(result, options, out) if out is not None else ()
    if json_output:
        bench_output.print_json(result, options, files)
    else:
        bench_output.print_tables(result, options, files)


def _options(
    modes: list[str] | None, *, quick: bool, engine: str, dtype: str, max_lora_rank: int, seed: int
) -> "RankOptions":
    from loraserve.bench.rank_rows import MODES
    from loraserve.bench.rank_run import QUICK, Effort, RankOptions

    wrong = sorted(set(modes or ()) - set(MODES))
    if wrong:
        raise BadInputError(f"--mode: got {wrong[0]!r}; expected one of {', '.join(MODES)}")
    options = RankOptions(
        modes=tuple(one for one in MODES if not modes or one in modes),
        effort=QUICK if quick else Effort(),
        quick=quick,
        engine=engine,
        dtype=dtype,
        max_lora_rank=max_lora_rank,
        seed=seed,
    )
    options.config(options.modes[0], "")  # refuses what an engine cannot have
    if engine == "vllm":
        _refuse_other_execution(options.modes)
    return options


def _refuse_other_execution(modes: "tuple[Mode, ...]") -> None:
    """An engine that falls back to vLLM's own execution would be measured under a wrong name."""
    from loraserve.engines.vllm_lora.support import untested, vllm_version

    reason = untested(vllm_version()) if vllm_version() else ""
    if reason and not {"off", "stock"}.issuperset(modes):
        raise WorkFailedError(f"{reason}; --mode off --mode stock can be measured")


def _recipe(ranks: list[int] | None, hidden: int, layers: int, seed: int, max_lora_rank: int) -> "Recipe":
    from loraserve.bench.rank_subject import Recipe

    recipe = Recipe(
        hidden_size=hidden, num_layers=layers, ranks=tuple(sorted(ranks or DEFAULT_RANKS)), seed=seed
    )
    if max(recipe.ranks) > max_lora_rank:
        raise BadInputError(f"--rank {max(recipe.ranks)}: above --max-lora-rank {max_lora_rank}")
    return recipe


def _measure(
    options: "RankOptions", recipe: "Recipe | None", model: Path | None, adapters: list[str]
) -> "RankResult":
    import asyncio
    import tempfile

    from loraserve.bench import rank_subject

    with tempfile.TemporaryDirectory(prefix="loraserve-bench-") as folder:
        if recipe is None:
            assert model is not None
            subject = rank_subject.given(model, adapters, options.max_lora_rank)
        else:
            try:
                subject = rank_subject.generate(Path(folder), recipe)
            except OSError as error:
                raise WorkFailedError(f"{folder}: the model cannot be written: {error.strerror}") from error
        try:
            return asyncio.run(_run(subject, options))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


async def _run(subject: "Subject", options: "RankOptions") -> "RankResult":
    """With a progress display; Ctrl-C and SIGTERM end the engine, then the program."""
    from loraserve.bench.rank_run import Progress, run_rank
    from loraserve.cli.progress import show_progress

    progress = Progress()
    with show_progress("bench rank", progress):
        return await until_interrupted(run_rank(subject, options, progress))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"--out: {folder}: cannot be made: {error.strerror}") from error
