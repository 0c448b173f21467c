"""Alibaba's trace of image generation with adapters (clusterdata, 2026-GenAI), prepared as a CSV that
begins `arrival_s,adapter_id`; what follows is not used.

An empty `adapter_id` is the base model. Where several adapters are named with `|` between them, the
first is taken: a request here has one; the others count as adapters of the trace. There are no numbers
of tokens.
"""

from traces.formats.base import (
    Parser,
    Row,
    Setting,
    TraceFormat,
    checked_name,
    expect_fields,
    fields_of,
    header_of,
    seconds,
)

_REQUIRED = ("arrival_s", "adapter_id")


class _Parser(Parser):
    has_lengths = False
    keeps_unused = True

    def __init__(self, header: str, setting: Setting) -> None:
        self._columns = header_of(header)
        self._table = setting.adapters

    def row(self, text: str) -> Row:
        fields = fields_of(text)
        expect_fields(fields, self._columns)
        time_s = seconds(fields[0], "arrival_s")
        names = [checked_name(name.strip()) for name in fields[1].split("|")]
        for name in names:
            if name:
                self._table.place(name, None)
        return Row(time_s=time_s, adapter=names[0] or None)


GENAI = TraceFormat(
    name="genai",
    layout="CSV arrival_s,adapter_id[,...]",
    matches=lambda line: header_of(line)[:2] == _REQUIRED,
    parser=_Parser,
)
