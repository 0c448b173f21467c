"""Vidur's traces, also read by its descendants: `arrived_at,num_prefill_tokens,num_decode_tokens`, times
in seconds. More columns (ids, totals, ratios) are not used."""

from traces.formats.base import (
    Block,
    Parser,
    Row,
    Setting,
    TraceFormat,
    expect_fields,
    fields_of,
    header_of,
    seconds,
    tokens,
)
from traces.formats.csv_block import seconds_column, split_columns, token_column

_REQUIRED = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")


class _Parser(Parser):
    def __init__(self, header: str, setting: Setting) -> None:
        self._columns = header_of(header)
        self._places = tuple(self._columns.index(name) for name in _REQUIRED)

    def row(self, text: str) -> Row:
        fields = fields_of(text)
        expect_fields(fields, self._columns)
        time, prompt, output = (fields[place] for place in self._places)
        return Row(
            time_s=seconds(time, "arrived_at"),
            prompt_tokens=tokens(prompt, "num_prefill_tokens"),
            output_tokens=tokens(output, "num_decode_tokens"),
        )

    def block(self, text: str) -> Block | None:
        columns = split_columns(text, len(self._columns))
        if columns is None:
            return None
        time, prompt, output = (columns[place] for place in self._places)
        time_s, prompt_tokens, output_tokens = (
            seconds_column(time),
            token_column(prompt),
            token_column(output),
        )
        if time_s is None or prompt_tokens is None or output_tokens is None:
            return None
        return Block(time_s=time_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


def _matches(line: str) -> bool:
    columns = header_of(line)
    return set(columns) >= set(_REQUIRED) and len(set(columns)) == len(columns)


VIDUR = TraceFormat(
    name="vidur",
    layout="CSV arrived_at,num_prefill_tokens,num_decode_tokens",
    matches=_matches,
    parser=_Parser,
)
