"""Reading a trace file: find its format, parse its lines, count what is no request.

Bounded memory whatever the file holds; nothing here knows one format from another.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from traces.columns import TraceColumns, trace_of
from traces.files.adapter_table import AdapterTable
from traces.files.lines import MAX_LINE_BYTES, PARQUET_MAGIC, Chunk, magic_of, read_chunks
from traces.files.reading import MAX_REQUESTS, MAX_ROWS, OnBadRow, Reading
from traces.fill import Fill
from traces.formats import FORMATS
from traces.formats.base import Parser, Row, RowError, Setting, TraceFormat, shown
from traces.types import Trace, TraceError, check_cut

__all__ = ["OnBadRow", "bundled_trace", "read_columns", "read_trace"]

PARQUET = "parquet"


def read_trace(
    path: str | Path,
    *,
    format: str | None = None,
    on_bad_row: OnBadRow = "refuse",
    limit: int | None = None,
    duration_s: float | None = None,
    fill: Fill | None = None,
) -> Trace:
    """`read_columns`, row by row, and of at most `MAX_ROWS` requests."""
    return trace_of(_read(path, format, on_bad_row, limit, duration_s, fill, MAX_ROWS))


def read_columns(
    path: str | Path,
    *,
    format: str | None = None,
    on_bad_row: OnBadRow = "refuse",
    limit: int | None = None,
    duration_s: float | None = None,
    fill: Fill | None = None,
) -> TraceColumns:
    """Read a plain, gzip or Parquet trace of any registered format, found by content unless named.

    `limit` and `duration_s` cut after bad rows are taken out; lines after the cut are not read, except
    of formats whose rows come in no order. `fill` says what a format leaves open.
    TraceError on a file that is no trace or is damaged, on one without a usable request, on the first
    bad row (`refuse`), and on a format without lengths where `fill` has none; `skip` counts bad rows
    instead and keeps their line numbers.
    """
    return _read(path, format, on_bad_row, limit, duration_s, fill, MAX_REQUESTS)


def _read(
    path: str | Path,
    format: str | None,
    on_bad_row: OnBadRow,
    limit: int | None,
    duration_s: float | None,
    fill: Fill | None,
    max_requests: int,
) -> TraceColumns:
    if on_bad_row not in ("refuse", "skip"):
        raise TraceError(f"on_bad_row is {on_bad_row!r}; expected 'refuse' or 'skip'")
    check_cut(limit, duration_s)
    if format is not None and format not in (*FORMATS, PARQUET):
        raise TraceError(
            f"no trace format is called {shown(format)}; there are: {', '.join((*FORMATS, PARQUET))}"
        )
    wanted = Wanted(format, on_bad_row == "refuse", limit, duration_s, fill or Fill(), max_requests)
    if magic_of(Path(path)) == PARQUET_MAGIC and format in (None, PARQUET):
        from traces.files.parquet import read_parquet

        return read_parquet(Path(path), wanted)
    if format == PARQUET:
        raise TraceError("this is no Parquet file; leave --format out", source=str(path))
    return read_text(read_chunks(Path(path)), Path(path), wanted)


class Wanted(NamedTuple):
    """What the caller asked for."""

    format: str | None
    refuse: bool
    limit: int | None
    duration_s: float | None
    fill: Fill
    max_requests: int

    def reading(self, source: str, *, ordered: bool, has_lengths: bool, adapters: AdapterTable) -> Reading:
        if not has_lengths:
            self.fill.check_lengths(self.format or "this format", source)
        return Reading(
            source=source,
            refuse=self.refuse,
            ordered=ordered,
            has_lengths=has_lengths,
            adapters=adapters,
            limit=self.limit,
            duration_s=self.duration_s,
            max_requests=self.max_requests,
        )


def read_text(chunks: Iterator[Chunk], path: Path, wanted: Wanted) -> TraceColumns:
    """The columns of lines, the first of which tells the format."""
    source = str(path)
    first, rest = _first_line(chunks, source)
    chosen = _choose_format(first.text, wanted.format, source)
    setting = Setting(
        path=path,
        seed=wanted.fill.seed,
        spread=wanted.fill.spread,
        popularity=wanted.fill.popularity,
        duration_s=wanted.duration_s,
    )
    parser = chosen.parser(first.text, setting)
    reading = wanted._replace(format=chosen.name).reading(
        source, ordered=chosen.ordered, has_lengths=parser.has_lengths, adapters=setting.adapters
    )
    last = first.number
    if not chosen.has_header:
        _take_lines(reading, parser, [first])
    for chunk in rest:
        if reading.done:
            break
        _take(reading, parser, chunk)
        last = chunk.line
    _finish(reading, parser, last)
    return reading.columns(
        format=chosen.name,
        block_tokens=parser.block_tokens,
        fill=wanted.fill,
        keep_adapters=parser.keeps_unused,
    )


def bundled_trace(name: str = "demo") -> Trace:
    """A small synthetic trace that ships with the package."""
    folder = resources.files("traces") / "bundled"
    known = sorted(
        entry.name.removesuffix(".csv") for entry in folder.iterdir() if entry.name.endswith(".csv")
    )
    if name not in known:
        raise TraceError(f"no bundled trace is called {shown(name)}; there are: {', '.join(known)}")
    with resources.as_file(folder / f"{name}.csv") as path:
        return replace(read_trace(path), source=f"bundled:{name}")


class _Line(NamedTuple):
    """One line; `problem` says why it is no text."""

    number: int
    text: str
    problem: str = ""

    @classmethod
    def of(cls, number: int, data: bytes | None) -> "_Line":
        if data is None or len(data) > MAX_LINE_BYTES:
            return cls(number, "", f"the line is longer than {MAX_LINE_BYTES:,} bytes, which no row is")
        try:
            return cls(number, data.rstrip(b"\r").decode())
        except UnicodeDecodeError:
            return cls(number, "", "the line is not UTF-8 text")


def _lines(chunk: Chunk) -> Iterator[_Line]:
    if chunk.data is None:
        yield _Line.of(chunk.line, None)
        return
    for number, data in enumerate(chunk.data.split(b"\n"), start=chunk.line):
        yield _Line.of(number, data)


def _first_line(chunks: Iterator[Chunk], source: str) -> tuple[_Line, Iterator[Chunk]]:
    """The first line that is not empty, and what comes after it."""
    for chunk in chunks:
        data, number = chunk.data, chunk.line
        while True:
            head, found, data = (None, b"", b"") if data is None else data.partition(b"\n")
            line = _Line.of(number, head)
            if line.problem:
                raise TraceError(f"{line.problem}; {_known_formats()}", source=source, line=number)
            text = line.text.removeprefix("\ufeff")
            if text.strip():
                return _Line(number, text), _after(Chunk(number + 1, data) if found else None, chunks)
            if not found:
                break
            number += 1
    raise TraceError(f"the file is empty; {_known_formats()}", source=source)


def _after(chunk: Chunk | None, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    if chunk is not None:
        yield chunk
    yield from chunks


def _take(reading: Reading, parser: Parser, chunk: Chunk) -> None:
    """The rows of many lines, all at once if that goes."""
    if not parser.expands and chunk.data is not None:
        text = _plain_text(chunk.data)
        if text == "":
            return
        block = None if text is None else parser.block(text)
        if block is not None and reading.block(block):
            return
    _take_lines(reading, parser, _lines(chunk))


def _plain_text(data: bytes) -> str | None:
    """Lines with nothing but line feeds between them; None if that cannot be."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if "\r" in text:
        text = f"{text}\n".replace("\r\n", "\n")
    text = text.strip("\n")
    while "\n\n" in text:
        text = text.replace("\n\n", "\n")
    return text


def _take_lines(reading: Reading, parser: Parser, lines: Iterable[_Line]) -> None:
    if parser.expands:
        for line in lines:
            _expand(reading, parser, line)
        return
    reading.rows(
        (line.number, partial(_row, parser, line)) for line in lines if line.problem or line.text.strip()
    )


def _row(parser: Parser, line: _Line) -> Row | None:
    if line.problem:
        raise RowError(line.problem)
    return parser.row(line.text)


def _expand(reading: Reading, parser: Parser, line: _Line) -> None:
    if not line.problem and not line.text.strip():
        return
    try:
        if line.problem:
            raise RowError(line.problem)
        reading.expanded(parser.expand(line.text), line.number)
    except RowError as error:
        reading.bad(line.number, str(error))
    except OverflowError as error:
        raise TraceError(f"{error}, which no trace has", source=reading.source, line=line.number) from error


def _finish(reading: Reading, parser: Parser, last: int) -> None:
    try:
        block = parser.finish()
        if block is not None:
            reading.expanded(block, last)
    except RowError as error:
        reading.bad(last, str(error))


def _choose_format(first: str, name: str | None, source: str) -> TraceFormat:
    for candidate in FORMATS.values() if name is None else (FORMATS[name],):
        if candidate.matches(first):
            return candidate
    if name is not None:
        what = f"the first line {shown(first)} is not {name}; expected {FORMATS[name].layout}"
        raise TraceError(what, source=source, line=1)
    raise TraceError(
        f"the first line {shown(first)} is of no known format; {_known_formats()}", source=source
    )


def _known_formats() -> str:
    names = ", ".join((*FORMATS, PARQUET))
    return f"expected one of: {names} (`loraserve trace formats` says what they look like)"
