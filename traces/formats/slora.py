"""The layout that S-LoRA, VTC and LoRAServe's artifact share, told apart by its column names.

Five columns: `req_id,adapter,prompt_len,output_len,req_time`. The artifact's six put a `model_dir`
between the first two and call the adapter `adapter_dir`; ours add a `rank` at the end. `model_dir`
and `req_id` are not used. An adapter that is empty or 'None' is the base model. Where there is no
`rank` (a column, or the field of one row), it is read from a name such as `dummy-lora-7b-rank-8-13`.
"""

import re

from traces.formats.base import (
    Row,
    RowError,
    RowParser,
    TraceFormat,
    expect_fields,
    fields_of,
    header_of,
    seconds,
    shown,
    tokens,
)

COLUMNS = ("req_id", "adapter", "prompt_len", "output_len", "req_time", "rank")
"""What `write_trace` writes."""

MAX_RANK = 65_536
MAX_NAME_CHARACTERS = 512

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


def _rank(text: str) -> int:
    rank = int(text) if re.fullmatch(r"[0-9]{1,6}", text, re.ASCII) else 0
    if not 0 < rank <= MAX_RANK:
        raise RowError(f"rank is {shown(text)}; expected a whole number from 1 to {MAX_RANK:,}")
    return rank


def _adapter(text: str) -> str | None:
    if text in ("", "None"):
        return None
    if len(text) > MAX_NAME_CHARACTERS or not text.isprintable():
        right = f"expected at most {MAX_NAME_CHARACTERS} printable characters"
        raise RowError(f"adapter is {shown(text)}; {right}")
    return text


def _parser(header: str) -> RowParser:
    columns = _columns(header)
    place = {name: index for index, name in enumerate(columns)}

    def parse(text: str) -> Row:
        fields = fields_of(text)
        expect_fields(fields, columns)
        adapter = _adapter(fields[place["adapter"]])
        rank_text = fields[place["rank"]] if "rank" in place else ""
        rank = _rank(rank_text) if rank_text else None
        if adapter is None and rank is not None:
            raise RowError(f"rank is {rank} but no adapter is named; leave one out or add the other")
        if adapter is not None and rank is None:
            rank = rank_in_name(adapter)
        return Row(
            time_s=seconds(fields[place["req_time"]], "req_time"),
            prompt_tokens=tokens(fields[place["prompt_len"]], "prompt_len"),
            output_tokens=tokens(fields[place["output_len"]], "output_len"),
            adapter=adapter,
            rank=rank,
        )

    return parse


SLORA = TraceFormat(
    name="slora",
    layout="CSV req_id,[model_dir,]adapter,prompt_len,output_len,req_time[,rank]",
    has_header=True,
    matches=_matches,
    parser=_parser,
)
