"""The layout that S-LoRA, VTC and LoRAServe's artifact share, told apart by its column names.

Five columns: `req_id,adapter,prompt_len,output_len,req_time`. The artifact's six put a `model_dir`
between the first two and call the adapter `adapter_dir`; ours add a `rank` at the end. `model_dir`
and `req_id` are not used. An adapter that is empty or 'None' is the base model. Where there is no
`rank` (a column, or the field of one row), it is read from a name such as `dummy-lora-7b-rank-8-13`.
"""

import re

from traces.formats.base import (
    MAX_RANK,
    Block,
    Parser,
    Row,
    RowError,
    Setting,
    TraceFormat,
    checked_name,
    checked_rank,
    expect_fields,
    fields_of,
    header_of,
    seconds,
    tokens,
)
from traces.formats.csv_block import NameMemo, seconds_column, split_columns, token_column

COLUMNS = ("req_id", "adapter", "prompt_len", "output_len", "req_time", "rank")
"""What `write_trace` writes."""

_REQUIRED = {"adapter", "prompt_len", "output_len", "req_time"}
_OPTIONAL = {"req_id", "model_dir", "rank"}
_RANK_IN_NAME = re.compile(r"(?:^|[-_./])rank[-_]?([0-9]{1,5})(?=$|[-_./])", re.ASCII | re.IGNORECASE)


def rank_in_name(adapter: str) -> int | None:
    """The rank that an adapter's name tells, as in `dummy-lora-7b-rank-8-13`; None if it does not."""
    match = _RANK_IN_NAME.search(adapter)
    rank = int(match[1]) if match else 0
    return rank if 0 < rank <= MAX_RANK else None


def _columns(header: str) -> tuple[str, ...]:
    return tuple("adapter" if name == "adapter_dir" else name for name in header_of(header))


def _matches(line: str) -> bool:
    columns = _columns(line)
    names = set(columns)
    return len(names) == len(columns) and names >= _REQUIRED and names <= _REQUIRED | _OPTIONAL


def _adapter(name_text: str, rank_text: str) -> tuple[str | None, int | None]:
    name = None if name_text in ("", "None") else checked_name(name_text)
    rank = checked_rank(rank_text) if rank_text else None
    if name is None and rank is not None:
        raise RowError(f"rank is {rank} but no adapter is named; leave one out or add the other")
    return name, rank_in_name(name) if name is not None and rank is None else rank


class _Parser(Parser):
    def __init__(self, header: str, setting: Setting) -> None:
        self._columns = _columns(header)
        self._place = {name: index for index, name in enumerate(self._columns)}
        self._table = setting.adapters
        self._memo = NameMemo(self._adapter_place)

    def row(self, text: str) -> Row:
        fields = fields_of(text)
        expect_fields(fields, self._columns)
        place = self._place
        adapter, rank = _adapter(fields[place["adapter"]], fields[place["rank"]] if "rank" in place else "")
        return Row(
            time_s=seconds(fields[place["req_time"]], "req_time"),
            prompt_tokens=tokens(fields[place["prompt_len"]], "prompt_len"),
            output_tokens=tokens(fields[place["output_len"]], "output_len"),
            adapter=adapter,
            rank=rank,
        )

    def block(self, text: str) -> Block | None:
        columns = split_columns(text, len(self._columns))
        if columns is None:
            return None
        time_s = seconds_column(columns[self._place["req_time"]])
        prompt_tokens = token_column(columns[self._place["prompt_len"]])
        output_tokens = token_column(columns[self._place["output_len"]])
        if time_s is None or prompt_tokens is None or output_tokens is None:
            return None
        adapter = self._memo.column(
            *(columns[self._place[name]] for name in ("adapter", "rank") if name in self._place)
        )
        if adapter is None:
            return None
        return Block(time_s=time_s, prompt_tokens=prompt_tokens, output_tokens=output_tokens, adapter=adapter)

    def _adapter_place(self, fields: tuple[str, ...]) -> int:
        name, rank = _adapter(fields[0].strip(), fields[1].strip() if len(fields) > 1 else "")
        return -1 if name is None else self._table.place(name, rank)


SLORA = TraceFormat(
    name="slora",
    layout="CSV req_id,[model_dir,]adapter,prompt_len,output_len,req_time[,rank]",
    matches=_matches,
    parser=_Parser,
)
