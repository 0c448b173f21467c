"""BurstGPT traces, in the layout of six columns and in that of eight (with sessions).

A request with 0 response tokens failed when the trace was taken: it is a bad row, not a request.
"""

from traces.formats.base import (
    Row,
    RowError,
    RowParser,
    TraceFormat,
    expect_fields,
    fields_of,
    header_of,
    seconds,
    tokens,
)

_SIX = ("timestamp", "model", "request tokens", "response tokens", "total tokens", "log type")
_EIGHT = ("timestamp", "session id", "elapsed time", *_SIX[1:])


def _parser(header: str) -> RowParser:
    columns = header_of(header)
    place = {name: index for index, name in enumerate(columns)}

    def parse(text: str) -> Row:
        fields = fields_of(text)
        expect_fields(fields, columns)
        time_s = seconds(fields[place["timestamp"]], "Timestamp")
        elapsed = fields[place["elapsed time"]] if "elapsed time" in place else ""
        if elapsed:
            seconds(elapsed, "Elapsed time")
        prompt_tokens = tokens(fields[place["request tokens"]], "Request tokens")
        output_tokens = tokens(fields[place["response tokens"]], "Response tokens")
        if output_tokens == 0:
            raise RowError("Response tokens is 0: the request failed when the trace was taken", time_s)
        return Row(time_s=time_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens)

    return parse


BURSTGPT = TraceFormat(
    name="burstgpt",
    layout="CSV Timestamp,[Session ID,Elapsed time,]Model,Request tokens,Response tokens,"
    "Total tokens,Log Type",
    has_header=True,
    matches=lambda line: header_of(line) in (_SIX, _EIGHT),
    parser=_parser,
)
