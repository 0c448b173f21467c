"""Azure LLM inference traces of 2023 and later: `TIMESTAMP,ContextTokens,GeneratedTokens`.

Times are absolute with up to nine fractional digits, with or without a UTC offset.
"""

import re
from datetime import UTC, datetime

from traces.formats.base import (
    Row,
    RowError,
    RowParser,
    TraceFormat,
    expect_fields,
    fields_of,
    header_of,
    shown,
    tokens,
)

_HEADER = ("timestamp", "contexttokens", "generatedtokens")
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


def _parser(header: str) -> RowParser:
    origin: datetime | None = None

    def parse(text: str) -> Row:
        nonlocal origin
        fields = fields_of(text)
        expect_fields(fields, ("TIMESTAMP", "ContextTokens", "GeneratedTokens"))
        whole, fraction_s = _moment(fields[0])
        origin = origin or whole
        return Row(
            time_s=(whole - origin).total_seconds() + fraction_s,
            prompt_tokens=tokens(fields[1], "ContextTokens"),
            output_tokens=tokens(fields[2], "GeneratedTokens"),
        )

    return parse


AZURE = TraceFormat(
    name="azure",
    layout="CSV TIMESTAMP,ContextTokens,GeneratedTokens",
    has_header=True,
    matches=lambda line: header_of(line) == _HEADER,
    parser=_parser,
)
