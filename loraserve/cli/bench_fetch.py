"""`loraserve bench fetch`: how long an adapter takes to come, from a peer, the disk or the store."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from loraserve.cli.common import command, quiet_engine, until_interrupted
from loraserve.errors import BadInputError, WorkFailedError

if TYPE_CHECKING:
    from loraserve.bench.fetch_figures import Source
    from loraserve.bench.fetch_run import FetchOptions, FetchResult
    from loraserve.bench.fetch_subject import Shape

DEFAULT_SIZES = "1MiB,4MiB,16MiB,64MiB,256MiB"
DEFAULT_RANKS = "8,32,64,128"
_ENGINES = ("vllm", "emulated")
_MODEL_TOKENS = 512


@command
def fetch(
    sizes: Annotated[
        str | None, typer.Option(help=f"Adapters of these sizes, up to 8GiB. [default: {DEFAULT_SIZES}]")
    ] = None,
    ranks: Annotated[
        str | None,
        typer.Option(help="Adapters of these ranks for a model instead, such as 8,64 (see --model)."),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="ucx, tcp, page_cache, cold_disk or origin; may be repeated; all without it."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions of each row.")] = 9,
    quick: Annotated[bool, typer.Option("--quick", help="Three repetitions, up to 64 MiB.")] = False,
    engine: Annotated[
        str | None,
        typer.Option(help="Also until active in a slot of this engine: vllm or emulated; by rank only."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The model's folder for --ranks; one is generated without it.")
    ] = None,
    hidden: Annotated[int, typer.Option(help="The generated model's hidden size.")] = 1024,
    layers: Annotated[int, typer.Option(min=1, help="The generated model's layers.")] = 8,
    folder: Annotated[
        Path | None,
        typer.Option(help="Where the adapters lie meanwhile, on the disk to be measured. [default: TMPDIR]"),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="Write what a peer and the store reach into this profile (--profile of up)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write fetch.json and a plot (PNG, SVG) here.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Measure how long an adapter takes to come: from a peer, the page cache, the disk, the store.

    One process holds the adapters, another one fetches them through its fabric; each source of an adapter
    takes its turn in every round. Resident: a sealed, verified segment that the engine can map, from which
    other replicas can fetch in turn. Active: in a slot of the engine, requests need not wait.

    \b
    Sources:
      ucx, tcp     a peer process of this machine, over this transport
      page_cache   a plain folder on this machine, which is in memory: read, checked, hashed, laid out
      cold_disk    the same folder after its pages were dropped, as far as the system really drops them;
                   a virtual disk's own host may still have them
      origin       an entry of a controller's store, in memory, against the digest and the head that the
                   controller tells
    """
    from loraserve.bench.fetch_run import FetchOptions
    from loraserve.cli.bench_fetch_profile import check_profile, keep_speeds

    if profile is not None:
        check_profile(profile)
    if engine is not None and engine not in _ENGINES:
        raise BadInputError(f"--engine: got {engine!r}; expected vllm or emulated")
    if engine is not None and sizes is not None:
        raise BadInputError("--engine: an engine takes adapters of its model; give --ranks, not --sizes")
    if sizes is not None and ranks is not None:
        raise BadInputError("--sizes and --ranks: give one of them")
    if model is not None and ranks is None and engine is None:
        raise BadInputError("--model: adapters of which ranks? Give --ranks")
    named = _sources(source)
    if ranks is None and engine is not None:
        ranks = DEFAULT_RANKS
    numbers = () if ranks is None else _ranks(ranks)
    _check_folders(out, folder)
    quiet_engine()
    with _working_folder(folder) as work:
        if numbers:
            shapes, path = _rank_shapes(numbers, model, work, hidden, layers)
        else:
            shapes, path = _size_shapes(sizes, quick=quick), None
        options = FetchOptions(
            shapes=shapes,
            sources=named,
            repetitions=3 if quick else repeats,
            engine=_engine_config(engine, path, max(numbers)) if engine is not None and path else None,
        )
        result = _measure(options, work)
    if profile is not None:
        keep_speeds(profile, result.rows)
    from loraserve.cli import bench_fetch_output

    files = bench_fetch_output.write_files(result, options, out) if out is not None else ()
    if json_output:
        bench_fetch_output.print_json(result, options, files)
    else:
        bench_fetch_output.print_tables(result, options, files)


def _sources(given: Sequence[str] | None) -> "tuple[Source, ...]":
    from loraserve.bench.fetch_figures import SOURCES

    wrong = sorted(set(given or ()) - set(SOURCES))
    if wrong:
        raise BadInputError(f"--source: got {wrong[0]!r}; expected one of {', '.join(SOURCES)}")
    return tuple(one for one in SOURCES if not given or one in given)


def _ranks(text: str) -> tuple[int, ...]:
    from loraserve.bench.fetch_subject import MAX_RANK

    found = []
    for part in text.split(","):
        if not part.strip().isdecimal() or not 1 <= int(part) <= MAX_RANK:
            raise BadInputError(f"--ranks: got {part.strip()!r}; expected numbers from 1 to {MAX_RANK}")
        found.append(int(part))
    return tuple(sorted(set(found)))


def _size_shapes(text: str | None, *, quick: bool) -> "tuple[Shape, ...]":
    from loraserve.bench.fetch_subject import parse_size, shape_of_size

    parts = (DEFAULT_SIZES if text is None else text).split(",")
    if quick and text is None:
        parts = parts[:-1]
    return tuple(shape_of_size(one) for one in sorted({parse_size(part) for part in parts}))


def _rank_shapes(
    ranks: Sequence[int], model: Path | None, work: Path, hidden: int, layers: int
) -> "tuple[tuple[Shape, ...], Path]":
    from loraserve.adapters import read_base
    from loraserve.bench.fetch_subject import shape_of_rank
    from loraserve.samples import build_checkpoint

    if model is None:
        try:
            model = build_checkpoint(work / "model", hidden_size=hidden, num_layers=layers)
        except OSError as error:
            raise WorkFailedError(f"{work}: the model cannot be written: {error.strerror}") from error
    base = read_base(model)
    return tuple(shape_of_rank(base, rank) for rank in ranks), model


def _engine_config(kind: str, model: Path, rank: int) -> dict[str, Any]:
    """An engine of the lowest `max_lora_rank` that takes this rank; ConfigError for one that cannot be."""
    from loraserve.config import LoraRank, parse_config

    section = {
        "kind": kind,
        "max_lora_rank": min(one for one in get_args(LoraRank) if one >= rank),
        "adapter_slots": 2,
        "max_num_seqs": 4,
        "max_model_len_tokens": _MODEL_TOKENS,
        "max_num_batched_tokens": _MODEL_TOKENS,
        "extra": {"use_tqdm_on_load": False} if kind == "vllm" else {},
    }
    tree: dict[str, Any] = {"model": {"path": str(model)}, "engine": section}
    parse_config(tree)
    return tree


def _measure(options: "FetchOptions", work: Path) -> "FetchResult":
    import asyncio

    try:
        return asyncio.run(_run(options, work))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


async def _run(options: "FetchOptions", work: Path) -> "FetchResult":
    """With a progress display; Ctrl-C and SIGTERM end both processes, then the program."""
    from loraserve.bench.fetch_run import FetchProgress, run_fetch
    from loraserve.cli.progress import show_progress

    progress = FetchProgress()
    with show_progress("bench fetch", progress):
        return await until_interrupted(run_fetch(options, work, progress))


def _check_folders(out: Path | None, folder: Path | None) -> None:
    """Before the run: minutes of measurements must not end in an error."""
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInputError(f"--out: {out}: cannot be made: {error.strerror}") from error
    if folder is not None and not folder.is_dir():
        raise BadInputError(f"--folder: {folder}: no such folder")


@contextmanager
def _working_folder(parent: Path | None) -> Iterator[Path]:
    try:
        made = tempfile.TemporaryDirectory(prefix="loraserve-fetch-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise BadInputError(f"--folder: {parent}: cannot be written: {error.strerror}") from error
    with made as name:
        yield Path(name)
