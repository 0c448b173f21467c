"""Batches of a Parquet file as what the reader of traces takes: columns, rows or lines of text."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from traces.columns import BASE
from traces.files.adapter_table import AdapterTable
from traces.files.lines import Chunk
from traces.formats.base import (
    MAX_RANK,
    MAX_TIME_S,
    MAX_TOKENS,
    Block,
    Row,
    RowError,
    checked_name,
    checked_seconds,
    checked_tokens,
    shown,
)

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

Fields = Mapping[str, "pa.Array"]

_JSON_KEYS = ("timestamp", "input_length", "output_length")
_JSON_EXTRA = ("chat_id", "hash_ids", "adapter", "rank", "block_size")
_MAX_TEXT = 1024
"""Characters of one field; longer ones are cut, which makes a bad row of an adapter's name."""


def batch_block(fields: Fields, table: AdapterTable) -> Block | None:
    """Our columns of a batch; None if anything in it is unusual."""
    if any(fields[name].null_count for name in ("arrival_s", "prompt_tokens", "output_tokens")):
        return None
    time_s = _numbers(fields["arrival_s"], "f")
    prompt, output = _numbers(fields["prompt_tokens"], "iu"), _numbers(fields["output_tokens"], "iu")
    if time_s is None or prompt is None or output is None:
        return None
    if not bool(np.all((time_s >= 0) & (time_s <= MAX_TIME_S))):
        return None
    if max(prompt.max(), output.max()) > MAX_TOKENS or min(prompt.min(), output.min()) < 0:
        return None
    try:
        adapter = _adapters(fields, table)
    except (RowError, OverflowError):
        return None
    hash_counts, hash_ids = _hashes(fields.get("hash_ids"))
    return Block(
        time_s=time_s.astype(np.float64),
        prompt_tokens=prompt.astype(np.int32),
        output_tokens=output.astype(np.int32),
        adapter=adapter,
        hash_counts=hash_counts,
        hash_ids=hash_ids,
    )


def batch_rows(fields: Fields, first: int) -> Iterator[tuple[int, Callable[[], Row | None]]]:
    """The same one by one, each row as its number and what checks it."""
    count = len(fields["arrival_s"])
    for place in range(count):
        yield first + place, partial(_row, fields, place)


def text_chunks(file: "pq.ParquetFile", batch_size: int) -> Iterator[Chunk]:
    """The rows as lines of CSV with a header, or of JSON where the names are those of a JSON format."""
    names = [_one_line(name) for name in file.schema_arrow.names]
    lowered = [name.strip().lower() for name in names]
    as_json = set(lowered) >= set(_JSON_KEYS)
    if not as_json:
        yield Chunk(0, _csv_lines([names]))
    first = 1
    for batch in file.iter_batches(batch_size=batch_size):
        batch.validate(full=True)
        columns = [_texts(column, as_json=as_json) for column in batch.columns]
        rows = zip(*columns, strict=True)
        if as_json:
            wanted = [place for place, name in enumerate(lowered) if name in (*_JSON_KEYS, *_JSON_EXTRA)]
            lines = (
                json.dumps({lowered[place]: row[place] for place in wanted if row[place] is not None})
                for row in rows
            )
            data = "\n".join(lines).encode()
        else:
            data = _csv_lines(rows)
        if len(batch):
            yield Chunk(first, data)
        first += len(batch)


def _csv_lines(rows: "Any") -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()[:-1].encode()


def _one_line(text: str) -> str:
    return " ".join(text[: _MAX_TEXT + 1].splitlines())


def _texts(column: "pa.Array", *, as_json: bool) -> list[Any]:
    """A column's values as CSV or JSON may have them; '' or None for nothing and for what has no place."""
    import pyarrow as pa
    import pyarrow.types as kinds

    kind = column.type
    if kinds.is_dictionary(kind):
        known = [None if one is None else _one_line(str(one)) for one in column.dictionary.to_pylist()]
        return [None if place is None else known[place] for place in column.indices.to_pylist()]
    if kinds.is_timestamp(kind):
        return list(column.cast(pa.string()).to_pylist())
    if kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_boolean(kind):
        return list(column.to_pylist())
    if as_json and (kinds.is_list(kind) or kinds.is_large_list(kind)) and kinds.is_integer(kind.value_type):
        return list(column.to_pylist())
    return [None] * len(column)


def _numbers(column: "pa.Array", kinds: str) -> NDArray[Any] | None:
    values = column.to_numpy(zero_copy_only=False)
    return values if values.dtype.kind in kinds and len(values) else None


def _adapters(fields: Fields, table: AdapterTable) -> NDArray[np.int32] | None:
    """Places in the table, new adapters in order of first sight."""
    names = fields.get("adapter")
    if names is None:
        return None
    import pyarrow as pa

    if not isinstance(names, pa.DictionaryArray):
        raise RowError("adapter is no text")
    known = names.dictionary.to_pylist()
    name = names.indices.fill_null(len(known)).to_numpy().astype(np.int64)
    rank = np.zeros(len(name), dtype=np.int64)
    if "rank" in fields:
        ranks = fields["rank"]
        if not pa.types.is_integer(ranks.type):
            raise RowError("rank is no whole number")
        rank = ranks.fill_null(0).to_numpy().astype(np.int64)
        if ranks.null_count < len(ranks) and (rank[rank != 0].min() < 1 or rank.max() > MAX_RANK):
            raise RowError("rank out of range")
        if bool(np.any((rank == 0) != np.asarray(ranks.is_null()))):
            raise RowError("a rank of 0")
    pairs, first, place = np.unique(name * (MAX_RANK + 1) + rank, return_index=True, return_inverse=True)
    places = np.empty(len(pairs), dtype=np.int32)
    for pair in np.argsort(first).tolist():
        which, one = divmod(int(pairs[pair]), MAX_RANK + 1)
        places[pair] = _place(known[which] if which < len(known) else None, one or None, table)
    return places[place.reshape(-1)]


def _place(name: object, rank: int | None, table: AdapterTable) -> int:
    adapter, rank = _adapter(name, rank)
    return BASE if adapter is None else table.place(adapter, rank)


def _adapter(name: object, rank: object) -> tuple[str | None, int | None]:
    if name is None:
        if rank is not None:
            raise RowError(f"rank is {shown(rank)} but no adapter is named; leave one out or add the other")
        return None, None
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"adapter is {shown(name)}; expected a name or nothing")
    if rank is not None and (not isinstance(rank, int) or not 0 < rank <= MAX_RANK):
        raise RowError(f"rank is {shown(rank)}; expected a whole number from 1 to {MAX_RANK:,}")
    return checked_name(name.strip()), rank


def _hashes(column: "pa.Array | None") -> tuple[NDArray[np.int32] | None, NDArray[np.int64] | None]:
    if column is None:
        return None, None
    import pyarrow.compute as pc

    values = pc.list_flatten(column)
    counts = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    return counts.astype(np.int32), values.to_numpy(zero_copy_only=False).astype(np.int64)


def _row(fields: Fields, place: int) -> Row:
    values = {name: column[place].as_py() for name, column in fields.items()}
    time_s = values["arrival_s"]
    if isinstance(time_s, bool) or not isinstance(time_s, int | float):
        raise RowError(f"arrival_s is {shown(time_s)}; expected a number of seconds")
    adapter, rank = _adapter(values.get("adapter"), values.get("rank"))
    return Row(
        time_s=checked_seconds(float(time_s), "arrival_s"),
        prompt_tokens=_tokens(values, "prompt_tokens"),
        output_tokens=_tokens(values, "output_tokens"),
        adapter=adapter,
        rank=rank,
        hash_ids=_hash_ids(values.get("hash_ids")),
    )


def _tokens(values: Mapping[str, Any], name: str) -> int:
    value = values[name]
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise RowError(f"{name} is {shown(value)}; expected a whole number of tokens")
    return checked_tokens(value, name)


def _hash_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(one) is int and one.bit_length() <= 63 for one in value):
        raise RowError(f"hash_ids is {shown(value)}; expected a list of whole numbers of at most 64 bits")
    return tuple(value)
