"""A damaged or hostile trace gets one clear line with its place, in bounded memory."""

import gzip
import pickle
import resource
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traces import BadRow, TraceError, read_trace
from traces.files.lines import MAX_LINE_BYTES
from traces.types import MAX_BAD_ROWS_KEPT

SLORA = "req_id,adapter,prompt_len,output_len,req_time\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
GOOD = "0,a,10,10,1.0\n"

BAD_ROWS = [
    (SLORA, "0,a,10,10,nan", "req_time is 'nan'; expected a number of seconds"),
    (SLORA, "0,a,10,10,inf", "req_time is 'inf'; expected a number of seconds"),
    (SLORA, "0,a,10,10,1e999", "req_time is inf; expected seconds from 0"),
    (SLORA, "0,a,10,10,-1", "req_time is -1; expected seconds from 0"),
    (SLORA, "0,a,10,10,1e12", "req_time is 1e.12; expected seconds from 0"),
    (SLORA, "0,a,-10,10,2", "prompt_len is '-10'; expected a whole number of tokens"),
    (SLORA, "0,a,10.5,10,2", "prompt_len is '10.5'; expected a whole number"),
    (SLORA, "0,a,1_0,10,2", "prompt_len is '1_0'; expected a whole number"),
    (SLORA, "0,a,٣,10,2", "prompt_len is .*; expected a whole number"),
    (SLORA, "0,a,10,99999999999,2", "output_len is 99999999999; expected 0 to 10,000,000 tokens"),
    (SLORA, f"0,a,10,{'9' * 5000},2", "output_len is '9999.*…; expected a whole number"),
    (SLORA, "0,a,0,10,2", "0 prompt tokens; a request has at least 1"),
    (SLORA, "0,a,10,0,2", "0 output tokens; a request has at least 1"),
    (SLORA, "0,a,10,10,0.5", "time goes back by 0.5 s"),
    (SLORA, "0,a,10,10,1e10", "1e.10 s after the first request; a trace ends within ten years"),
    (SLORA, "0,a,10,10", "4 fields; expected 5: req_id,adapter,prompt_len,output_len,req_time"),
    (SLORA, '0,"a,10,10,2', "broken CSV"),
    (SLORA, "0,a\x00b,10,10,2", "adapter is .*; expected at most 512 printable characters"),
    (SLORA, f"0,{'a' * 600},10,10,2", "adapter is .*; expected at most 512 printable characters"),
    (AZURE, "2023-13-16 18:15:46.6805900,374,44", "TIMESTAMP is .*; expected a date and time like"),
    (AZURE, "yesterday,374,44", "TIMESTAMP is 'yesterday'; expected a date and time like"),
    (BURST, "9,ChatGPT,10,0,10,API log", "Response tokens is 0: the request failed"),
    (
        "",
        '{"timestamp": NaN, "input_length": 1, "output_length": 1}',
        "timestamp is nan; expected milliseconds",
    ),
    (
        "",
        '{"timestamp": -1, "input_length": 1, "output_length": 1}',
        "timestamp is -1; expected milliseconds",
    ),
    (
        "",
        '{"timestamp": true, "input_length": 1, "output_length": 1}',
        "timestamp is True; expected a number",
    ),
    (
        "",
        '{"timestamp": 9, "input_length": 1.5, "output_length": 1}',
        "input_length is 1.5; expected a whole",
    ),
    (
        "",
        '{"timestamp": 9, "input_length": Infinity, "output_length": 1}',
        "input_length is inf; expected a whole",
    ),
    (
        "",
        '{"timestamp": 9, "input_length": 1, "output_length": "1"}',
        "output_length is '1'; expected a number",
    ),
    ("", '{"timestamp": 9, "input_length": 1, "output_length": 1, "hash_ids": [1.5]}', "hash_ids is"),
    ("", '{"timestamp": 9, "input_length": 1', "broken JSON"),
    ("", '{"timestamp": ' + "9" * 5000 + ', "input_length": 1, "output_length": 1}', "broken JSON"),
    ("", "[" * 100_000, "broken JSON"),
    ("", "17", "17 is not a JSON object"),
]
FIRST_ROW = {
    SLORA: GOOD,
    AZURE: "2023-11-16 18:15:46.6805900,374,44\n",
    BURST: "5,ChatGPT,472,18,490,API log\n",
    "": '{"timestamp": 0, "input_length": 1, "output_length": 1}\n',
}


def written(tmp_path: Path, data: str | bytes) -> Path:
    path = tmp_path / "trace"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refusal(path: Path) -> TraceError:
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return caught.value


@pytest.mark.parametrize(("header", "row", "reason"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line_or_skipped_and_counted(
    tmp_path: Path, header: str, row: str, reason: str
) -> None:
    path = written(tmp_path, header + FIRST_ROW[header] + row + "\n")
    line = 3 if header else 2
    with pytest.raises(TraceError, match=rf"trace:{line}: {reason}"):
        read_trace(path)
    assert refusal(path).line == line
    trace = read_trace(path, on_bad_row="skip")
    assert (len(trace), trace.num_bad_rows, [bad.line for bad in trace.bad_rows]) == (1, 1, [line])


def test_a_failed_request_still_moves_the_clock(tmp_path: Path) -> None:
    path = written(tmp_path, BURST + "9,m,10,0,10,API log\n5,m,10,5,10,API log\n10,m,1,1,2,API log\n")
    trace = read_trace(path, on_bad_row="skip")
    assert [bad.line for bad in trace.bad_rows] == [2, 3]
    assert len(trace) == 1


def test_the_first_thousand_bad_rows_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    count = MAX_BAD_ROWS_KEPT + 500
    trace = read_trace(written(tmp_path, SLORA + GOOD + "broken\n" * count), on_bad_row="skip")
    assert trace.num_bad_rows == count
    assert len(trace.bad_rows) == MAX_BAD_ROWS_KEPT
    assert trace.bad_rows[0] == BadRow(line=3, reason=trace.bad_rows[0].reason)
    assert trace.bad_rows[-1].line == MAX_BAD_ROWS_KEPT + 2


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the file is empty; expected one of: azure"),
        (b"\n\r\n \n", "the file is empty"),
        (gzip.compress(b""), "the file is empty"),
        (SLORA.encode(), "no requests after the header"),
        (b"hello\nworld\n", "the first line 'hello' is of no known format; expected one of: azure"),
        (b"req_id,adapter,prompt_len\n", "is of no known format"),
        (b"\xff\xfe\x00a\n", "trace:1: the line is not UTF-8 text"),
        (b"PK\x03\x04....", "this is a zip archive; a trace must be plain text or gzip"),
        (b"\x28\xb5\x2f\xfd....", "this is zstd-compressed"),
        (b"PAR1....", "this is a Parquet file"),
        (gzip.compress(SLORA.encode())[:-12] + b"\x00" * 12, "trace:.: the gzip data ends or breaks here"),
    ],
)
def test_what_is_no_trace_is_refused_even_when_skipping(tmp_path: Path, data: bytes, says: str) -> None:
    path = written(tmp_path, data)
    assert says.replace("trace:.:", "") in str(refusal(path)).replace(f"{path}:", "trace:")
    with pytest.raises(TraceError):
        read_trace(path, on_bad_row="skip")


def test_when_all_rows_are_bad_the_first_reason_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, SLORA + "x\ny\n")
    with pytest.raises(
        TraceError, match="trace:2: no usable request: all 2 rows are bad, the first because 1 fields"
    ):
        read_trace(path, on_bad_row="skip")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"nowhere\.csv: cannot read the trace: No such file"):
        read_trace(tmp_path / "nowhere.csv")
    with pytest.raises(TraceError, match="cannot read the trace: Is a directory"):
        read_trace(tmp_path)


def test_on_bad_row_takes_two_words(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="expected 'refuse' or 'skip'"):
        read_trace(written(tmp_path, SLORA + GOOD), on_bad_row="ignore")  # type: ignore[arg-type]


@given(cut=st.integers(1, 200), skip=st.booleans())
def test_a_truncated_gzip_is_refused_wherever_it_ends(
    tmp_path_factory: pytest.TempPathFactory, cut: int, skip: bool
) -> None:
    rows = "".join(
        f"{index},a,{index * 7919 % 997 + 1},{index * 31 % 89 + 1},{index}.5\n" for index in range(200)
    )
    data = gzip.compress((SLORA + rows).encode())
    path = written(tmp_path_factory.getbasetemp(), data[:-cut])
    with pytest.raises(TraceError, match="gzip data ends or breaks here") as caught:
        read_trace(path, on_bad_row="skip" if skip else "refuse")
    assert caught.value.line is not None


def peak_bytes_of(path: Path, says: str, on_bad_row: str) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(TraceError, match=says):
            read_trace(path, on_bad_row="skip" if on_bad_row == "skip" else "refuse")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bomb(path: Path, head: bytes, piece: bytes, times: int) -> Path:
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(head)
        for _ in range(times):
            file.write(piece)
    return path


@pytest.mark.parametrize("on_bad_row", ["refuse", "skip"])
@pytest.mark.parametrize(
    "piece",
    [b" " * (1 << 20), (b" " * 1023 + b"\n") * 1024],
    ids=["one line", "blank lines"],
)
def test_a_zip_bomb_is_refused_in_bounded_memory(tmp_path: Path, piece: bytes, on_bad_row: str) -> None:
    path = bomb(tmp_path / "bomb.gz", SLORA.encode() + GOOD.encode(), piece, 64)
    says = "longer than" if on_bad_row == "refuse" and b"\n" not in piece else "more than 200 times"
    assert peak_bytes_of(path, says, on_bad_row) < 16 << 20


def test_a_zip_bomb_of_good_rows_is_refused_before_it_has_grown(tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.gz", SLORA.encode(), GOOD.encode() * (1 << 16), 64)
    error = refusal(path)
    assert "more than 200 times" in str(error)
    assert error.line is not None
    assert error.line < 300_000


@pytest.mark.parametrize("on_bad_row", ["refuse", "skip"])
def test_a_line_of_64_mib_is_one_bad_row_in_bounded_memory(tmp_path: Path, on_bad_row: str) -> None:
    path = tmp_path / "long"
    with path.open("wb") as file:
        file.write(SLORA.encode())
        for _ in range(64):
            file.write(b"7" * (1 << 20))
        file.write(b"\n")
    says = f"long:2: .*longer than {MAX_LINE_BYTES:,} bytes"
    assert peak_bytes_of(path, says, on_bad_row) < 8 << 20
    with path.open("ab") as file:
        file.write(GOOD.encode())
    trace = read_trace(path, on_bad_row="skip")
    assert (len(trace), [bad.line for bad in trace.bad_rows]) == (1, [2])


def test_an_endless_line_is_refused_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TraceError, match="longer than 1,048,576 bytes"):
        read_trace("/dev/zero")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@given(
    st.binary(max_size=400), st.sampled_from([b"", *(header.encode() for header in FIRST_ROW)]), st.booleans()
)
def test_any_bytes_give_a_trace_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, header: bytes, packed: bool
) -> None:
    body = header + data
    path = written(tmp_path_factory.getbasetemp(), gzip.compress(body) if packed else body)
    try:
        said = f"{len(read_trace(path, on_bad_row='skip'))} requests"
    except TraceError as error:
        said = str(error)
    assert said != "0 requests"
    assert "\n" not in said


def test_a_trace_error_survives_pickling() -> None:
    error = TraceError("what is wrong; what is right", source="a.csv", line=7)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.line) == ("a.csv:7: what is wrong; what is right", 7)
