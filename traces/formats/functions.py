"""Azure Functions traces: every function is an adapter, every invocation a request; no tokens.

2019 (`HashOwner,HashApp,HashFunction,Trigger,1,...,1440`) counts invocations per minute: they are
spread over their minute at random by the seed, or evenly. A `duration_s` counts from the file's first
minute here, as a whole day would not fit. 2021 (`app,func,end_timestamp,duration`) is sorted by when
invocations ended: a request arrives at the end minus the duration. The layouts are those of
Azure/AzurePublicDataset.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from traces.formats.base import (
    Block,
    Parser,
    Row,
    RowError,
    Setting,
    TraceFormat,
    checked_name,
    expect_fields,
    fields_of,
    header_of,
    seconds,
    shown,
)
from traces.formats.csv_block import NameMemo, seconds_column, split_columns

MAX_COUNT = 10_000_000
"""Invocations of one function, in a minute and in a file."""

_2019 = ("hashowner", "hashapp", "hashfunction", "trigger")
_2021 = ("app", "func", "end_timestamp", "duration")
_MINUTE_S = 60.0
_COUNT = re.compile(r"[0-9]{1,8}", re.ASCII)


def _name(app: str, function: str) -> str:
    if not app or not function:
        raise RowError("the application or the function has no name; expected both")
    return checked_name(f"{app}/{function}")


class _Parser2019(Parser):
    expands = True
    has_lengths = False

    def __init__(self, header: str, setting: Setting) -> None:
        self._columns = header_of(header)
        self._table = setting.adapters
        self._even = setting.spread == "even"
        self._rng = np.random.default_rng(setting.seed)
        num_minutes = len(self._columns) - len(_2019)
        wanted = math.inf if setting.duration_s is None else math.ceil(setting.duration_s / _MINUTE_S)
        self._num_minutes = int(min(num_minutes, wanted))

    def expand(self, text: str) -> Block:
        fields = fields_of(text)
        if len(fields) != len(self._columns):
            raise RowError(f"{len(fields)} fields; expected {len(self._columns)} as in the header")
        name = _name(fields[1], fields[2])
        counts = self._counts(fields[len(_2019) : len(_2019) + self._num_minutes])
        total = int(counts.sum())
        if total > MAX_COUNT:
            raise RowError(f"{total:,} invocations of one function; expected at most {MAX_COUNT:,}")
        begin_s = np.repeat(np.arange(len(counts)) * _MINUTE_S, counts)
        if self._even:
            first = np.repeat(np.cumsum(counts) - counts, counts)
            inside = (np.arange(total) - first + 0.5) / np.repeat(counts, counts)
        else:
            inside = self._rng.random(total)
        place = self._table.place(name, None) if total else -1
        return Block(time_s=begin_s + inside * _MINUTE_S, adapter=np.full(total, place, dtype=np.int32))

    def _counts(self, fields: Sequence[str]) -> NDArray[np.int64]:
        for minute, one in enumerate(fields, start=1):
            if not _COUNT.fullmatch(one):
                raise RowError(f"minute {minute} is {shown(one)}; expected a number of invocations")
        return np.array([int(one) for one in fields], dtype=np.int64)


class _Parser2021(Parser):
    has_lengths = False

    def __init__(self, header: str, setting: Setting) -> None:
        self._table = setting.adapters
        self._memo = NameMemo(self._adapter_place)

    def row(self, text: str) -> Row:
        fields = fields_of(text)
        expect_fields(fields, _2021)
        end_s, duration_s = seconds(fields[2], "end_timestamp"), seconds(fields[3], "duration")
        return Row(time_s=end_s - duration_s, adapter=_name(fields[0], fields[1]))

    def block(self, text: str) -> Block | None:
        columns = split_columns(text, len(_2021))
        if columns is None:
            return None
        end_s, duration_s = seconds_column(columns[2]), seconds_column(columns[3])
        adapter = self._memo.column(columns[0], columns[1])
        if end_s is None or duration_s is None or adapter is None:
            return None
        return Block(time_s=end_s - duration_s, adapter=adapter)

    def _adapter_place(self, fields: tuple[str, ...]) -> int:
        return self._table.place(_name(fields[0].strip(), fields[1].strip()), None)


FUNCTIONS_2019 = TraceFormat(
    name="functions2019",
    layout="CSV HashOwner,HashApp,HashFunction,Trigger,1,...,1440 (counts per minute)",
    matches=lambda line: header_of(line)[:5] == (*_2019, "1"),
    parser=_Parser2019,
    ordered=False,
)

FUNCTIONS_2021 = TraceFormat(
    name="functions2021",
    layout="CSV app,func,end_timestamp,duration",
    matches=lambda line: header_of(line) == _2021,
    parser=_Parser2021,
    ordered=False,
)
