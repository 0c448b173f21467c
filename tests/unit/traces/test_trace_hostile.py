"""Doctored files of every kind: one clear line with the row, exit code 2, bounded memory."""

import gzip
import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from traces import TraceError
from traces.columns import columns_of
from traces.files.adapter_table import MAX_ADAPTERS, AdapterTable
from traces.files.parquet_footer import file_size
from traces.fill import UNKNOWN
from traces.read import read_columns, read_trace
from traces.synth import Lengths, SynthSpec, synthesise
from traces.write import write_columns

SLORA = "req_id,adapter,prompt_len,output_len,req_time\n"
GOOD = "0,a,10,10,1.0\n"
GIB = 1 << 30
MEMORY = 640 << 20


MAF_2021 = "app,func,end_timestamp,duration\n"
MAF_2019 = "HashOwner,HashApp,HashFunction,Trigger,1\n"


def command(path: Path, *options: str, memory_bytes: int = 0) -> subprocess.CompletedProcess[str]:
    """`loraserve trace stats` in a process of its own, in so much address space."""

    def limit() -> None:
        if memory_bytes:
            resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))

    script = "from loraserve.cli.main import make_app; make_app()()"
    return subprocess.run(
        [sys.executable, "-c", script, "trace", "stats", str(path), *options],
        capture_output=True, text=True, check=False, preexec_fn=limit, timeout=120,
        env={"OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def sparse(path: Path, head: bytes, size_bytes: int, tail: bytes = b"") -> Path:
    """A file of so many bytes, of which the disk holds only the ends."""
    with path.open("wb") as file:
        file.write(head)
        file.seek(size_bytes - len(tail))
        file.write(tail or b"\x00")
    return path


def test_a_line_of_1_gib_is_one_bad_row_in_less_address_space(tmp_path: Path) -> None:
    path = sparse(tmp_path / "long.csv", SLORA.encode(), GIB, b"\n" + GOOD.encode())
    refused = command(path, memory_bytes=MEMORY)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: {path}:2: the line is longer than 1,048,576 bytes")
    assert refused.stderr.count("\n") == 1
    skipped = command(path, "--on-bad-row", "skip", "--json", memory_bytes=MEMORY)
    assert (skipped.returncode, skipped.stderr) == (0, "")
    assert {key: json.loads(skipped.stdout)[key] for key in ("requests", "bad_rows")} == {
        "requests": 1,
        "bad_rows": 1,
    }


def test_a_zip_bomb_ends_in_one_line_in_little_address_space(tmp_path: Path) -> None:
    path = tmp_path / "bomb.csv.gz"
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(SLORA.encode())
        for _ in range(64):
            file.write(GOOD.encode() * 75_000)
    ended = command(path, memory_bytes=MEMORY)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "more than 200 times" in ended.stderr


def made(tmp_path: Path) -> Path:
    length = Lengths(median_tokens=40, sigma=0.5, min_tokens=1, max_tokens=400)
    spec = SynthSpec(
        num_requests=300, duration_s=60.0, adapters=(), prompt=length, output=length, base_share=1
    )
    path = tmp_path / "made.parquet"
    write_columns(columns_of(synthesise(spec)), path)
    return path


def refusal(path: Path, says: str, *, fill: bool = False) -> None:
    for on_bad_row in ("refuse", "skip"):
        with pytest.raises(TraceError, match=says) as caught:
            read_columns(path, on_bad_row=on_bad_row, fill=UNKNOWN if fill else None)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_a_parquet_file_cut_short_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    data = made(tmp_path).read_bytes()
    path = tmp_path / "cut.parquet"
    for length in random.Random(0).sample(range(4, len(data)), 40):
        path.write_bytes(data[:length])
        refusal(path, "this is a Parquet file that cannot be read")


def outcome(path: Path) -> str:
    """Why a file is refused; '' if it is read."""
    try:
        read_columns(path, on_bad_row="skip")
    except TraceError as error:
        return str(error)
    return ""


def test_a_parquet_file_with_flipped_bits_is_read_or_refused_and_never_ends_the_process(
    tmp_path: Path,
) -> None:
    data, path = made(tmp_path).read_bytes(), tmp_path / "flipped.parquet"
    rng = random.Random(7)
    refused = 0
    for attempt in range(400):
        damaged = bytearray(data)
        begin = 4 if attempt % 2 else len(data) - 1500
        for _ in range(rng.choice((1, 2, 20))):
            damaged[rng.randrange(begin, len(data))] = rng.randrange(256)
        path.write_bytes(damaged)
        said = outcome(path)
        refused += said != ""
        assert "\n" not in said
    assert refused > 100


def parquet(path: Path, **columns: object) -> Path:
    table = {"arrival_s": [0.0, 1.0], "prompt_tokens": [5, 6], "output_tokens": [7, 8]} | columns
    pq.write_table(pa.table(table), path)
    return path


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"arrival_s": [1.0, 0.5]}, "2: time goes back by 0.5 s"),
        ({"arrival_s": [0.0, float("nan")]}, "2: arrival_s is nan; expected seconds"),
        ({"arrival_s": [0.0, float("inf")]}, "2: arrival_s is inf; expected seconds"),
        ({"arrival_s": [0.0, -1.0]}, "2: arrival_s is -1; expected seconds"),
        ({"arrival_s": [0.0, None]}, "2: arrival_s is None; expected a number"),
        ({"arrival_s": ["0", "1"]}, "1: arrival_s is '0'; expected a number"),
        ({"prompt_tokens": [5, -6]}, "2: prompt_tokens is -6; expected 0 to 10,000,000"),
        ({"prompt_tokens": [5, 0]}, "2: 0 prompt tokens; a request has at least 1"),
        ({"output_tokens": [5, 2**40]}, "2: output_tokens is 1099511627776; expected 0 to"),
        ({"output_tokens": [5.0, 5.5]}, "2: output_tokens is 5.5; expected a whole number"),
        ({"adapter": ["a", " "]}, "2: adapter is ' '; expected a name or nothing"),
        ({"adapter": ["a", "b" * 600]}, "2: adapter is .*; expected at most 512 printable"),
        ({"adapter": ["a", None], "rank": [8, 8]}, "2: rank is 8 but no adapter is named"),
        ({"adapter": ["a", "b"], "rank": [8, -8]}, "2: rank is -8; expected a whole number from 1"),
        ({"adapter": ["a", "b"], "rank": [8, 0]}, "2: rank is 0; expected a whole number from 1"),
        ({"adapter": [1, 2]}, "1: adapter is 1; expected a name or nothing"),
    ],
)
def test_a_bad_row_of_a_parquet_file_is_named_by_its_row(
    tmp_path: Path, columns: dict[str, object], says: str
) -> None:
    path = parquet(tmp_path / "bad", **columns)
    with pytest.raises(TraceError, match=f"bad:{says}"):
        read_columns(path)


def test_what_parquet_rows_are_left_are_read(tmp_path: Path) -> None:
    columns = read_columns(
        parquet(tmp_path / "x", output_tokens=[0, 3], adapter=["a", "b"]), on_bad_row="skip"
    )
    assert (columns.num_bad_rows, columns.output_tokens.tolist(), columns.adapters[0].name) == (1, [3], "b")


def test_a_parquet_file_that_grows_beyond_reason_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "grows"
    ids = pa.ListArray.from_arrays([0, 4_000_000, 12_000_000], np.full(12_000_000, 7))
    parquet(path, hash_ids=ids)
    assert path.stat().st_size < 1 << 20
    refusal(path, "bytes that unpack to 96,000,0.., which no trace does")
    parquet(path, note=["x" * (1 << 20)] * 2)
    assert len(read_columns(path)) == 2  # what is no column of a trace is not read


def test_a_parquet_file_of_no_format_and_one_without_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "x")
    refusal(tmp_path / "x", "the first line 'a,b' is of no known format; expected one of: azure")
    pq.write_table(
        pa.table({"arrival_s": pa.array([], pa.float64()), "prompt_tokens": [], "output_tokens": []}),
        tmp_path / "x",
    )
    refusal(tmp_path / "x", "no requests after the header")
    pq.write_table(
        pa.table(
            {"app": ["a\nb", "a"], "func": ["f", "g"], "end_timestamp": [1.0, 2.0], "duration": [0.5, 0.25]}
        ),
        tmp_path / "x",
    )
    assert read_columns(tmp_path / "x", fill=UNKNOWN).adapters[0].name == "a b/f"


@pytest.mark.parametrize(
    "footer",
    [
        b"",
        b"\x00",
        b"\x15" + b"\xff" * 20,
        b"\x1c" * 200,
        b"\x19" * 200,
        b"\x19\xfc\xff\xff\xff\x7f",
        b"\x1b\xff\xff\xff\x07\xcc",
    ],
)
def test_a_footer_that_is_none_is_refused_at_once(tmp_path: Path, footer: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(ValueError, match=r"its footer|its end"):
        file_size(path)
    refusal(path, "this is a Parquet file that cannot be read")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MAF_2019 + "o,a,f,http,99999999\n", "2: 99,999,999 invocations of one"),
        (MAF_2019 + "o,a,f,http,-1\n", "2: minute 1 is '-1'; expected a number"),
        (MAF_2019 + "o,a,f,http,1,1\n", "2: 6 fields; expected 5 as in the header"),
        (MAF_2019 + "o,,f,http,1\n", "2: the application or the function has no name"),
        (MAF_2021 + "a,f,1,nan\n", "2: duration is 'nan'; expected a number"),
        (MAF_2021 + "a,f,1,1\na,f,9e10,1\n", "a trace ends within ten years"),
        ("arrival_s,adapter_id\n5,a\n4,a\n", "3: time goes back by 1 s"),
        ("====\n0.5\nx\n", "3: arrival is 'x'; expected a number"),
        ("0,1e9,1,Gamma,1,1\n600,0,0,,0,0\n", "2: 600,000,000,000 requests in a window; expected at most"),
        ('{"chat_id": 1, "timestamp": 1e999, "input_length": 1, "output_length": 1}\n',
         "1: timestamp is inf"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": [9223372036854775808]}\n',
         "1: hash_ids is"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "adapter": 5}\n',
         "1: adapter is 5; expected a name"),
    ],
)  # fmt: skip
def test_a_doctored_row_of_the_newer_formats_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(TraceError, match=f"bad:{says}" if says[0].isdigit() else says) as caught:
        read_trace(path, fill=UNKNOWN)
    assert "\n" not in str(caught.value)


def test_there_is_an_end_to_different_adapters() -> None:
    table = AdapterTable()
    for at in range(MAX_ADAPTERS):
        table.place(str(at), None)
    with pytest.raises(OverflowError, match="more than 1,000,000 different adapters"):
        table.place("one more", None)
    assert table.place("0", None) == 0


def test_names_that_fill_the_memory_end_the_reading_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "names.csv"
    rows = (f"{at},{at:0512d},1,1,{at}\n" for at in range(40_000))
    path.write_text(SLORA + "".join(rows))
    with pytest.raises(
        TraceError, match=r"names.csv:3\d{4}: more than 3\d,\d{3} different adapters, which no"
    ):
        read_columns(path)
