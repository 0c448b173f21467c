"""Writing a workload: the S-LoRA layout with ranks, Mooncake's JSON lines, or Parquet; what is written is
read back exactly."""

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

from traces.columns import DEFAULT_BLOCK_TOKENS, TraceColumns, columns_of
from traces.formats.base import MAX_NAME_CHARACTERS
from traces.formats.slora import COLUMNS
from traces.types import Trace, TraceError

WRITTEN = {".csv": "slora", ".jsonl": "mooncake", ".parquet": "parquet"}
"""The format by the name's ending; `.csv.gz` and `.jsonl.gz` are compressed."""

_ROWS_AT_ONCE = 1 << 15


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write a CSV in the S-LoRA layout, gzip if the name ends in `.gz`; the same trace gives the same
    bytes. Block hashes have no column here and are left out."""
    write_columns(columns_of(trace), path, format="slora")


def trace_csv(trace: Trace) -> str:
    """The CSV text of a trace."""
    return "".join(_csv_pieces(columns_of(trace)))


def write_columns(columns: TraceColumns, path: str | Path, *, format: str | None = None) -> None:
    """Write a workload in a format of `WRITTEN`, chosen by the name's ending unless given.

    Only Mooncake's and Parquet keep block hashes. A file appears whole or not at all. TraceError for
    an ending that says nothing, for a name that would not come back and for lengths that are not known;
    OSError.
    """
    target = Path(path)
    chosen = format or format_of(target)
    _check_lengths(columns)
    for adapter in columns.adapters:
        _check_name(adapter.name)
    with _replacing(target) as part:
        if chosen == "parquet":
            from traces.files.parquet import write_parquet

            write_parquet(columns, part)
        else:
            _write_text(_PIECES[chosen](columns), part, packed=target.suffix == ".gz")


def format_of(path: Path) -> str:
    """The format that the name of a file to write asks for."""
    ending = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    chosen = WRITTEN.get(ending)
    if chosen is None or (chosen == "parquet" and path.suffix == ".gz"):
        endings = ".csv, .csv.gz, .jsonl, .jsonl.gz or .parquet"
        raise TraceError(
            f"the name does not say in which format to write; it should end in {endings}", source=str(path)
        )
    return chosen


def _write_text(pieces: Iterator[str], path: Path, *, packed: bool) -> None:
    with path.open("wb") as raw:
        if not packed:
            for piece in pieces:
                raw.write(piece.encode())
            return
        # No name and no time: the same trace gives the same bytes.
        with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
            for piece in pieces:
                file.write(piece.encode())


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    if target.exists() and not target.is_file():
        yield target  # a pipe or a device
        return
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _slices(columns: TraceColumns) -> Iterator[tuple[int, Iterator[tuple[float, int, int, int]]]]:
    """The first row's number, and the rows, of one part after the other."""
    for begin in range(0, len(columns), _ROWS_AT_ONCE):
        part = slice(begin, begin + _ROWS_AT_ONCE)
        yield (
            begin,
            zip(
                columns.arrival_s[part].tolist(),
                columns.prompt_tokens[part].tolist(),
                columns.output_tokens[part].tolist(),
                columns.adapter[part].tolist(),
                strict=True,
            ),
        )


def _csv_pieces(columns: TraceColumns) -> Iterator[str]:
    yield ",".join(COLUMNS) + "\n"
    names = [_csv_field(one.name) for one in columns.adapters] + [""]
    ranks = ["" if one.rank is None else str(one.rank) for one in columns.adapters] + [""]
    for begin, rows in _slices(columns):
        yield "".join(
            f"{index},{names[place]},{prompt},{output},{arrival_s!r},{ranks[place]}\n"
            for index, (arrival_s, prompt, output, place) in enumerate(rows, start=begin)
        )


def _csv_field(name: str) -> str:
    _check_name(name)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow((name, ""))
    return buffer.getvalue()[:-1]


def _jsonl_pieces(columns: TraceColumns) -> Iterator[str]:
    ends = [""] * (len(columns.adapters) + 1)
    size = columns.hash_block_tokens
    block_size = "" if size == DEFAULT_BLOCK_TOKENS or columns.hash_ids is None else f', "block_size": {size}'
    for place, one in enumerate(columns.adapters):
        rank = "" if one.rank is None else f', "rank": {one.rank}'
        ends[place] = f', "adapter": {json.dumps(one.name)}{rank}'
    offsets, ids = columns.hash_offsets, columns.hash_ids
    for begin, rows in _slices(columns):
        lines = []
        for index, (arrival_s, prompt, output, place) in enumerate(rows, start=begin):
            hashes = ""
            if offsets is not None and ids is not None:
                hashes = f', "hash_ids": {ids[offsets[index] : offsets[index + 1]].tolist()}{block_size}'
            lines.append(
                f'{{"timestamp": {_milliseconds(arrival_s)}, "input_length": {prompt},'
                f' "output_length": {output}{hashes}{ends[place]}}}\n'
            )
        yield "".join(lines)


def _milliseconds(arrival_s: float) -> str:
    """The very number of seconds, its decimal point moved: the reader moves it back before it rounds."""
    exact = Decimal(repr(arrival_s)).scaleb(3)
    return str(int(exact)) if exact == int(exact) else f"{exact:f}"


_PIECES: dict[str, Callable[[TraceColumns], Iterator[str]]] = {
    "slora": _csv_pieces,
    "mooncake": _jsonl_pieces,
}


def _check_lengths(columns: TraceColumns) -> None:
    if len(columns) and min(columns.prompt_tokens.min(), columns.output_tokens.min()) < 1:
        raise TraceError("the lengths of some requests are not known; a trace with 0 tokens is not written")


def _check_name(adapter: str) -> None:
    if adapter in ("", "None") or adapter != adapter.strip() or not adapter.isprintable():
        raise TraceError(f"the adapter name {adapter!r} cannot be written to a trace; use printable names")
    if len(adapter) > MAX_NAME_CHARACTERS:
        raise TraceError(f"an adapter name of {len(adapter)} characters; at most {MAX_NAME_CHARACTERS}")
