"""Columns are the rows: both forms, both ways of reading, and every format that is written, agree."""

import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traces import Trace, TraceError, TraceRequest, read_trace
from traces.columns import BASE, TraceColumns, columns_of, trace_of
from traces.files.lines import MAX_LINE_BYTES, read_chunks
from traces.formats import FORMATS
from traces.formats.base import Setting
from traces.formats.slora import rank_in_name
from traces.read import read_columns
from traces.write import write_columns

SLORA = "req_id,adapter,prompt_len,output_len,req_time,rank\n"

names = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=12).filter(
    lambda name: name == name.strip() and name != "None" and name.isprintable() and rank_in_name(name) is None
)
requests = st.builds(
    lambda arrival_s, prompt, output, adapter, hash_ids: TraceRequest(
        index=0,
        arrival_s=arrival_s,
        prompt_tokens=prompt,
        output_tokens=output,
        adapter=adapter[0] if adapter else None,
        rank=adapter[1] if adapter else None,
        hash_ids=tuple(hash_ids),
    ),
    st.floats(0, 1e8),
    st.integers(1, 10_000_000),
    st.integers(1, 10_000_000),
    st.none() | st.tuples(names, st.none() | st.integers(1, 512)),
    st.lists(st.integers(-(2**63) + 1, 2**63 - 1), max_size=4),
)
traces = st.lists(requests, min_size=1, max_size=20).map(
    lambda drawn: Trace.of(drawn, source="drawn", format="drawn")
)


def same(one: TraceColumns, other: TraceColumns) -> bool:
    """The same workload to the last bit."""
    return trace_of(one).requests == trace_of(other).requests


@given(traces)
def test_columns_and_rows_are_the_same_workload(trace: Trace) -> None:
    columns = columns_of(trace)
    assert trace_of(columns) == trace
    assert columns.adapter.max() < len(columns.adapters)
    assert (columns.adapter == BASE).tolist() == [one.adapter is None for one in trace.requests]
    assert columns.arrival_s.dtype == np.float64
    assert {columns.prompt_tokens.dtype, columns.output_tokens.dtype, columns.adapter.dtype} == {
        np.dtype(np.int32)
    }


@given(traces, st.sampled_from([16, 512]), st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.parquet"]))
def test_what_is_written_with_blocks_is_read_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, trace: Trace, block_tokens: int, name: str
) -> None:
    columns = columns_of(trace, hash_block_tokens=block_tokens)
    path = tmp_path_factory.getbasetemp() / name
    write_columns(columns, path)
    again = read_columns(path)
    assert same(again, columns)
    assert columns.hash_ids is None or again.hash_block_tokens == block_tokens
    first = path.read_bytes()
    write_columns(again, path)
    assert path.read_bytes() == first


@given(traces)
def test_a_csv_keeps_all_but_the_blocks(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = tmp_path_factory.getbasetemp() / "b.csv"
    columns = columns_of(trace)
    write_columns(columns, path)
    again = [(one.arrival_s, one.adapter, one.rank) for one in read_trace(path).requests]
    assert again == [(one.arrival_s, one.adapter, one.rank) for one in trace.requests]


def test_parquet_keeps_adapters_that_no_request_has(tmp_path: Path) -> None:
    trace = Trace.of(
        [TraceRequest(index=0, arrival_s=0.0, prompt_tokens=1, output_tokens=1, adapter="b", rank=8)],
        source="",
        format="",
    )
    columns = columns_of(trace)
    more = TraceColumns(
        arrival_s=columns.arrival_s,
        prompt_tokens=columns.prompt_tokens,
        output_tokens=columns.output_tokens,
        adapter=columns.adapter + 1,
        adapters=(*columns_of(trace).adapters[:0], type(columns.adapters[0])(name="a"), columns.adapters[0]),
        source="",
        format="",
    )
    write_columns(more, tmp_path / "a.parquet")
    again = read_columns(tmp_path / "a.parquet")
    assert (again.adapters, again.adapter.tolist()) == (more.adapters, [1])


tokens = st.sampled_from(["1", "44", "9999999", "10000000", "007"])
seconds = st.sampled_from(["0", "0.25", "17.", ".5", "1e3", "1E-05", "+3", "99999999999"])
adapters = st.sampled_from(["", "None", "a", "x-rank-8-13", "ä-1", "rank-0"])
fields = {
    "azure": st.tuples(
        st.builds(
            "{}-{}-{} {}:{}:{}{}".format,
            st.sampled_from(["2023", "2024"]),
            st.sampled_from(["01", "02", "12"]),
            st.sampled_from(["01", "28", "29", "31"]),
            st.sampled_from(["00", "23"]),
            st.sampled_from(["00", "59"]),
            st.sampled_from(["00", "59"]),
            st.sampled_from([".1234567"]),
        ),
        tokens,
        tokens,
    ),
    "slora": st.tuples(st.just("7"), adapters, tokens, tokens, seconds, st.sampled_from(["", "16"])),
    "burstgpt": st.tuples(seconds, st.just("m"), tokens, tokens, st.just("9"), st.just("API log")),
    "vidur": st.tuples(seconds, tokens, tokens),
    "functions2021": st.tuples(st.just("app"), st.sampled_from("fg"), seconds, seconds),
}
lengths = st.sampled_from(["0", "7", "10000000", "10000001", "7.0", "-1", "true", '"7"', "null", "1e2"])
hashes = st.sampled_from(
    ["", ', "hash_ids": []', ', "hash_ids": [1, -5]', ', "hash_ids": null', ', "hash_ids": [1.5]']
)
more = st.sampled_from(
    [
        "",
        ', "adapter": "a"',
        ', "adapter": "b", "rank": 8',
        ', "rank": 8',
        ', "block_size": 16',
        ', "x": {}',
        ', "x": "}"',
    ]
)
jsonl = st.builds(
    '{{"timestamp": {}, "input_length": {}, "output_length": {}{}{}}}'.format,
    st.sampled_from(["0", "1500", "0.1", "207.93754160099873", "1e3", "1e400", "-1", "NaN", "null"]),
    lengths,
    lengths,
    hashes,
    more,
)
fields["mooncake"] = st.tuples(jsonl | st.sampled_from(['{"x": "}', '{"}', "{}", "{},{}", "7", "["]))
usual = '{"timestamp": 0, "input_length": 1, "output_length": 1}'
HEADERS = {
    "mooncake": usual,
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens",
    "slora": SLORA.strip(),
    "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
    "vidur": "arrived_at,num_prefill_tokens,num_decode_tokens",
    "functions2021": "app,func,end_timestamp,duration",
}


@pytest.mark.parametrize("name", list(fields))
@given(data=st.data())
def test_many_rows_at_once_are_the_rows_one_by_one(name: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(fields[name].map(",".join), min_size=1, max_size=8))
    setting = Setting(path=Path("x"))
    block = FORMATS[name].parser(HEADERS[name], setting).block("\n".join(rows))
    careful = FORMATS[name].parser(HEADERS[name], Setting(path=Path("x")))
    try:
        one_by_one = [careful.row(row) for row in rows]
    except ValueError:
        assert block is None  # what one way refuses, the other leaves to it
        return
    if block is None:
        assert name == "mooncake"  # a length of 7.0 and such: right, but taken with care
        return
    first_seen = list(dict.fromkeys(row.adapter for row in one_by_one if row is not None and row.adapter))
    assert list(dict.fromkeys(one.name for one in setting.adapters.adapters())) == first_seen
    known = [(one.name, one.rank) for one in setting.adapters.adapters()] + [(None, None)]
    for at, row in enumerate(one_by_one):
        assert row is not None
        assert block.time_s[at] == row.time_s
        if block.prompt_tokens is not None and block.output_tokens is not None:
            assert (block.prompt_tokens[at], block.output_tokens[at]) == (
                row.prompt_tokens,
                row.output_tokens,
            )
        if block.adapter is not None:
            assert known[block.adapter[at]] == (row.adapter, row.rank)
    if block.hash_ids is not None and block.hash_counts is not None:
        assert block.hash_counts.tolist() == [len(row.hash_ids) for row in one_by_one if row is not None]
        assert block.hash_ids.tolist() == [
            one for row in one_by_one if row is not None for one in row.hash_ids
        ]


def test_usual_lines_of_json_are_read_in_a_block() -> None:
    parser = FORMATS["mooncake"].parser(usual, Setting(path=Path("x")))
    rows = [usual, usual.replace("0", "1500"), usual.replace("}", ', "hash_ids": [1, 2], "adapter": "a"}')]
    assert parser.block("\n".join(rows)) is not None
    assert parser.block("\n".join([*rows, "{}"])) is None


@pytest.mark.parametrize(
    "row",
    [
        "1,a,1,1,1",
        "1,a,1,1,1,1,",
        "1,a,1,1,nan,",
        "1,a,-1,1,1,",
        "1,a,1,1_0,1,",
        "1,a,٣,1,1,",
        "1,a,1,,1,",
        '1,"a",1,1,1,',
        "1,a,1,99999999,1,",
        "1,a,1,1,1e99999,",
        "1,a,1,1,-1,",
        "1,,1,1,1,8",
        "1,a,1,1,1,0",
        " ",
        "1,a,1,1, 1,",
        ",,,,,",
    ],
)
def test_an_unusual_row_is_never_read_in_a_block(row: str) -> None:
    parser = FORMATS["slora"].parser(SLORA, Setting(path=Path("x")))
    assert parser.block("0,a,1,1,0,\n2,a,1,1,1,") is not None
    assert parser.block(f"0,a,1,1,0,\n{row}\n2,a,1,1,1,") is None


def many(count: int, end: str = "\n") -> str:
    rows = (
        f"{at},{f'adapter-{at % 7}' if at % 5 else ''},{at % 900 + 1},{at % 90 + 1},{at / 16},"
        for at in range(count)
    )
    return SLORA.strip() + end + end.join(rows) + end


@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_row_among_many_is_named_by_its_line(tmp_path: Path, packed: bool) -> None:
    lines = many(30_000).split("\n")
    lines[17_321] = "17320,adapter-1,1,0,1082.5,"
    lines[20_001:20_001] = ["", ""]
    data = "\n".join(lines).encode()
    path = tmp_path / "trace"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(TraceError, match="trace:17322: 0 output tokens"):
        read_columns(path)
    columns = read_columns(path, on_bad_row="skip")
    assert (len(columns), columns.num_bad_rows, columns.bad_rows[0].line) == (29_999, 1, 17_322)
    expected = [at for at in range(30_000) if at != 17_320]
    assert columns.arrival_s.tolist() == [at / 16 for at in expected]
    assert columns.prompt_tokens.tolist() == [at % 900 + 1 for at in expected]


def test_a_bad_row_after_the_cut_is_not_met(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(many(5_000) + "broken\n")
    assert len(read_columns(path, limit=1_234)) == 1_234
    assert read_columns(path, duration_s=100.0).duration_s == 100.0 - 1 / 16
    with pytest.raises(TraceError, match="trace:5002: 1 fields"):
        read_columns(path)


def test_line_ends_make_no_difference(tmp_path: Path) -> None:
    (tmp_path / "unix").write_bytes(many(20_000).encode())
    (tmp_path / "dos").write_bytes(many(20_000, "\r\n").encode().removesuffix(b"\r\n"))
    assert same(read_columns(tmp_path / "unix"), read_columns(tmp_path / "dos"))


@given(
    st.lists(st.sampled_from([0, 1, 7, 70_000, 300_000, MAX_LINE_BYTES]), min_size=1, max_size=12),
    st.integers(0, 11),
)
@settings(max_examples=30)
def test_chunks_are_the_lines_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], overlong: int
) -> None:
    lines = [bytes([97 + at % 26]) * length for at, length in enumerate(lengths)]
    if overlong < len(lines):
        lines[overlong] = b"x" * (3 * MAX_LINE_BYTES)
    path = tmp_path_factory.getbasetemp() / "lines"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    found: dict[int, bytes | None] = {}
    for chunk in read_chunks(path):
        parts = [None] if chunk.data is None else chunk.data.split(b"\n")
        found |= dict(enumerate(parts, start=chunk.line))
    assert found == {
        at: None if len(line) > MAX_LINE_BYTES else line for at, line in enumerate(lines, start=1)
    }


def test_columns_take_a_fraction_of_the_rows_memory(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(many(60_000))
    read_columns(path, limit=1)  # what is imported on the way is not the trace's
    tracemalloc.start()
    try:
        columns = read_columns(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # 24 bytes per request twice over while the arrays grow, and a chunk with its fields.
    assert peak_bytes < 12 << 20
    assert len(columns) == 60_000
