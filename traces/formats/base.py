"""What every trace format has: a way to know it, and a parser of its lines.

A parser never sees the file, keeps nothing but what it needs to read the next line, and raises
`RowError` for a line that is no usable request.
"""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from traces.files.adapter_table import AdapterTable

MAX_TOKENS = 10_000_000
"""Ten times the longest context window offered today; more is a damaged row."""

MAX_TIME_S = 1e11
"""Beyond any Unix time, in seconds."""

MAX_RANK = 65_536
MAX_NAME_CHARACTERS = 512

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?", re.ASCII)
_WHOLE = re.compile(r"[0-9]{1,18}(?:\.0*)?", re.ASCII)
_SHOWN_CHARACTERS = 40


class RowError(ValueError):
    """A line is no usable request; the text says why, and `time_s` when it happened if that is known."""

    def __init__(self, reason: str, time_s: float | None = None) -> None:
        super().__init__(reason)
        self.time_s = time_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request as its line has it; `time_s` counts from an origin of the file's own. Tokens are 0 in
    formats that do not tell lengths."""

    time_s: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    adapter: str | None = None
    rank: int | None = None
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Many requests at once: `time_s` float64, the others int32, `adapter` in places of the reading's
    table or -1; None where the format does not tell them. `hash_ids` (int64) are those of all rows, of
    which each has `hash_counts`."""

    time_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int32] | None = None
    output_tokens: NDArray[np.int32] | None = None
    adapter: NDArray[np.int32] | None = None
    hash_counts: NDArray[np.int32] | None = None
    hash_ids: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.time_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a parser may use besides its lines: where the file is and what the caller wants of a format
    that leaves something open."""

    path: Path
    adapters: AdapterTable = field(default_factory=AdapterTable)
    seed: int = 0
    spread: Literal["random", "even"] = "random"
    popularity: Path | None = None
    duration_s: float | None = None


class Parser:
    """Reads the lines of one file. A format defines `row`, or `expand` where a line stands for any
    number of requests; `block`, if defined too, must agree with `row`."""

    expands = False
    has_lengths = True
    keeps_unused = False
    """Whether the adapters of the table stay that no request has."""
    block_tokens = 512

    def row(self, text: str) -> Row | None:
        """The request of one line, None for a line that rightly is none; RowError."""
        raise NotImplementedError

    def block(self, text: str) -> Block | None:
        """The requests of many lines, none of them empty, much faster; None if any line is at all
        unusual, which says: take them one by one."""
        return None

    def expand(self, text: str) -> Block:
        """All requests of one line, in any order; RowError."""
        raise NotImplementedError

    def finish(self) -> Block | None:
        """What is left when the lines have ended; RowError."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFormat:
    """A registered format.

    `matches` looks at the first line; `parser` makes a parser for the lines after it, or for all of
    them where there is no header; `layout` tells a person what the format looks like. `ordered` is
    False where rows need not be in order of arrival: they are sorted.
    """

    name: str
    layout: str
    matches: Callable[[str], bool]
    parser: Callable[[str, Setting], Parser]
    has_header: bool = True
    ordered: bool = True


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
    if not NUMBER.fullmatch(text):
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


def checked_rank(text: str) -> int:
    """A rank from 1 to `MAX_RANK`."""
    rank = int(text) if re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) else 0
    if not 0 < rank <= MAX_RANK:
        raise RowError(f"rank is {shown(text)}; expected a whole number from 1 to {MAX_RANK:,}")
    return rank


def checked_name(text: str) -> str:
    """An adapter's name: short and printable."""
    if len(text) > MAX_NAME_CHARACTERS or not text.isprintable():
        right = f"expected at most {MAX_NAME_CHARACTERS} printable characters"
        raise RowError(f"adapter is {shown(text)}; {right}")
    return text
