"""Parquet traces, through pyarrow: our own columns, and any other layout by its column names.

Ours: `arrival_s`, `prompt_tokens`, `output_tokens` and, where they mean something, `adapter`, `rank` and
`hash_ids`. A file with the column names of another format is handed to that format's parser as text, so
that a format is understood in one place only. The line that an error names is the row, from 1.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from traces.columns import BASE, DEFAULT_BLOCK_TOKENS, TraceColumns
from traces.files.adapter_table import AdapterTable
from traces.files.parquet_footer import file_size
from traces.files.parquet_rows import batch_block, batch_rows, text_chunks
from traces.files.reading import MAX_HASH_IDS
from traces.formats.base import shown
from traces.types import TraceError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from traces.read import Wanted

OUR_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
MAX_GROWTH = 200
"""How many times its size a file may unpack to, from `GROWTH_FROM_BYTES` on."""
GROWTH_FROM_BYTES = 64 << 20

_METADATA_KEY = b"loraserve"
_ROWS_PER_BATCH = 1 << 14
_ROWS_PER_GROUP = 1 << 20
_MAX_COLUMNS = 2000
_MAX_METADATA_BYTES = 64 << 20
_MAX_BLOCK_TOKENS = 1 << 20


def write_parquet(columns: TraceColumns, path: Path) -> None:
    """Write our columns; what rows do not show (unused adapters, size of blocks) goes into the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {
        "version": 1,
        "hash_block_tokens": columns.hash_block_tokens,
        "adapters": [[one.name, one.rank] for one in columns.adapters],
    }
    fields = [
        ("arrival_s", pa.float64()),
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("adapter", pa.string()),
        ("rank", pa.int32()),
    ]
    if columns.hash_ids is not None:
        fields.append(("hash_ids", pa.large_list(pa.int64())))
    schema = pa.schema(fields, metadata={_METADATA_KEY: json.dumps(about).encode()})
    names = pa.array([one.name for one in columns.adapters], type=pa.string())
    ranks = pa.array([one.rank for one in columns.adapters], type=pa.int32())
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for begin in range(0, len(columns), _ROWS_PER_GROUP):
            part = slice(begin, min(begin + _ROWS_PER_GROUP, len(columns)))
            writer.write_table(pa.table(_arrays(columns, part, names, ranks), schema=schema))


def _arrays(columns: TraceColumns, part: slice, names: "pa.Array", ranks: "pa.Array") -> "list[pa.Array]":
    import pyarrow as pa

    adapter = columns.adapter[part]
    is_base = adapter == BASE
    places = pa.array(np.where(is_base, 0, adapter), type=pa.int32(), mask=is_base)
    arrays = [
        pa.array(columns.arrival_s[part]),
        pa.array(columns.prompt_tokens[part]),
        pa.array(columns.output_tokens[part]),
        names.take(places),
        ranks.take(places),
    ]
    if columns.hash_offsets is not None and columns.hash_ids is not None:
        offsets = columns.hash_offsets[part.start : part.stop + 1]
        ids = pa.array(columns.hash_ids[offsets[0] : offsets[-1]])
        arrays.append(pa.LargeListArray.from_arrays(pa.array(offsets - offsets[0]), ids))
    return arrays


def read_parquet(path: Path, wanted: "Wanted") -> TraceColumns:
    """The columns of a Parquet file; TraceError for one that is damaged, hostile or no trace."""
    import pyarrow.parquet as pq

    source = str(path)
    with _damage(source):
        _check_size(path, wanted)
        # A buffer makes it read page by page; a schema of its own must not choose Python types.
        file = pq.ParquetFile(path, buffer_size=1 << 16, pre_buffer=False)
        with file:
            schema = file.schema_arrow
            texts = [field.name for field in schema if _is_text(field.type)]
    with (
        _damage(source),
        pq.ParquetFile(path, buffer_size=1 << 16, pre_buffer=False, read_dictionary=texts) as file,
    ):
        names = tuple(name.strip().lower() for name in file.schema_arrow.names)
        if len(set(names)) < len(names):
            raise TraceError("two columns have the same name", source=source)
        if set(names) >= set(OUR_COLUMNS):
            return _read_ours(file, source, wanted)
        return _read_foreign(file, path, wanted)


@contextmanager
def _damage(source: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except TraceError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        what = f"this is a Parquet file that cannot be read ({reason}); fetch or write it again"
        raise TraceError(what, source=source) from error


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_binary(kind))


def _check_size(path: Path, wanted: "Wanted") -> None:
    """Refuse, by what the file says of itself, one that would fill the memory."""
    about, source = file_size(path), str(path)
    if about.num_columns > _MAX_COLUMNS:
        what = f"{about.num_columns:,} columns; a trace has at most {_MAX_COLUMNS:,}"
        raise TraceError(what, source=source)
    if about.num_rows > wanted.max_requests and wanted.limit is None and wanted.duration_s is None:
        what = (
            f"more than {wanted.max_requests:,} requests: {about.num_rows:,} rows; give a limit or a duration"
        )
        raise TraceError(what, source=source)
    size_bytes = path.stat().st_size
    unpacked_bytes = max(about.unpacked_bytes, about.num_values * 8)
    if about.num_values > MAX_HASH_IDS or unpacked_bytes > max(GROWTH_FROM_BYTES, MAX_GROWTH * size_bytes):
        what = f"{size_bytes:,} bytes that unpack to {unpacked_bytes:,}, which no trace does"
        raise TraceError(what, source=source)


def _read_ours(file: "pq.ParquetFile", source: str, wanted: "Wanted") -> TraceColumns:
    table = AdapterTable()
    block_tokens = _take_metadata(file, table, source)
    has_metadata = len(table) > 0
    reading = wanted.reading(source, ordered=True, has_lengths=True, adapters=table)
    known = (*OUR_COLUMNS, "adapter", "rank", "hash_ids")
    chosen = [name for name in file.schema_arrow.names if name.strip().lower() in known]
    first = 1
    for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=chosen):
        if reading.done:
            break
        # What is read from a damaged page may point outside its own dictionary.
        batch.validate(full=True)
        fields = {name.strip().lower(): batch.column(place) for place, name in enumerate(batch.schema.names)}
        block = batch_block(fields, table)
        if block is None or not reading.block(block):
            reading.rows(batch_rows(fields, first))
        first += len(batch)
    return reading.columns(
        format="parquet", block_tokens=block_tokens, fill=wanted.fill, keep_adapters=has_metadata
    )


def _take_metadata(file: "pq.ParquetFile", table: AdapterTable, source: str) -> int:
    """Put the adapters of the metadata into the table; the tokens per block."""
    text = (file.schema_arrow.metadata or {}).get(_METADATA_KEY)
    if text is None:
        return DEFAULT_BLOCK_TOKENS
    try:
        if len(text) > _MAX_METADATA_BYTES:
            raise ValueError("it is too long")
        about = json.loads(text)
        block_tokens = about["hash_block_tokens"]
        if type(block_tokens) is not int or not 0 < block_tokens <= _MAX_BLOCK_TOKENS:
            raise ValueError(f"hash_block_tokens is {shown(block_tokens)}")
        for name, rank in about["adapters"]:
            if not isinstance(name, str) or not (rank is None or type(rank) is int):
                raise ValueError(f"{shown(name)} of rank {shown(rank)} is no adapter")
            table.place(name, rank)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise TraceError(
            f"the metadata 'loraserve' is damaged ({error}); write the file again", source=source
        ) from error
    return block_tokens


def _read_foreign(file: "pq.ParquetFile", path: Path, wanted: "Wanted") -> TraceColumns:
    from traces.read import read_text

    return read_text(text_chunks(file, _ROWS_PER_BATCH), path, wanted)
