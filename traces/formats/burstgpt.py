"""BurstGPT traces, in the layout of six columns and in that of eight (with sessions).

A request with 0 response tokens failed when the trace was taken: it is a bad row, not a request.
"""

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
    seconds,
    tokens,
)
from traces.formats.csv_block import seconds_column, split_columns, token_column

_SIX = ("timestamp", "model", "request tokens", "response tokens", "total tokens", "log type")
_EIGHT = ("timestamp", "session id", "elapsed time", *_SIX[1:])


class _Parser(Parser):
    def __init__(self, header: str, setting: Setting) -> None:
        self._columns = header_of(header)
        self._place = {name: index for index, name in enumerate(self._columns)}

    def row(self, text: str) -> Row:
        fields = fields_of(text)
        expect_fields(fields, self._columns)
        place = self._place
        time_s = seconds(fields[place["timestamp"]], "Timestamp")
        elapsed = fields[place["elapsed time"]] if "elapsed time" in place else ""
        if elapsed:
            seconds(elapsed, "Elapsed time")
        prompt_tokens = tokens(fields[place["request tokens"]], "Request tokens")
        output_tokens = tokens(fields[place["response tokens"]], "Response tokens")
        if output_tokens == 0:
            raise RowError("Response tokens is 0: the request failed when the trace was taken", time_s)
        return Row(time_s=time_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    def block(self, text: str) -> Block | None:
        columns = split_columns(text, len(self._columns))
        if columns is None:
            return None
        if "elapsed time" in self._place:
            elapsed = [one for one in columns[self._place["elapsed time"]] if one]
            if elapsed and seconds_column(elapsed) is None:
                return None
        time_s = seconds_column(columns[self._place["timestamp"]])
        prompt_tokens = token_column(columns[self._place["request tokens"]])
        output_tokens = token_column(columns[self._place["response tokens"]])
        if time_s is None or prompt_tokens is None or output_tokens is None:
            return None
        return Block(time_s=time_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens)


BURSTGPT = TraceFormat(
    name="burstgpt",
    layout="CSV Timestamp,[Session ID,Elapsed time,]Model,Request tokens,Response tokens,"
    "Total tokens,Log Type",
    matches=lambda line: header_of(line) in (_SIX, _EIGHT),
    parser=_Parser,
)
