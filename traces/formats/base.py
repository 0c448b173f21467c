"""What every trace format has: a way to know it, and a parser from one line to one row.

A parser never sees the file, keeps nothing but what it needs to read the next line, and raises
`RowError` for a line that is no usable request.
"""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_TOKENS = 10_000_000
"""Ten times the longest context window offered today; more is a damaged row."""

MAX_TIME_S = 1e11
"""Beyond any Unix time, in seconds."""

_WHOLE = re.compile(r"[0-9]{1,18}(?:\.0*)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?", re.ASCII)
_SHOWN_CHARACTERS = 40


class RowError(ValueError):
    """A line is no usable request; the text says why, and `time_s` when it happened if that is known."""

    def __init__(self, reason: str, time_s: float | None = None) -> None:
        super().__init__(reason)
        self.time_s = time_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request as its line has it; `time_s` counts from an origin of the file's own."""

    time_s: float
    prompt_tokens: int
    output_tokens: int
    adapter: str | None = None
    rank: int | None = None
    hash_ids: tuple[int, ...] = ()


RowParser = Callable[[str], Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFormat:
    """A registered format.

    `matches` looks at the first line; `parser` makes a parser for the lines after it, or for all of
    them where there is no header; `layout` tells a person what the format looks like.
    """

    name: str
    layout: str
    has_header: bool
    matches: Callable[[str], bool]
    parser: Callable[[str], RowParser]


def fields_of(text: str) -> list[str]:
    """The fields of one CSV line, stripped. A quoted field must end on its line."""
    if '"' not in text:
        return [field.strip() for field in text.split(",")]
    try:
        return [field.strip() for field in next(csv.reader([text], strict=True))]
    except csv.Error as error:
        raise RowError(f"broken CSV: {error}") from error


def header_of(text: str) -> tuple[str, ...]:
    """The column names of a header line, lower case; () if it is none."""
    try:
        return tuple(field.lower() for field in fields_of(text))
    except RowError:
        return ()


def expect_fields(fields: Sequence[str], header: Sequence[str]) -> None:
    """Refuse a row with other than one field per column."""
    if len(fields) != len(header):
        raise RowError(f"{len(fields)} fields; expected {len(header)}: {','.join(header)}")


def shown(text: object) -> str:
    """A value as an error may quote it: short, and on one line."""
    quoted = ascii(text)
    return quoted if len(quoted) <= _SHOWN_CHARACTERS else f"{quoted[:_SHOWN_CHARACTERS]}…"


def seconds(text: str, column: str) -> float:
    """A time in seconds: finite, not negative, within reason."""
    if not _NUMBER.fullmatch(text):
        raise RowError(f"{column} is {shown(text)}; expected a number of seconds")
    return checked_seconds(float(text), column)


def checked_seconds(value: float, column: str) -> float:
    """Refuse a time that is negative, NaN or beyond reason."""
    if not 0 <= value <= MAX_TIME_S:
        raise RowError(f"{column} is {value:g}; expected seconds from 0 to {MAX_TIME_S:g}")
    return value


def tokens(text: str, column: str) -> int:
    """A number of tokens from 0 to `MAX_TOKENS`; '12.0' is 12."""
    if not _WHOLE.fullmatch(text):
        raise RowError(f"{column} is {shown(text)}; expected a whole number of tokens")
    return checked_tokens(int(text.partition(".")[0]), column)


def checked_tokens(value: int, column: str) -> int:
    """Refuse a number of tokens that is negative or beyond reason."""
    if not 0 <= value <= MAX_TOKENS:
        raise RowError(f"{column} is {shown(value)}; expected 0 to {MAX_TOKENS:,} tokens")
    return value
