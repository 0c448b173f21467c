"""Reading a trace file: find its format, parse its lines, count what is no request.

Bounded memory whatever the file holds; nothing here knows one format from another.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

from traces.formats import FORMATS
from traces.formats.base import Row, RowError, RowParser, TraceFormat, shown
from traces.lines import MAX_LINE_BYTES, read_lines
from traces.types import MAX_BAD_ROWS_KEPT, BadRow, Trace, TraceError, TraceRequest, check_cut

MAX_REQUESTS = 10_000_000
"""About 2 GB of requests; beyond it a limit must be given."""

MAX_DURATION_S = 10 * 366 * 86_400.0

OnBadRow = Literal["refuse", "skip"]


def read_trace(
    path: str | Path,
    *,
    format: str | None = None,
    on_bad_row: OnBadRow = "refuse",
    limit: int | None = None,
    duration_s: float | None = None,
) -> Trace:
    """Read a plain or gzip trace of any registered format, found by content unless named.

    `limit` and `duration_s` cut after bad rows are taken out; lines after the cut are not read.
    TraceError on a file that is no trace or is damaged, on one without a usable request, and on the
    first bad row (`refuse`); `skip` counts bad rows instead and keeps their line numbers.
    """
    if on_bad_row not in ("refuse", "skip"):
        raise TraceError(f"on_bad_row is {on_bad_row!r}; expected 'refuse' or 'skip'")
    check_cut(limit, duration_s)
    source = str(path)
    lines = read_lines(Path(path))
    first = _first_line(lines, source)
    chosen = _choose_format(first.text, format, source)
    reading = _Reading(source=source, refuse=on_bad_row == "refuse", parse=chosen.parser(first.text))
    rest = _Line.all(lines) if chosen.has_header else itertools.chain([first], _Line.all(lines))
    requests = []
    for request in reading.requests(rest):
        if duration_s is not None and request.arrival_s >= duration_s:
            break
        requests.append(request)
        if limit is not None and len(requests) >= limit:
            break
    if not requests:
        raise reading.nothing_left()
    return Trace.of(
        requests,
        source=source,
        format=chosen.name,
        bad_rows=tuple(reading.bad_rows),
        num_bad_rows=reading.num_bad_rows,
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
    """One line; `problem` says why it is no text. A tuple, as there are millions."""

    number: int
    text: str
    problem: str = ""

    @classmethod
    def of(cls, number: int, data: bytes | None) -> "_Line":
        if data is None:
            return cls(number, "", f"the line is longer than {MAX_LINE_BYTES:,} bytes, which no row is")
        try:
            return cls(number, data.decode())
        except UnicodeDecodeError:
            return cls(number, "", "the line is not UTF-8 text")

    @classmethod
    def all(cls, lines: Iterator[tuple[int, bytes | None]]) -> Iterator["_Line"]:
        return (cls.of(number, data) for number, data in lines)


def _first_line(lines: Iterator[tuple[int, bytes | None]], source: str) -> _Line:
    for number, data in lines:
        line = _Line.of(number, data)
        if line.problem:
            raise TraceError(f"{line.problem}; {_known_formats()}", source=source, line=number)
        text = line.text.removeprefix("\ufeff")
        if text.strip():
            return _Line(number, text)
    raise TraceError(f"the file is empty; {_known_formats()}", source=source)


def _choose_format(first: str, name: str | None, source: str) -> TraceFormat:
    if name is not None and name not in FORMATS:
        raise TraceError(f"no trace format is called {shown(name)}; there are: {', '.join(FORMATS)}")
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
    return "expected one of: " + "; ".join(f"{known.name} ({known.layout})" for known in FORMATS.values())


@dataclass(slots=True, kw_only=True)
class _Reading:
    """What one pass over a file has found so far. Rows may never step back in time: the time of
    every row whose time could be read counts, a failed request's too."""

    source: str
    refuse: bool
    parse: RowParser
    origin_s: float | None = None
    latest_s: float = -math.inf
    num_requests: int = 0
    num_bad_rows: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)

    def requests(self, lines: Iterator[_Line]) -> Iterator[TraceRequest]:
        for line in lines:
            if not line.problem and not line.text.strip():
                continue
            try:
                row = self._row(line)
            except RowError as error:
                self._count_bad(line.number, str(error))
                continue
            if self.origin_s is None:
                self.origin_s = row.time_s
            if self.num_requests >= MAX_REQUESTS:
                what = f"more than {MAX_REQUESTS:,} requests; give a limit"
                raise TraceError(what, source=self.source, line=line.number)
            yield TraceRequest(
                index=self.num_requests,
                arrival_s=row.time_s - self.origin_s,
                prompt_tokens=row.prompt_tokens,
                output_tokens=row.output_tokens,
                adapter=row.adapter,
                rank=row.rank,
                hash_ids=row.hash_ids,
            )
            self.num_requests += 1

    def _row(self, line: _Line) -> Row:
        if line.problem:
            raise RowError(line.problem)
        try:
            row = self.parse(line.text)
        except RowError as error:
            if error.time_s is not None:
                self._advance(error.time_s)
            raise
        self._advance(row.time_s)
        for what, value in (("prompt", row.prompt_tokens), ("output", row.output_tokens)):
            if value < 1:
                raise RowError(f"{value} {what} tokens; a request has at least 1")
        return row

    def _advance(self, time_s: float) -> None:
        if time_s < self.latest_s:
            back_s = self.latest_s - time_s
            raise RowError(f"time goes back by {back_s:g} s; rows must be in order of arrival")
        if self.origin_s is not None and time_s - self.origin_s > MAX_DURATION_S:
            after_s = time_s - self.origin_s
            raise RowError(f"{after_s:g} s after the first request; a trace ends within ten years")
        self.latest_s = time_s

    def _count_bad(self, line: int, reason: str) -> None:
        if self.refuse:
            raise TraceError(
                f"{reason} (on-bad-row 'skip' counts such rows and goes on)", source=self.source, line=line
            )
        self.num_bad_rows += 1
        if len(self.bad_rows) < MAX_BAD_ROWS_KEPT:
            self.bad_rows.append(BadRow(line=line, reason=reason))

    def nothing_left(self) -> TraceError:
        if not self.bad_rows:
            return TraceError("no requests after the header; expected one per line", source=self.source)
        first = self.bad_rows[0]
        what = f"no usable request: all {self.num_bad_rows:,} rows are bad, the first because {first.reason}"
        return TraceError(what, source=self.source, line=first.line)
