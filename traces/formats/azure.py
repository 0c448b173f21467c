"""Azure LLM inference traces: `TIMESTAMP,ContextTokens,GeneratedTokens` (2023 and 2024), and with
`NumImages` between them (2025, several kinds of input; images are not used). More columns do no harm.

Times are absolute with up to nine fractional digits, with or without a UTC offset. The layouts are
those of Azure/AzurePublicDataset.
"""

import re
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from traces.formats.base import (
    Block,
    Parser,
    Row,
    RowError,
    Setting,
    TraceFormat,
    expect_fields,
    fields_of,
    header_of,
    shown,
    tokens,
)
from traces.formats.csv_block import split_columns, token_column

_REQUIRED = ("timestamp", "contexttokens", "generatedtokens")
_TIMESTAMP = re.compile(
    r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:\d\d)?",
    re.ASCII,
)


def _moment(text: str) -> tuple[datetime, float]:
    """The whole second, and the fraction apart from it so that no digit is lost."""
    match = _TIMESTAMP.fullmatch(text)
    try:
        if match is None:
            raise ValueError(text)
        whole = datetime.fromisoformat(match[1] + (match[3] or ""))
    except ValueError as error:
        right = "expected a date and time like 2023-11-16 18:15:46.6805900"
        raise RowError(f"TIMESTAMP is {shown(text)}; {right}") from error
    fraction_s = int(match[2]) / 10 ** len(match[2]) if match[2] else 0.0
    return whole if whole.tzinfo else whole.replace(tzinfo=UTC), fraction_s


def _moment_column(fields: list[str], origin: datetime) -> NDArray[np.float64] | None:
    """Seconds since `origin`, of times that are all written alike."""
    pattern = _TIMESTAMP.fullmatch(fields[0])
    joined = "".join(fields)
    length = len(fields[0])
    if pattern is None or not joined.isascii() or any(len(one) != length for one in fields):
        return None
    letters = np.frombuffer(joined.encode(), dtype=np.uint8).reshape(-1, length)
    end = pattern.end(2) if pattern[2] else pattern.end(1)
    is_digit = np.array([one.isdigit() and place < end for place, one in enumerate(fields[0])])
    digits = letters[:, is_digit] - ord("0")
    if np.any(digits > 9) or np.any(letters[:, ~is_digit] != letters[0, ~is_digit]):
        return None
    numbers = digits.astype(np.int64)
    hour, minute, second = (numbers[:, at] * 10 + numbers[:, at + 1] for at in (8, 10, 12))
    if np.any(hour > 23) or np.any(minute > 59) or np.any(second > 59):
        return None
    days, place = np.unique(np.ascontiguousarray(letters[:, :10]).view("S10"), return_inverse=True)
    try:
        since = [datetime.fromisoformat(day.decode() + "T00:00:00" + (pattern[3] or "")) for day in days]
    except ValueError:
        return None
    day_s = np.array(
        [((one if one.tzinfo else one.replace(tzinfo=UTC)) - origin).total_seconds() for one in since]
    )
    fraction = np.zeros(len(fields), dtype=np.int64)
    for column in numbers[:, 14:].T:
        fraction = fraction * 10 + column
    whole_s = day_s[place.reshape(-1)] + (hour * 3600 + minute * 60 + second)
    return np.asarray(whole_s + fraction / 10 ** (numbers.shape[1] - 14), dtype=np.float64)


class _Parser(Parser):
    def __init__(self, header: str, setting: Setting) -> None:
        self._columns = header_of(header)
        self._places = tuple(self._columns.index(name) for name in _REQUIRED)
        self._origin: datetime | None = None

    def row(self, text: str) -> Row:
        fields = fields_of(text)
        expect_fields(fields, self._columns)
        time, prompt, output = (fields[place] for place in self._places)
        whole, fraction_s = _moment(time)
        self._origin = self._origin or whole
        return Row(
            time_s=(whole - self._origin).total_seconds() + fraction_s,
            prompt_tokens=tokens(prompt, "ContextTokens"),
            output_tokens=tokens(output, "GeneratedTokens"),
        )

    def block(self, text: str) -> Block | None:
        columns = split_columns(text, len(self._columns))
        if columns is None:
            return None
        time, prompt, output = (columns[place] for place in self._places)
        try:
            origin = self._origin or _moment(time[0])[0]
        except RowError:
            return None
        time_s = _moment_column(time, origin)
        prompt_tokens, output_tokens = token_column(prompt), token_column(output)
        if time_s is None or prompt_tokens is None or output_tokens is None:
            return None
        self._origin = origin
        return Block(time_s=time_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def _matches(line: str) -> bool:
    columns = header_of(line)
    return set(columns) >= set(_REQUIRED) and len(set(columns)) == len(columns)


AZURE = TraceFormat(
    name="azure",
    layout="CSV TIMESTAMP,[NumImages,]ContextTokens,GeneratedTokens",
    matches=_matches,
    parser=_Parser,
)
