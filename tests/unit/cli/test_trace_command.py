"""`loraserve trace stats | convert | formats`: what they print, write and refuse."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from loraserve.cli.main import make_app
from traces import read_trace
from traces.formats import FORMATS
from traces.read import read_columns

MOONCAKE = "".join(
    f'{{"timestamp": {at * 500}, "input_length": {600 + at}, "output_length": {at + 1},'
    f' "hash_ids": [0, {at}]}}\n'
    for at in range(8)
)
FUNCTIONS = "app,func,end_timestamp,duration\na,f,10.5,0.5\na,g,12.25,12.0\na,f,11.0,0.25\n"
SLORA = (
    "req_id,adapter,prompt_len,output_len,req_time\n0,x-rank-8-1,5,6,0.0\n1,x-rank-8-1,5,6,1.5\n2,,5,6,3.0\n"
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(make_app(), ["trace", *map(str, arguments)])


def written(tmp_path: Path, text: str, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def refusal(result: Result) -> str:
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_stats_are_told_to_people_and_as_json(tmp_path: Path) -> None:
    path = written(tmp_path, SLORA)
    told = run("stats", path)
    assert (told.exit_code, told.stderr) == (0, "")
    for line in (
        "requests    3 in 3 s",
        "rate        0.667/s mean, 1/s peak (1 s)",
        "adapters    1; 2 requests name one",
        "popularity  top 1 100%, top 10 100%, Zipf unknown",
        "ranks       8: 100%",
    ):
        assert line in told.stdout.splitlines()
    found = json.loads(run("stats", path, "--json").stdout)
    assert (found["requests"], found["adapters"]["ranks"], found["blocks"]) == (3, {"8": 2}, 0)


def test_stats_of_blocks_of_bad_rows_and_of_unknown_lengths(tmp_path: Path) -> None:
    assert (
        "blocks      16 of 512 tokens; 50% of them repeat an earlier one"
        in run("stats", written(tmp_path, MOONCAKE)).stdout
    )
    assert "prompt      not known" in run("stats", written(tmp_path, FUNCTIONS)).stdout
    path = written(tmp_path, SLORA + "broken\n")
    assert "trace:5: 1 fields" in refusal(run("stats", path))
    assert "left out    1 rows that are no requests" in run("stats", path, "--on-bad-row", "skip").stdout


def test_stats_draw_a_picture_where_asked(tmp_path: Path) -> None:
    path = written(tmp_path, SLORA)
    assert run("stats", path, "--out", tmp_path / "x.png").exit_code == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "does not end in .png" in refusal(run("stats", path, "--out", tmp_path / "x.pdf"))
    assert "cannot be written" in refusal(run("stats", path, "--out", tmp_path / "no" / "x.png"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_convert_there_and_back_is_the_same_trace(tmp_path: Path, name: str) -> None:
    source = written(tmp_path, MOONCAKE)
    done = run("convert", source, tmp_path / name, "--json")
    assert json.loads(done.stdout) == {
        "out": str(tmp_path / name),
        "format": "parquet" if name.endswith("parquet") else "mooncake",
        "from": "mooncake",
        "requests": 8,
        "bad_rows": 0,
        "duration_s": 3.5,
        "left_out": "",
    }
    assert read_trace(tmp_path / name).requests == read_trace(source).requests


def test_convert_cuts_and_speeds_up_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    source, out = written(tmp_path, MOONCAKE), tmp_path / "a.csv"
    done = run("convert", source, out, "--limit", 5, "--speedup", 2)
    assert "5 requests in 1 s, mooncake to slora" in done.stdout
    assert "left out: block hashes" in done.stdout
    assert read_columns(out).arrival_s.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    run("convert", source, out, "--duration", 1.75, "--rate", 6)
    assert read_columns(out).arrival_s.tolist() == pytest.approx([0.0, 1 / 6, 2 / 6, 3 / 6])


def test_convert_takes_missing_lengths_as_asked(tmp_path: Path) -> None:
    source, out = written(tmp_path, FUNCTIONS), tmp_path / "a.csv"
    assert "tells no numbers of tokens; give both --prompt-tokens" in refusal(run("convert", source, out))
    assert not out.exists()
    assert run("convert", source, out, "--prompt-tokens", 7, "--output-tokens", 9).exit_code == 0
    assert [(one.prompt_tokens, one.output_tokens) for one in read_trace(out).requests] == [(7, 9)] * 3
    lengths = written(tmp_path, SLORA, "lengths")
    assert run("convert", source, out, "--lengths-from", lengths).exit_code == 0
    assert {one.prompt_tokens for one in read_trace(out).requests} == {5}


def test_convert_refuses_what_it_cannot_do_and_leaves_nothing_behind(tmp_path: Path) -> None:
    source = written(tmp_path, SLORA)
    assert "should end in .csv, .csv.gz" in refusal(run("convert", source, tmp_path / "a.txt"))
    assert "should end in" in refusal(run("convert", source, tmp_path / "a.parquet.gz"))
    assert "give one of them" in refusal(
        run("convert", source, tmp_path / "a.csv", "--rate", 1, "--speedup", 1)
    )
    assert "cannot be written" in refusal(run("convert", source, tmp_path / "no" / "a.csv"))
    for factor in ("0", "-1", "nan", "inf"):
        assert "must be" in refusal(run("convert", source, tmp_path / "a.csv", "--speedup", factor))
    assert "No such file" in refusal(run("convert", tmp_path / "none", tmp_path / "a.csv"))
    assert "no trace format is called 'arena'" in refusal(run("stats", source, "--format", "arena"))
    broken = written(tmp_path, SLORA + "x\n", "broken")
    assert "broken:5" in refusal(run("convert", broken, tmp_path / "a.csv"))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["broken", "trace"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "the file is empty"),
        (b"\x1f\x8b\x08\x00", "the gzip data ends or breaks here"),
        (b"PAR1", "this is a Parquet file that cannot be read"),
        (SLORA.encode() + b"3,a,5,6,2.0\n", ":5: time goes back by 1 s"),
        (SLORA.encode() + b"3,a,-5,6,4.0\n", ":5: prompt_len is '-5'"),
        (SLORA.encode() + b"3,a,5,99999999999,4.0\n", ":5: output_len is 99999999999"),
        (SLORA.encode() + b"3,a,5,6,nan\n", ":5: req_time is 'nan'"),
    ],
)
def test_a_doctored_trace_is_one_line_and_exit_code_2(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "bad"
    path.write_bytes(data)
    assert says in refusal(run("stats", path))
    assert says in refusal(run("convert", path, tmp_path / "a.csv"))


def test_formats_are_listed_with_what_they_look_like() -> None:
    listed = run("formats").stdout
    assert [line.split()[0] for line in listed.splitlines()] == [*FORMATS, "parquet"]
    assert list(json.loads(run("formats", "--json").stdout)) == [*FORMATS, "parquet"]


def test_presets_and_the_bundled_trace_are_read_like_files(tmp_path: Path) -> None:
    preset = "preset:loraserve-uniform,requests=200,adapters=5"
    found = json.loads(run("stats", preset, "--limit", 50, "--seed", 3, "--json").stdout)
    assert (found["requests"], found["source"]) == (50, "loraserve-uniform, seed 3")
    out = tmp_path / "out.csv"
    assert run("convert", "demo", out, "--limit", 7).exit_code == 0
    assert len(read_columns(out)) == 7
    assert "loraserve-uniform" in refusal(run("stats", "preset:nothing"))
